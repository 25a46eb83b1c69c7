#pragma once

#include <algorithm>
#include <concepts>

#include "moe/kernels/blocks.hpp"

/// \file
/// Products whose large operand is copied, a panel at a time, to the nearest cache: for many rows
/// on a processor with 16 registers, whose tiles are too small for a farther one.

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace moe::detail {

/// How far the rows of a panel reach along the depth, at most: a panel of 3 packets is then 24 KiB,
/// which leaves room in the first-level cache. Deeper ones would read and write C less often.
inline constexpr Index panel_depth =
    (Index{24} << 10) / static_cast<Index>(tile_packets * sizeof(Packet<float>));

/// Where the right operand of a strip starts, and what part of it there is.
struct Strip {
  Index k;
  Index depth;
  Index column;
  Index packets;
  Index width;
};

/// What gemm_packed() takes B from, a strip at a time. The kernels know B by this alone, so a source
/// whose numbers are stored in another type converts them in pack(), and nowhere else.
///
///     pack(strip, buffer)            the strip as packets, in the buffer of panel_depth rows of
///                                    tile_columns, the last packet of a row filled up with zeros
///     in_place(strip)                the strip in memory, if tiles can read packets there; else
///                                    without data
///     prefetch(strip, first, count)  what pack() will read for steps [first, first + count)
template <class Source, class Scalar>
concept PacketSource = requires(const Source& source, const Strip& strip, Scalar* buffer,
                                Index step) {
  { source.pack(strip, buffer) } -> std::same_as<Panel<Scalar>>;
  { source.in_place(strip) } -> std::same_as<Panel<Scalar>>;
  { source.prefetch(strip, step, step) } -> std::same_as<Ahead<Scalar>>;
};

/// A matrix as a source of packets: B of GemmNN, whose rows run along the columns of C, or of
/// GemmNT, whose rows run along the depth and are transposed on the way.
template <class Scalar>
struct MatrixPackets {
  MatrixOperand<Scalar> b;
  bool transposed;

  const Scalar* at(Index k, Index column) const {
    return transposed ? b.data + column * b.stride + k : b.data + k * b.stride + column;
  }
  Panel<Scalar> pack(const Strip& strip, Scalar* buffer) const {
    const Scalar* first = at(strip.k, strip.column);
    if (transposed) {
      return transpose_panel(GatheredRows<Scalar>(first, b.stride, strip.width, strip.depth),
                             buffer);
    }
    return copy_panel(GatheredRows<Scalar>(first, b.stride, strip.depth, strip.width), buffer);
  }
  Panel<Scalar> in_place(const Strip& strip) const {
    const bool whole = !transposed && strip.width == tile_columns<Scalar>;
    return {whole ? at(strip.k, strip.column) : nullptr, b.stride};
  }
  /// Rows of strip_lines each. Transposed, and with few tiles and more lines for each, it is not all
  /// of it.
  Ahead<Scalar> prefetch(const Strip& strip, Index first, Index count) const {
    return {at(strip.k + first, strip.column), b.stride, transposed ? strip.width : count};
  }
};

/// C = A·B: columns in groups whose part of C stays in L2, for each group the depth in blocks, and
/// of each block the strips of columns one after the other.
///
/// A strip's part of B is copied to a panel, by the first tile on the way where it can, and stays
/// in the first-level cache while the tiles of the strip are calculated. Meanwhile they ask for the
/// memory of the next strip, so memory and arithmetic are busy at the same time without any
/// foresight of the processor's own. A second panel, filled between the tiles, would push the first
/// one out of its cache.
template <class Scalar, PacketSource<Scalar> Source>
void multiply_rows(const GemmNN<Scalar, Source>& product) {
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
    constexpr Index piece = strip_lines * cache_line<Scalar>;  // of a row in nt
    const Index pieces = next != nullptr ? (next->depth + piece - 1) / piece : 0;
    const Index each = (pieces + tiles - 1) / tiles * piece;
    Index asked = 0;
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
      Ahead<Scalar> ahead;
      if (next != nullptr && asked < next->depth) {
        ahead = product.b.prefetch(*next, asked, std::min(each, next->depth - asked));
        asked += each;
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

/// The form tn adds at most so many pairs of rows at once, to so many rows of C.
inline constexpr Index pairs_depth = 128;
inline constexpr Index pairs_rows = 128;
/// A strip goes through so many rows of C before the next one: more would not stay in the caches
/// where rows are a power of two apart.
inline constexpr Index pairs_group = 16;

/// The form tn for many pairs of rows: columns of A and strips of B are copied together, and stay
/// in the second-level cache with the part of C that they add to.
template <class Scalar>
void multiply_panels_tn(const GemmTN<Scalar>& product) {
  const GatheredRows<Scalar> a = product.a;
  const GatheredRows<Scalar> b = product.b;
  MatrixView<Scalar> c = product.c;
  const Range rows = product.row_range();
  const Range columns = product.column_range();
  constexpr Index size = packet_size<Scalar>;
  constexpr Index wide = 2 * panel_columns<Scalar>;
  static_assert(pairs_rows % tile_rows == 0);
  alignas(64) Scalar left_columns[to_size(pairs_depth * pairs_rows)];
  alignas(64) Scalar panels[to_size(pairs_depth * wide)];

  // The values that a tile takes from a row of A are neighbours.
  const auto copy_left = [&](Index k, Index depth, Index row, Index height) {
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
  const auto copy_right = [&](Index k, Index depth, Index column, Index width) {
    for_each_strip<Scalar>(0, width, [&](Index at, Index, Index strip_width) {
      copy_panel(b.slice(k, depth).columns(column + at, strip_width), panels + at * depth);
    });
  };

  const Index last = rows.first + rows.count;
  const Index last_column = columns.first + columns.count;
  for_each_tile(a.count(), pairs_depth, [&](Index k, Index depth) {
    const Start from = k == 0 ? product.start : Start::accumulate;
    for (Index row = rows.first; row < last; row += pairs_rows) {
      const Index height = std::min(pairs_rows, last - row);
      copy_left(k, depth, row, height);
      for (Index column = columns.first; column < last_column; column += wide) {
        const Index width = std::min(wide, last_column - column);
        copy_right(k, depth, column, width);
        for (Index group = 0; group < height; group += pairs_group) {
          for_each_strip<Scalar>(0, width, [&](Index at, Index packets, Index strip_width) {
            const Panel<Scalar> panel{panels + at * depth, packets * size};
            const Index end = std::min(height, group + pairs_group);
            for (Index top = group; top < end; top += tile_rows) {
              const Index count = std::min(tile_rows, end - top);
              Left<Scalar> left;
              Scalar* to[to_size(tile_rows)];
              left.step = tile_rows;
              for (Index r = 0; r < count; ++r) {
                left.row[r] = left_columns + top * depth + r;
                to[r] = row_data(c, row + top + r) + column + at;
              }
              // The same columns of the next group, which are far away in memory.
              const Index below = std::clamp<Index>(last - row - top - pairs_group, 0, tile_rows);
              const Ahead<Scalar> ahead{to[0] + pairs_group * c.outerStride(), c.outerStride(),
                                        below};
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

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
