#pragma once

#include <algorithm>

#include "moe/kernels/blocking.hpp"
#include "moe/kernels/pack.hpp"

/// \file
/// C = A·B of some tiles of rows with 16 registers, whose tiles are too small to read B from L2 in place:
/// the first tile of rows reads a strip of B in place and leaves it in L1 as a panel for the others.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// Whether gemm_strips() is the fastest for a number of rows of A. For two tiles of rows, packing costs
/// as much as it gains. For many rows, what a strip needs of A and C comes from L2 or memory each time,
/// while a tile of gemm_direct() has its rows of A in L1 for a whole slice of B.
constexpr bool is_for_strips(Index rows) { return rows > 2 * tile_rows && rows <= 64; }

/// The largest depth of a panel of gemm_strips(): 16 KiB with AVX2, half of L1. With less, C would be
/// read and written more often.
inline constexpr Index strip_steps = 256;

/// The columns of B that gemm_strips() prefetches of a row at a time: four cache lines, since memory
/// is slower with shorter pieces.
template <class Scalar>
inline constexpr Index piece_columns = 4 * cache_line<Scalar>;

/// Some rows of piece_columns, of which a tile prefetches one every `every` steps.
template <class Scalar>
struct Pieces {
  const Scalar* address = nullptr;
  Index stride = 0;
  Index count = 0;
  Index every = 1;

  /// Takes at most `share` of these away.
  Pieces take(Index share) {
    Pieces taken = *this;
    taken.count = std::min(share, count);
    address = prefetched_after(address, taken.count * stride);
    count -= taken.count;
    return taken;
  }
};

/// One tile of gemm_strips(): R rows of C, V packets of columns. If it `packs`, it stores what it reads
/// of B in the panel. A tile that prefetched its pieces at once would wait for them, since they
/// take the few line fill buffers of L1.
template <Index R, Index V, bool packs, class Scalar>
MOE_NOINLINE void strip_tile(const Left<Scalar>& left, Panel<Scalar> right, Index depth,
                             Start start, const Bias<Scalar>& bias, Scalar* const* c,
                             Pieces<Scalar> ahead, [[maybe_unused]] Scalar* panel) {
  constexpr Index size = packet_size<Scalar>;
  const Scalar* row[to_size(R)];
  Scalar* to[to_size(R)];
  std::copy_n(left.row, R, row);
  std::copy_n(c, R, to);
  Packet<Scalar> sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) {
    sum[i / V][i % V] =
        start == Start::accumulate ? load(to[i / V] + i % V * size) : broadcast(Scalar{0});
  }
  add_bias(bias, sum);
  const Scalar* b = right.data;
  for (Index k = 0; k < depth;) {
    Index pause = depth;
    if (ahead.count > 0) {
      // By the last element of each line: if rows begin in the middle of a line, the first half
      // line of a piece is in the last line of the piece before.
      prefetch_far<piece_columns<Scalar> / cache_line<Scalar>>(ahead.address,
                                                               cache_line<Scalar> - 1);
      ahead.address = prefetched_after(ahead.address, ahead.stride);
      --ahead.count;
      pause = std::min(depth, k + ahead.every);
    }
    for (; k < pause; ++k, b += right.stride) {
      add_products<packs>(row, k, b, sum, panel);
      if constexpr (packs) panel += tile_columns<Scalar>;
    }
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) store(to[i / V] + i % V * size, sum[i / V][i % V]);
}

/// strip_tile() of the `width` columns of a strip, where `rows` is known at run time. A strip that is
/// narrower than a tile is in the panel already, padded with zeros.
template <class Scalar>
void strip_tile(Index rows, Index width, bool packs, const Left<Scalar>& left, Panel<Scalar> right,
                Index depth, Start start, const Bias<Scalar>& bias, Scalar* const* c,
                const Pieces<Scalar>& ahead, Scalar* panel) {
  const auto run = [&](Start from, const Bias<Scalar>& initial, Scalar* const* to) {
    with_constant<tile_rows>(rows, [&](auto R) {
      if (packs) {
        strip_tile<R, tile_packets, true>(left, right, depth, from, initial, to, ahead, panel);
      } else if (width > packet_size<Scalar>) {
        strip_tile<R, tile_packets, false>(left, right, depth, from, initial, to, ahead, panel);
      } else {
        strip_tile<R, 1, false>(left, right, depth, from, initial, to, ahead, panel);
      }
    });
  };
  if (width == tile_columns<Scalar> || width == packet_size<Scalar>) return run(start, bias, c);

  compute_beside(rows, width, start, bias, c,
                 [&](Scalar* const* to) { run(Start::accumulate, {}, to); });
}

