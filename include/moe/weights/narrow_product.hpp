#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "moe/kernels/gemm.hpp"
#include "moe/weights/narrow_matrix.hpp"

/// \file
/// Products with narrow weights. Results have the same bits as products with the decoded weights. For few
/// rows a packet is widened in a register, again for each tile of rows; for many rows a strip is widened
/// into L1, once for all rows.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// A tile that widens in registers, which hold its sums, the scales and the widened weights. A tile of one
/// row has all packets of a panel, since each packet is one chain of multiply-adds; a tile of more rows
/// has two packets if there are only 16 registers and the format has scales.
template <class Format>
inline constexpr Index narrow_tile_rows = l2_feeds_tiles   ? 6
                                          : Format::scaled ? 4
                                                           : 2;
template <class Format>
constexpr Index narrow_tile_packets(Index rows) {
  return l2_feeds_tiles || rows == 1 || !Format::scaled ? panel_packets : 2;
}
/// The largest number of rows for which this is faster than widening into L1: any, if widening is one
/// instruction.
template <class Format>
inline constexpr Index few_narrow_rows = !Format::scaled  ? std::numeric_limits<Index>::max()
                                         : l2_feeds_tiles ? 24
                                                          : 8;

/// Calls f(std::integral_constant<Index, i>) for i from 0 to count - 1.
template <Index count, class F>
EIGEN_ALWAYS_INLINE void for_each_constant(F&& f) {
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    (f(std::integral_constant<Index, static_cast<Index>(i)>{}), ...);
  }
  (std::make_index_sequence<to_size(count)>{});
}

/// The scales of a packet of columns in a block, which turn widened numbers into weights.
template <class Format>
struct Scales {
  Scales() = default;
  explicit Scales(const std::byte*) {}
  EIGEN_ALWAYS_INLINE Packet<float> apply(const Packet<float>& widened) const { return widened; }
};
template <class Format>
requires Format::scaled struct Scales<Format> {
  Packet<float> scale;
  Packet<float> shift;

  Scales() = default;
  EIGEN_ALWAYS_INLINE explicit Scales(const std::byte* halves)
      : scale(load_halves(halves)),
        shift(Eigen::internal::pmul(scale, broadcast(-Format::offset))) {}
  EIGEN_ALWAYS_INLINE Packet<float> apply(const Packet<float>& widened) const {
    if constexpr (Format::offset == 0) return Eigen::internal::pmul(widened, scale);
    return Eigen::internal::pmadd(widened, scale, shift);
  }
};

/// Adds to R rows of C, from a column on: R rows of A times V packets of a panel, from packet `first` on,
/// over `blocks` whole blocks. The panel is `packets` packets wide. The hardware prefetcher follows
/// the panel.
template <class Format, Index R, Index V>
MOE_NOINLINE void narrow_tile(const float* const* a, const std::byte* panel, Index packets,
                              Index first, Index blocks, float* const* c, Index column) {
  using namespace Eigen::internal;
  using Layout = NarrowLayout<Format>;
  constexpr Index size = lane_count;
  const Index stride = packets * Layout::group_bytes;
  const float* row[to_size(R)];
  Packet<float> sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index r = 0; r < R; ++r) row[r] = a[r];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) sum[i / V][i % V] = load(c[i / V] + column + i % V * size);
  for (Index block = 0; block < blocks; ++block) {
    Scales<Format> scale[to_size(V)];
    if constexpr (Format::scaled) {
      MOE_UNROLL
      for (Index v = 0; v < V; ++v)
        scale[v] = Scales<Format>(panel + (first + v) * Layout::scale_bytes);
      panel += packets * Layout::scale_bytes;
    }
    for (Index group = 0; group < Format::block / Format::group; ++group) {
      const std::byte* lanes = panel + first * Layout::group_bytes;
      for_each_constant<Format::group>([&](auto step) {
        MOE_UNROLL
        for (Index v = 0; v < V; ++v) {
          const Packet<float> weight =
              scale[v].apply(Format::template widen<step>(lanes + v * Layout::group_bytes));
          MOE_UNROLL
          for (Index r = 0; r < R; ++r) {
            sum[r][v] = pmadd(pset1<Packet<float>>(row[r][step]), weight, sum[r][v]);
          }
        }
      });
      panel += stride;
      MOE_UNROLL
      for (Index r = 0; r < R; ++r) row[r] += Format::group;
    }
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) store(c[i / V] + column + i % V * size, sum[i / V][i % V]);
}

