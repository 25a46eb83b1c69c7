#pragma once

#include <algorithm>

#include "moe/kernels/pack.hpp"

/// \file
/// Products whose large operand is packed, a panel at a time, into L1: for many rows on a processor
/// with 16 registers, whose tiles are too small to be fed from L2.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// C = A·B: columns in groups whose part of C stays in L2, for each group the depth in blocks, and
/// in each block one strip of columns after the other.
///
/// A strip of B is packed into a panel, by the first tile while it multiplies where it can, and stays
/// in L1 while the tiles of the strip are computed. Meanwhile they prefetch the next strip, so memory
/// and arithmetic are busy at the same time without help from the hardware prefetcher. A second
/// panel, filled between the tiles, would evict the first one from L1.
template <class Scalar, PacketSource<Scalar> Source>
void gemm_packed(const GemmNN<Scalar, Source>& product) {
  alignas(64) Scalar buffer[to_size(panel_depth * tile_columns<Scalar>)];
  const GatheredRows<Scalar>& a = product.a;
  const ScatteredRows<Scalar>& c = product.c;
  const Epilogue epilogue = product.epilogue;
  const Index depth = a.width();
  const Index tiles = (a.count() + tile_rows - 1) / tile_rows;
  const bool first_is_full = (a.count() + tiles - 1) / tiles == tile_rows;

  const auto run = [&](const Strip& strip, const Strip* next) {
    const Start from = strip.k == 0 ? product.start : Start::accumulate;
    const Panel<Scalar> in_place =
        first_is_full ? product.b.in_place(strip) : Panel<Scalar>{nullptr, 0};
    const Panel<Scalar> panel = in_place.data != nullptr
                                    ? Panel<Scalar>{buffer, tile_columns<Scalar>}
                                    : product.b.pack(strip, buffer);
    constexpr Index piece = strip_lines * cache_line<Scalar>;  // of a row of a transposed B
    const Index pieces = next != nullptr ? (next->depth + piece - 1) / piece : 0;
    const Index each = (pieces + tiles - 1) / tiles * piece;
    Index prefetched = 0;
    for_each_tile(a.count(), tile_rows, [&](Index first, Index rows) {
      Left<Scalar> left;
      Scalar* to[to_size(tile_rows)];
      for (Index r = 0; r < rows; ++r) {
        left.row[r] = a.row(first + r) + strip.k;
        to[r] = c.row(first + r) + strip.column;
      }
      for (Index r = first + rows; r < std::min(first + 2 * rows, a.count()); ++r) {
        prefetch_strip(c.row(r) + strip.column);
      }
      Prefetch<Scalar> ahead;
      if (next != nullptr && prefetched < next->depth) {
        ahead = product.b.prefetch(*next, prefetched, std::min(each, next->depth - prefetched));
        prefetched += each;
      }
      const Bias<Scalar> initial =
          strip.k == 0 ? product.bias.at(first, strip.column) : Bias<Scalar>{};
      if (first == 0 && in_place.data != nullptr) {
        multiply_tile<Packet<Scalar>, tile_rows, tile_packets, true>(
            left, in_place, strip.depth, from, initial, to, ahead, buffer);
      } else {
        multiply_tile(rows, strip.packets, strip.width, left, panel, strip.depth, from, initial, to,
                      ahead);
      }
      if (epilogue && strip.k + strip.depth >= depth) {
        epilogue(first, rows, strip.column, strip.width);
      }
    });
  };

  const Index panels =
      std::max<Index>(1, cached_elements<Scalar> / (a.count() * panel_columns<Scalar>));
  const Index group = panels * panel_columns<Scalar>;
  Strip strip{};
  bool pending = false;
  const Range columns = product.column_range();
  const Index end = columns.first + columns.count;
  for (Index column = columns.first; column < end; column += group) {
    const Index width = std::min(group, end - column);
    for (Index k = 0; k == 0 || k < depth; k += panel_depth) {
      for_each_strip<Scalar>(column, width, [&](Index at, Index packets, Index strip_width) {
        const Strip next{k, std::min(panel_depth, depth - k), at, packets, strip_width};
        if (pending) run(strip, &next);
        strip = next;
        pending = true;
      });
    }
  }
  if (pending) run(strip, nullptr);
}

