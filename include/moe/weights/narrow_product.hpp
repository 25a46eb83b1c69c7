#pragma once

#include <algorithm>
#include <cstddef>

#include "moe/kernels/gemm.hpp"
#include "moe/weights/narrow_matrix.hpp"
#include "moe/weights/narrow_tile.hpp"

/// \file
/// Products with narrow weights. Codes are widened in registers, anew for each tile of rows; for many rows those
/// of formats with scales are widened once, by the first tile, which gives the same bits.
///
/// Without scales an element of C is one chain of multiply-adds, and has the same bits as with the decoded
/// weights. With scales these are applied to the sums of blocks, which saves a multiplication a packet:
///
///     C[r, j] = start + Σ over blocks of scale·(Σ_k a[r, k]·(unit·q[k, j]))
///
/// Both sums are added in ascending order, the inner one from 0 and the outer one from the initial
/// value, with fused multiply-adds where the processor has them. So a row has the same bits
/// whatever rows are multiplied with it. The unit is a power of 2 by which the scale is divided, so
/// it causes no rounding; but an activation of more than 2^92 can overflow.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The largest number of rows for which codes are widened in registers, for each tile of rows, and not into the
/// cache, once for all rows.
inline constexpr Index few_narrow_rows = l2_feeds_tiles ? 48 : 8;

/// Decodes some steps of the packet of columns from `column` on; the first step is a multiple of `group`.
/// Row i of `to`, with a distance of `stride` floats between rows, is step i.
template <class Format>
void decode_packet(const NarrowOperand<Format>& b, Range steps, Index column, float* to,
                   Index stride) {
  using Layout = NarrowLayout<Format>;
  const Index first = column / Layout::panel_columns * Layout::panel_columns;
  const Index packets = narrow_packets(b.columns, first);
  const Index v = (column - first) / lane_count;
  MOE_ASSERT(steps.first % Format::group == 0 && column % lane_count == 0);
  const Index end = steps.first + steps.count;
  for (Index k = steps.first; k < end;) {
    const std::byte* block = b.panel(first, k / Format::block);
    Packet<float> scale = broadcast(1.0f);
    if constexpr (Format::scaled) scale = load_scale<Format>(block + v * Layout::scale_bytes);
    const Index last = std::min(end, (k / Format::block + 1) * Format::block);
    const std::byte* group = block + packets * Layout::scale_bytes + v * Layout::group_bytes +
                             k % Format::block / Format::group * packets * Layout::group_bytes;
    for (; k < last; k += Format::group, group += packets * Layout::group_bytes) {
      for_each_constant<Format::group>([&](auto step) MOE_INLINED {
        if (k + step >= last) return;
        store(to, decoded<Format>(Format::template widen<step>(group), scale));
        to += stride;
      });
    }
  }
}

/// The columns of a panel that a product computes: its packets [first, last), out of `packets`; of the last
/// one perhaps only a part.
struct PanelPart {
  Index column;  ///< of C, where the first packet begins
  Index width;
  Index packets;
  Index first;
  Index last;
};

/// Calls f(part, panel) for the panels of a range of columns, which begins at the start of a packet.
template <class Format, class F>
void for_each_panel(const NarrowOperand<Format>& b, Range columns, F&& f) {
  using Layout = NarrowLayout<Format>;
  MOE_ASSERT(columns.first % lane_count == 0);
  const Index end = columns.first + columns.count;
  for (Index column = columns.first; column < end;) {
    const Index begin = column / Layout::panel_columns * Layout::panel_columns;
    const Index width = std::min(begin + Layout::panel_columns, end) - column;
    const Index first = (column - begin) / lane_count;
    f(PanelPart{column, width, narrow_packets(b.columns, begin), first,
                first + (width + lane_count - 1) / lane_count},
      begin);
    column += width;
  }
}