/// C = A·B with strips of B as panels in L1, one after the other: columns in groups whose part of C stays
/// in L2, for each group the depth in blocks, and in each block one strip after the other. While the tiles
/// of some strips are computed, they prefetch the strips after those, each tile the same share. The depth is at
/// least 1.
template <class Scalar>
void gemm_strips(const GemmNN<Scalar>& product) {
  constexpr Index strip = tile_columns<Scalar>;
  constexpr Index piece = piece_columns<Scalar>;
  static_assert(piece % strip == 0);
  alignas(64) Scalar panel[to_size(strip_steps * strip)];
  const GatheredRows<Scalar>& a = product.a;
  const MatrixOperand<Scalar>& b = product.b;
  const ScatteredRows<Scalar>& c = product.c;
  const Range columns = product.column_range();
  const Index rows = a.count();
  const Index depth = a.width();
  const Index end = columns.first + columns.count;
  const Index blocks = (depth + strip_steps - 1) / strip_steps;
  const Index steps = (depth + blocks - 1) / blocks;
  const Index tiles = (rows + tile_rows - 1) / tile_rows;
  const Index group = std::max<Index>(1, cached_elements<Scalar> / (rows * piece)) * piece;

  // All tiles of columns [column, last), at most piece columns, and steps [k, k + count).
  const auto run = [&](Index column, Index last, Index k, Index count, Pieces<Scalar> ahead) {
    const Start from = k == 0 ? product.start : Start::accumulate;
    const Index calls = tiles * ((last - column + strip - 1) / strip);
    const Index share = (ahead.count + calls - 1) / calls;
    ahead.every = std::max<Index>(1, count / std::max<Index>(1, share));
    const Index first_column = column;
    for (; column < last; column += strip) {
      const Index width = std::min(strip, last - column);
      const Panel<Scalar> in_place{b.row(k) + column, b.stride};
      if (width < strip) {
        copy_rows(GatheredRows<Scalar>(in_place.data, b.stride, count, width), strip, panel);
      }
      for_each_tile(rows, tile_rows, [&](Index first, Index height) {
        Left<Scalar> left;
        Scalar* to[to_size(tile_rows)];
        for (Index r = 0; r < height; ++r) {
          left.row[r] = a.row(first + r) + k;
          to[r] = c.row(first + r) + column;
        }
        // C comes from memory in the first block only. Its rows are far apart, so a tile of the
        // first strip prefetches, for all strips, the rows of C of the next tile.
        if (k == 0 && column == first_column) {
          const bool is_last = first + height == rows;
          const Index from_row = is_last ? 0 : first + height;
          const Index at = is_last ? first_column + piece : column;
          for (Index r = from_row; at < end && r < std::min(from_row + height, rows); ++r) {
            prefetch_far<piece / cache_line<Scalar>>(c.row(r) + at, cache_line<Scalar> - 1);
          }
        }
        const bool packs = first == 0 && width == strip;
        strip_tile(height, width, packs, left, packs ? in_place : Panel<Scalar>{panel, strip},
                   count, from, k == 0 ? product.bias.at(first, column) : Bias<Scalar>{}, to,
                   ahead.take(share), panel);
        if (product.epilogue && k + count == depth) product.epilogue(first, height, column, width);
      });
    }
  };

  for (Index first = columns.first; first < end; first += group) {
    const Index last = std::min(end, first + group);
    for (Index k = 0; k < depth; k += steps) {
      const Index count = std::min(steps, depth - k);
      for (Index column = first; column < last; column += piece) {
        Pieces<Scalar> ahead{.stride = b.stride, .count = std::min(steps, depth)};
        if (column + piece < last) {
          ahead.address = b.row(k) + column + piece;
          ahead.count = count;
        } else if (k + steps < depth) {
          ahead.address = b.row(k + steps) + first;
          ahead.count = std::min(steps, depth - k - steps);
        } else if (last < end) {
          ahead.address = b.data + last;
        } else if (product.prefetch_next != nullptr) {
          ahead.address = prefetched_after(product.prefetch_next, columns.first);
        } else {
          ahead.count = 0;
        }
        run(column, std::min(last, column + piece), k, count, ahead);
      }
    }
  }
}

}  // namespace moe::detail

MOE_PACKETS_END