/// Rows of A and of B that a GemmTN adds in one pass over C, at most, and rows of C in a block.
inline constexpr Index packed_tn_depth = 128;
inline constexpr Index packed_tn_rows = 128;
/// Rows of C that a strip is multiplied with before the next strip: more would not stay in L1 where
/// rows are a power of two apart.
inline constexpr Index packed_tn_group = 16;

/// C = Aᵀ·B for a large depth: columns of A and strips of B are packed, and stay in L2 with the part
/// of C that they add to.
template <class Scalar>
void gemm_packed(const GemmTN<Scalar>& product) {
  const GatheredRows<Scalar> a = product.a;
  const GatheredRows<Scalar> b = product.b;
  MatrixView<Scalar> c = product.c;
  const Range rows = product.row_range();
  const Range columns = product.column_range();
  constexpr Index size = packet_size<Scalar>;
  constexpr Index wide = 2 * panel_columns<Scalar>;
  static_assert(packed_tn_rows % tile_rows == 0);
  alignas(64) Scalar left_columns[to_size(packed_tn_depth * packed_tn_rows)];
  alignas(64) Scalar panels[to_size(packed_tn_depth * wide)];

  // Packed so that the values a tile takes from a row of A are contiguous.
  const auto pack_left = [&](Index k, Index depth, Index row, Index height) {
    for (Index i = 0; i < depth; ++i) {
      const Scalar* from = a.row(k + i) + row;
      Scalar* to = left_columns + i * tile_rows;
      Index r = 0;
      for (; r + tile_rows <= height; r += tile_rows) {
        std::copy_n(from + r, tile_rows, to + r * depth);
      }
      if (r < height) std::copy_n(from + r, height - r, to + r * depth);
    }
  };
  const auto pack_right = [&](Index k, Index depth, Index column, Index width) {
    for_each_strip<Scalar>(0, width, [&](Index at, Index, Index strip_width) {
      copy_panel(b.slice(k, depth).columns(column + at, strip_width), panels + at * depth);
    });
  };

  const Index last = rows.first + rows.count;
  const Index last_column = columns.first + columns.count;
  for_each_tile(a.count(), packed_tn_depth, [&](Index k, Index depth) {
    const Start from = k == 0 ? product.start : Start::accumulate;
    for (Index row = rows.first; row < last; row += packed_tn_rows) {
      const Index height = std::min(packed_tn_rows, last - row);
      pack_left(k, depth, row, height);
      for (Index column = columns.first; column < last_column; column += wide) {
        const Index width = std::min(wide, last_column - column);
        pack_right(k, depth, column, width);
        for (Index group = 0; group < height; group += packed_tn_group) {
          for_each_strip<Scalar>(0, width, [&](Index at, Index packets, Index strip_width) {
            const Panel<Scalar> panel{panels + at * depth, packets * size};
            const Index end = std::min(height, group + packed_tn_group);
            for (Index top = group; top < end; top += tile_rows) {
              const Index count = std::min(tile_rows, end - top);
              Left<Scalar> left;
              Scalar* to[to_size(tile_rows)];
              left.step = tile_rows;
              for (Index r = 0; r < count; ++r) {
                left.row[r] = left_columns + top * depth + r;
                to[r] = row_data(c, row + top + r) + column + at;
              }
              // Prefetch the same columns of the next group, which are far away in memory.
              const Index below =
                  std::clamp<Index>(last - row - top - packed_tn_group, 0, tile_rows);
              const Prefetch<Scalar> ahead{to[0] + packed_tn_group * c.outerStride(),
                                           c.outerStride(), below};
              multiply_tile<Scalar>(count, packets, strip_width, left, panel, depth, from, {}, to,
                                    ahead);
            }
          });
        }
      }
    }
  });
}

}  // namespace moe::detail

MOE_PACKETS_END