/// Calls f(to) for some rows of C and a part of a panel. `to` are pointers to rows of whole packets: the
/// rows of C, or copies that are written back. If the product `begins`, the rows first get the
/// initial values of C.
template <class Format, class F>
void with_panel_of_c(const GemmNN<float, NarrowOperand<Format>>& product, Range rows,
                     const PanelPart& part, bool begins, F&& f) {
  constexpr Index highest = max_tile_rows;
  constexpr Index stride = NarrowLayout<Format>::panel_columns;
  alignas(64) float beside[to_size(highest * stride)];
  float* to[to_size(highest)];
  const bool is_whole = part.width % lane_count == 0;
  const Bias<float> bias = product.bias.at(rows.first, part.column);
  for (Index r = 0; r < rows.count; ++r) {
    float* row = product.c.row(rows.first + r) + part.column;
    if (begins) set_initial_values(product.start, bias, r, part.width, row);
    to[r] = is_whole ? row : beside + r * stride;
    if (is_whole) continue;
    std::fill_n(to[r], stride, 0.0f);
    std::copy_n(row, part.width, to[r]);
  }
  f(to);
  if (is_whole) return;
  for (Index r = 0; r < rows.count; ++r) {
    std::copy_n(to[r], part.width, product.c.row(rows.first + r) + part.column);
  }
}

/// Calls f(R, V, v), R and V constants, for tiles of `rows` rows that cover the packets of a part; v is the
/// first packet of the tile, counted in the panel.
template <class Format, Index highest = narrow_tile_rows<Format>, Index whole = 2, class F>
void for_each_narrow_tile(Index rows, const PanelPart& part, F&& f) {
  with_constant<highest>(rows, [&](auto R) {
    constexpr Index widest = narrow_tile_packets<Format>(R, whole);
    for (Index v = part.first; v < part.last; v += widest) {
      with_constant<widest>(std::min(widest, part.last - v), [&](auto V) { f(R, V, v); });
    }
  });
}

/// The steps of k after the last whole block, for rows of A and as many of C. `block` is that part of the
/// panel.
template <class Format>
void narrow_rest(const GatheredRows<float>& a, const NarrowOperand<Format>& b,
                 const PanelPart& part, [[maybe_unused]] const std::byte* block, float* const* c) {
  const Index first = b.rows / Format::block * Format::block;
  const Range steps{first, b.rows - first};
  if constexpr (Format::scaled) {
    // One more block, with zeros after the rows of A.
    constexpr Index highest = narrow_tile_rows<Format>;
    float padded[to_size(highest)][to_size(Format::block)] = {};
    const float* from[to_size(highest)];
    for (Index r = 0; r < a.count(); ++r) {
      std::copy_n(a.row(r) + steps.first, steps.count, padded[r]);
      from[r] = padded[r];
    }
    for_each_narrow_tile<Format>(a.count(), part, [&](auto R, auto V, Index v) {
      narrow_tile<Format, R, V>(from, block, part.packets, v, 1, c, (v - part.first) * lane_count);
    });
  } else {
    alignas(64) float wide[to_size(Format::block * lane_count)];
    for (Index v = 0; v < part.last - part.first; ++v) {
      decode_packet(b, steps, part.column + v * lane_count, wide, lane_count);
      for (Index r = 0; r < a.count(); ++r) {
        float* to = c[r] + v * lane_count;
        Packet<float> sum = load(to);
        for (Index k = 0; k < steps.count; ++k) {
          sum = Eigen::internal::pmadd(broadcast(a.row(r)[steps.first + k]),
                                       load(wide + k * lane_count), sum);
        }
        store(to, sum);
      }
    }
  }
}

/// The blocks of a stretch for a number of rows, see for_each_stretch(); 0 stands for all blocks.
/// With 16 registers, a format without scales and at most 8 rows, a stretch has 8 KiB, which stay
/// in L1.
template <class Format>
constexpr Index few_rows_stretch(Index rows) {
  if (l2_feeds_tiles || Format::scaled || rows > 8) return 0;
  return (Index{8} << 10) / (panel_packets * NarrowLayout<Format>::block_bytes);
}