/// A narrow matrix as operand B of gemm_packed(), widened when it is packed.
template <class Format>
struct NarrowPackets {
  using Layout = NarrowLayout<Format>;
  NarrowOperand<Format> b;

  static_assert(panel_depth % Format::group == 0, "a strip begins with a group");

  Panel<float> pack(const Strip& strip, float* buffer) const {
    const Index stride = strip.packets * lane_count;
    for (Index v = 0; v < strip.packets; ++v) {
      const Index column = strip.column + v * lane_count;
      widen({strip.k, strip.depth}, column, buffer + v * lane_count, stride);
    }
    return {buffer, stride};
  }
  /// Prefetches the panel in which the strip begins, in its whole width: the next strips need the rest.
  Prefetch<float> prefetch(const Strip& strip, Index first, Index count) const {
    constexpr Index at_once = strip_lines * 64;
    const Index column = strip.column / Layout::panel_columns * Layout::panel_columns;
    const Index bytes =
        narrow_packets(b.columns, column) * Layout::block_bytes / Format::block * count;
    const std::byte* place = b.panel(column, (strip.k + first) / Format::block);
    return {reinterpret_cast<const float*>(place), at_once / 4, (bytes + at_once - 1) / at_once};
  }

  /// Widens some steps of the packet of columns from `column` on; the first step is a multiple of `group`.
  /// Row i of `to`, with a distance of `stride` floats between rows, is step i.
  void widen(Range steps, Index column, float* to, Index stride) const {
    const Index first = column / Layout::panel_columns * Layout::panel_columns;
    const Index packets = narrow_packets(b.columns, first);
    const Index v = (column - first) / lane_count;
    MOE_ASSERT(steps.first % Format::group == 0 && column % lane_count == 0);
    const Index end = steps.first + steps.count;
    for (Index k = steps.first; k < end;) {
      const std::byte* block = b.panel(first, k / Format::block);
      const Scales<Format> scale(block + v * Layout::scale_bytes);
      const Index last = std::min(end, (k / Format::block + 1) * Format::block);
      const std::byte* group = block + packets * Layout::scale_bytes + v * Layout::group_bytes +
                               k % Format::block / Format::group * packets * Layout::group_bytes;
      for (; k < last; k += Format::group, group += packets * Layout::group_bytes) {
        for_each_constant<Format::group>([&](auto step) {
          if (k + step >= last) return;
          store(to, scale.apply(Format::template widen<step>(group)));
          to += stride;
        });
      }
    }
  }
};