/// Cuts rows into tiles, and the blocks of a panel into stretches of `most`, and calls
/// f(rows of the tile, stretch, its first block, its blocks) for all tiles of a stretch, once at least. Meanwhile
/// the next stretch is prefetched, since the hardware prefetcher stops where the first tile does. A single tile
/// reads all blocks at once, and so do all tiles if `most` is 0.
template <Index highest, class F>
void for_each_stretch(Index rows, const std::byte* panel, Index block_bytes, Index blocks,
                      Index most, F&& f) {
  const Index tiles = (rows + highest - 1) / highest;
  const bool prefetches = most > 0 && tiles > 1;
  if (!prefetches) most = std::max<Index>(1, blocks);
  for (Index block = 0; block == 0 || block < blocks; block += most) {
    const Index count = std::min(most, blocks - block);
    const std::byte* stretch = panel + block * block_bytes;
    const Index bytes = count * block_bytes;
    Index next = bytes;
    const Index lines = prefetches ? (bytes / 64 + tiles) / tiles : 0;
    for_each_tile(rows, highest, [&](Index first, Index height) {
      for (Index line = 0; line < lines; ++line, next += 64) {
        // With 16 registers into L2: these lines are more than the line fill buffers of L1.
        if constexpr (l2_feeds_tiles) {
          prefetch(stretch, next);
        } else {
          prefetch_far<1>(stretch, next);
        }
      }
      f(Range{first, height}, stretch, block, count);
    });
  }
}

/// Calls f(from, to) for some rows: pointers to the rows of A from step k on, and the pointers to
/// rows of C that with_panel_of_c() passes.
template <class Format, class F>
void with_tile_of_rows(const GemmNN<float, NarrowOperand<Format>>& product, const PanelPart& part,
                       Range rows, Index k, F&& f) {
  const float* from[to_size(max_tile_rows)];
  for (Index r = 0; r < rows.count; ++r) from[r] = product.a.row(rows.first + r) + k;
  with_panel_of_c(product, rows, part, k == 0, [&](float* const* to) { f(from, to); });
}

/// Adds to rows of C the products of a panel from a block on, which are widened in registers.
template <class Format>
void multiply_panel(const GemmNN<float, NarrowOperand<Format>>& product, const PanelPart& part,
                    Index begin, Index block) {
  const Index block_bytes = part.packets * NarrowLayout<Format>::block_bytes;
  const Index whole = product.b.rows / Format::block - block;
  for_each_stretch<narrow_tile_rows<Format>>(
      product.a.count(), product.b.panel(begin, block), block_bytes, whole,
      few_rows_stretch<Format>(product.a.count()),
      [&](Range rows, const std::byte* stretch, Index first, Index blocks) {
        const auto multiply = [&](const float* const* from, float* const* to) {
          for_each_narrow_tile<Format>(rows.count, part, [&](auto R, auto V, Index v) {
            narrow_tile<Format, R, V>(from, stretch, part.packets, v, blocks, to,
                                      (v - part.first) * lane_count);
          });
          if (product.b.rows % Format::block > 0 && first + blocks == whole) {
            narrow_rest<Format>(product.a.slice(rows.first, rows.count), product.b, part,
                                stretch + blocks * block_bytes, to);
          }
        };
        with_tile_of_rows(product, part, rows, (block + first) * Format::block, multiply);
      });
}

/// The same for many rows: the first tile leaves the codes of some blocks of the panel behind as floats, for the
/// other tiles.
template <class Format>
void multiply_wide_panel(const GemmNN<float, NarrowOperand<Format>>& product, const PanelPart& part,
                         Index begin) {
  using Wide = WideCodes<Format>;
  constexpr Index highest = narrow_tile_rows<Wide>;
  // The fewest rows of the first tile, rows being cut evenly.
  constexpr Index fewest = highest - 1;
  static_assert(highest <= 6 && few_narrow_rows >= 2 * fewest);
  // Blocks at a time: 66 KiB of L2 with packets of 64 bytes, else at most 17 KiB of L1.
  constexpr Index height = l2_feeds_tiles ? 8 : 4;
  alignas(64) float wide[to_size(height * panel_packets * wide_block_floats<Format>)];
  const Index whole = product.b.rows / Format::block;
  // There are two tiles at least, so that a stretch has at most `height` blocks and fits into `wide`.
  const auto multiply = [&](Range rows, const std::byte* stretch, Index first, Index blocks) {
    MOE_ASSERT(blocks <= height);
    with_tile_of_rows(product, part, rows, first * Format::block,
                      [&](const float* const* from, float* const* to) {
                        for_each_narrow_tile<Wide>(rows.count, part, [&](auto R, auto V, Index v) {
                          const Index column = (v - part.first) * lane_count;
                          if (rows.first > 0) {
                            const auto* codes = reinterpret_cast<const std::byte*>(wide);
                            return narrow_tile<Wide, R, V>(from, codes, part.packets, v, blocks, to,
                                                           column);
                          }
                          if constexpr (R >= fewest) {
                            narrow_tile<Format, R, V, true>(from, stretch, part.packets, v, blocks,
                                                            to, column, wide);
                          } else {
                            MOE_ASSERT(false);
                          }
                        });
                      });
  };
  if (whole > 0) {
    for_each_stretch<highest>(product.a.count(), product.b.panel(begin),
                              part.packets * NarrowLayout<Format>::block_bytes, whole, height,
                              multiply);
  }
  // If K is 0, C gets its initial values there.
  if (whole == 0 || whole < narrow_blocks<Format>(product.b.rows)) {
    multiply_panel(product, part, begin, whole);
  }
}

/// C = A·B on the calling thread, without rounding of activations: one panel after the other, each for all
/// rows.
template <class Format>
void gemm_widening(const GemmNN<float, NarrowOperand<Format>>& product) {
  const Index rows = product.a.count();
  for_each_panel(product.b, product.column_range(), [&](const PanelPart& part, Index begin) {
    if (!Format::scaled || rows <= few_narrow_rows) {
      multiply_panel(product, part, begin, 0);
    } else if constexpr (Format::scaled) {
      multiply_wide_panel(product, part, begin);
    }
    call_epilogue<float>(product.epilogue, rows, {part.column, part.width});
  });
}

/// C = A·Bᵀ on the calling thread: B is widened, some rows and a panel of its columns at a time.
template <class Format>
void gemm_serial(const GemmNT<float, NarrowOperand<Format>>& product) {
  using Layout = NarrowLayout<Format>;
  constexpr Index height = 64;  // rows of B at a time: at most 16 KiB of floats
  static_assert(height % Format::block == 0);
  alignas(64) float wide[to_size(height * Layout::panel_columns)];
  const NarrowOperand<Format>& b = product.b;
  const Range columns = range_within(product.columns, b.rows);
  const Index end = columns.first + columns.count;
  for (Index first = columns.first; first < end; first += height) {
    const Range steps{first, std::min(height, end - first)};
    // Without any column C gets its initial values.
    for (Index k = 0; k == 0 || k < b.columns; k += Layout::panel_columns) {
      const Index packets = narrow_packets(b.columns, k);
      const Index width = std::min(packets * lane_count, b.columns - k);
      for (Index v = 0; v < packets; ++v) {
        decode_packet(b, steps, k + v * lane_count, wide + v * lane_count, Layout::panel_columns);
      }
      gemm_serial(
          GemmNT<float>{.a = product.a.columns(k, width),
                        .b = MatrixOperand<float>(wide, steps.count, width, Layout::panel_columns),
                        .c = product.c.columns(first, steps.count),
                        .start = k == 0 ? product.start : Start::accumulate});
    }
    call_epilogue<float>(product.epilogue, product.a.count(), steps);
  }
}

}  // namespace moe::detail

MOE_PACKETS_END