/// The steps of k after the last whole block: adds to R rows of C the rows of A times `steps` of a panel.
template <class Format>
void narrow_rest(const float* const* a, Index rows, const NarrowOperand<Format>& b, Range steps,
                 Index column, Index packets, float* const* c) {
  alignas(64) float wide[to_size(Format::block * lane_count)];
  for (Index v = 0; v < packets; ++v) {
    NarrowPackets<Format>{b}.widen(steps, column + v * lane_count, wide, lane_count);
    for (Index r = 0; r < rows; ++r) {
      float* to = c[r] + v * lane_count;
      Packet<float> sum = load(to);
      for (Index k = 0; k < steps.count; ++k) {
        sum = Eigen::internal::pmadd(broadcast(a[r][steps.first + k]), load(wide + k * lane_count),
                                     sum);
      }
      store(to, sum);
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
  constexpr Index highest = narrow_tile_rows<Format>;
  constexpr Index stride = NarrowLayout<Format>::panel_columns;
  alignas(64) float beside[to_size(highest * stride)];
  float* to[to_size(highest)];
  const bool is_whole = part.width % lane_count == 0;
  const Bias<float> bias = product.bias.at(rows.first, part.column);
  for (Index r = 0; r < rows.count; ++r) {
    float* row = product.c.row(rows.first + r) + part.column;
    if (begins) {
      if (product.start == Start::zero) std::fill_n(row, part.width, 0.0f);
      if (bias.values != nullptr) add_scaled(part.width, *bias.factors.at(r), bias.values, row);
    }
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
template <class Format, class F>
void for_each_narrow_tile(Index rows, const PanelPart& part, F&& f) {
  with_constant<narrow_tile_rows<Format>>(rows, [&](auto R) {
    constexpr Index widest = narrow_tile_packets<Format>(R);
    for (Index v = part.first; v < part.last; v += widest) {
      with_constant<widest>(std::min(widest, part.last - v), [&](auto V) { f(R, V, v); });
    }
  });
}

/// C = A·B for few rows: one panel after the other, each for all rows.
template <class Format>
void gemm_narrow(const GemmNN<float, NarrowOperand<Format>>& product) {
  constexpr Index highest = narrow_tile_rows<Format>;
  const NarrowOperand<Format>& b = product.b;
  const Index rows = product.a.count();
  const Index whole = b.rows / Format::block;  // blocks
  const Range rest{whole * Format::block, b.rows - whole * Format::block};
  for_each_panel(b, product.column_range(), [&](const PanelPart& part, Index begin) {
    const std::byte* panel = b.panel(begin);
    for_each_tile(rows, highest, [&](Index first, Index count) {
      const float* from[to_size(highest)];
      for (Index r = 0; r < count; ++r) from[r] = product.a.row(first + r);
      with_panel_of_c(product, {first, count}, part, true, [&](float* const* to) {
        for_each_narrow_tile<Format>(count, part, [&](auto R, auto V, Index v) {
          narrow_tile<Format, R, V>(from, panel, part.packets, v, whole, to,
                                    (v - part.first) * lane_count);
        });
        if (rest.count > 0) {
          narrow_rest(from, count, b, rest, part.column, part.last - part.first, to);
        }
      });
    });
    call_epilogue<float>(product.epilogue, rows, {part.column, part.width});
  });
}

/// C = A·B on the calling thread, without rounding of activations.
template <class Format>
void gemm_widening(const GemmNN<float, NarrowOperand<Format>>& product) {
  if (product.a.count() <= few_narrow_rows<Format>) return gemm_narrow(product);
  gemm_packed(GemmNN<float, NarrowPackets<Format>>{.a = product.a,
                                                   .b = {product.b},
                                                   .c = product.c,
                                                   .columns = product.columns,
                                                   .start = product.start,
                                                   .bias = product.bias,
                                                   .epilogue = product.epilogue});
}

/// C = A·Bᵀ on the calling thread: B is widened, some rows and a panel of its columns at a time.
template <class Format>
void gemm_serial(const GemmNT<float, NarrowOperand<Format>>& product) {
  using Layout = NarrowLayout<Format>;
  constexpr Index height = 64;  // rows of B at a time: 16 KiB of floats
  static_assert(height % Format::block == 0);
  alignas(64) float wide[to_size(height * Layout::panel_columns)];
  const NarrowOperand<Format>& b = product.b;
  const Range columns = range_within(product.columns, b.rows);
  const Index end = columns.first + columns.count;
  for (Index first = columns.first; first < end; first += height) {
    const Range steps{first, std::min(height, end - first)};
    for (Index k = 0; k < b.columns; k += Layout::panel_columns) {
      const Index packets = narrow_packets(b.columns, k);
      const Index width = std::min(packets * lane_count, b.columns - k);
      for (Index v = 0; v < packets; ++v) {
        NarrowPackets<Format>{b}.widen(steps, k + v * lane_count, wide + v * lane_count,
                                       Layout::panel_columns);
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
