#pragma once

#include <algorithm>
#include <cstdint>

#include "moe/kernels/micro_kernel.hpp"

/// \file
/// The tiles of products that read their large operand sequentially. The tiles prefetch that
/// operand, since the hardware prefetcher stops at the end of a page of memory.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// How far ahead of a column multiply_direct() prefetches: `distance` columns, and where that passes
/// column `last`, `beyond` more.
struct ColumnPrefetch {
  Index distance = 0;
  Index last = 0;
  Index beyond = 0;
  Index at(Index column) const { return column + distance < last ? distance : distance + beyond; }
};

/// The right operand of multiply_direct(): `steps` rows, in place and `stride` apart, or packed as
/// strips (copy_strips()).
template <class Scalar>
struct DirectB {
  const Scalar* data;
  Index stride;
  Index steps;
  ColumnPrefetch prefetch{};
  ColumnPrefetch prefetch_c{};  ///< of the rows of C, where those come from memory
  bool packed = false;
  bool cached = false;       ///< in place, but another tile has read it before
  Scalar* strips = nullptr;  ///< where a tile of tile_rows rows packs what it reads in place

  static DirectB of_strips(const Scalar* strips, Index steps) {
    return {.data = strips, .stride = tile_columns<Scalar>, .steps = steps, .packed = true};
  }
  /// The offset of a column in the first row of the strips.
  Index offset_in_strips(Index column) const {
    const Index in_strip = column % tile_columns<Scalar>;
    return (column - in_strip) * steps + in_strip;
  }
  const Scalar* at(Index column) const {
    return data + (packed ? offset_in_strips(column) : column);
  }
};

/// One tile of multiply_direct(): R rows of C, V packets of columns.
template <Index R, Index V, bool packs, class Scalar>
EIGEN_ALWAYS_INLINE void direct_tile(const Scalar* const (&left)[to_size(R)], Index step,
                                     const DirectB<Scalar>& right, Index column, Start start,
                                     const Bias<Scalar>& bias, Scalar* const (&c)[to_size(R)]) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index lines = (V * size + cache_line<Scalar> - 1) / cache_line<Scalar>;
  Packet<Scalar> sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) {
    const Index at = column + i % V * size;
    sum[i / V][i % V] = start == Start::accumulate ? load(c[i / V] + at) : broadcast(Scalar{0});
  }
  add_bias(bias.at(0, column), sum);
  if (right.prefetch_c.distance != 0) {
    const Index ahead = right.prefetch_c.at(column);
    MOE_UNROLL
    for (Index r = 0; r < R; ++r) prefetch_far<lines>(c[r] + column, ahead);
  }
  const Index ahead = right.prefetch.at(column);
  const Index stride = right.stride;
  const Index end = right.steps * step;
  const Scalar* b = right.at(column);
  [[maybe_unused]] Scalar* strip = packs ? right.strips + right.offset_in_strips(column) : nullptr;
  for (Index at = 0; at < end; at += step, b += stride) {
    prefetch_far<lines>(b, ahead);
    add_products<packs>(left, at, b, sum, strip);
    if constexpr (packs) strip += tile_columns<Scalar>;
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) store(c[i / V] + column + i % V * size, sum[i / V][i % V]);
}

/// R rows of C += left[r][k]·right[k, :] for the whole packets of `columns`, the rows of `right`
/// being read side by side from one end to the other. Returns the number of columns computed.
template <Index R, bool packs, class Scalar>
MOE_NOINLINE Index multiply_direct(const Left<Scalar>& left, const DirectB<Scalar>& right,
                                   Index columns, Start start, const Bias<Scalar>& bias,
                                   Scalar* const* c) {
  constexpr Index size = packet_size<Scalar>;
  const Scalar* a[to_size(R)];
  Scalar* out[to_size(R)];
  std::copy_n(left.row, R, a);
  std::copy_n(c, R, out);
  Index column = 0;
  // A tile that begins in the middle of a cache line would leave half of each line to the next
  // tile, which may not find it in L1 any more: rows a power of two apart compete for the same few
  // sets.
  if constexpr (!l2_feeds_tiles && !packs) {
    constexpr std::uintptr_t tile_bytes = sizeof(Scalar) * to_size(tile_columns<Scalar>);
    const bool in_middle =
        reinterpret_cast<std::uintptr_t>(right.data) % tile_bytes == tile_bytes / 2;
    if (!right.packed && in_middle && columns >= size) {
      direct_tile<R, 1, packs>(a, left.step, right, column, start, bias, out);
      column += size;
    }
  }
  // With one or two rows, a tile as wide as a strip has too few independent chains. Where B comes
  // from memory more chains gain nothing, and the tile would wait for twice as many cache lines at
  // once.
  if constexpr (!l2_feeds_tiles && R <= 2) {
    constexpr Index V = 2 * tile_packets;
    for (; right.cached && column + V * size <= columns; column += V * size) {
      direct_tile<R, V, packs>(a, left.step, right, column, start, bias, out);
    }
  }
  for (; column + tile_packets * size <= columns; column += tile_packets * size) {
    direct_tile<R, tile_packets, packs>(a, left.step, right, column, start, bias, out);
  }
  // Tiles of two packets, where a strip has three, would be little faster, and compiling would take
  // half as long again.
  for (; column + size <= columns; column += size) {
    direct_tile<R, 1, packs>(a, left.step, right, column, start, bias, out);
  }
  return column;
}

/// The last columns of C, fewer than a packet. `right` has these columns as half a packet or a
/// whole one, with any values beyond `width`. A partial tile is computed in a buffer, its last row
/// repeated in place of the missing rows, since the tile is compiled for one height only.
template <class Scalar>
void multiply_remainder(Index rows, const Left<Scalar>& left, Panel<Scalar> right, Index depth,
                        Index width, Start start, const Bias<Scalar>& bias, Scalar* const* c) {
  constexpr Index half = half_packet_size<Scalar>;
  const auto run = [&](const Left<Scalar>& a, Start from, const Bias<Scalar>& initial,
                       Scalar* const* to) {
    if (width <= half) {
      multiply_tile<HalfPacket<Scalar>, tile_rows, 1>(a, right, depth, from, initial, to, {});
    } else {
      multiply_tile<Packet<Scalar>, tile_rows, 1>(a, right, depth, from, initial, to, {});
    }
  };
  if (rows == tile_rows && width == half) return run(left, start, bias, c);

  Left<Scalar> a;
  a.step = left.step;
  for (Index r = 0; r < tile_rows; ++r) a.row[r] = left.row[std::min(r, rows - 1)];
  compute_beside(rows, width, start, bias, c,
                 [&](Scalar* const* to) { run(a, Start::accumulate, {}, to); });
}

/// multiply_direct<R>() for 1 to direct_rows rows, known at run time, and for all columns: `rest`
/// holds the last columns of `right`, which do not fill a packet. With more than tile_rows rows
/// there must be no such columns.
template <class Scalar>
void multiply_direct(Index rows, const Left<Scalar>& left, const DirectB<Scalar>& right,
                     Index columns, Panel<Scalar> rest, Start start, const Bias<Scalar>& bias,
                     Scalar* const* c) {
  Index done = 0;
  with_constant<direct_rows>(rows, [&](auto R) {
    if constexpr (!l2_feeds_tiles && R == tile_rows) {
      if (right.strips != nullptr) {
        done = multiply_direct<R, true>(left, right, columns, start, bias, c);
        return;
      }
    }
    done = multiply_direct<R, false>(left, right, columns, start, bias, c);
  });
  if (done == columns) return;
  MOE_ASSERT(rows <= tile_rows);
  Scalar* to[to_size(tile_rows)];
  for (Index r = 0; r < rows; ++r) to[r] = c[r] + done;
  multiply_remainder(rows, left, rest, right.steps, columns - done, start, bias.at(0, done), to);
}

/// tile (R x V packets, rows tile_columns apart) = R rows of B, `stride` apart, times V packets of
/// the columns of a panel, from zero or added to the tile. If there are only `height` rows, the last
/// is repeated in place of the others. Each row is prefetched `ahead` elements ahead.
template <class P, Index R, Index V, class Scalar>
MOE_NOINLINE void transposed_tile(const Scalar* b, Index stride, Index height, Panel<Scalar> panel,
                                  Index depth, bool from_zero, Index ahead, Scalar* tile) {
  using namespace Eigen::internal;
  constexpr Index size = unpacket_traits<P>::size;
  const Scalar* row[to_size(R)];
  MOE_UNROLL
  for (Index r = 0; r < R; ++r) row[r] = b + std::min(r, height - 1) * stride;
  P sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) {
    const Scalar* held = tile + i / V * tile_columns<Scalar> + i % V * size;
    sum[i / V][i % V] = from_zero ? pset1<P>(Scalar{0}) : ploadu<P>(held);
  }
  const Scalar* right = panel.data;
  for (Index k = 0; k < depth;) {
    if (ahead != 0) {
      MOE_UNROLL
      for (Index r = 0; r < R; ++r) prefetch_far<1>(row[r] + k, ahead);
    }
    const Index pause = std::min(depth, k + cache_line<Scalar>);
    for (; k < pause; ++k, right += panel.stride) add_products(row, k, right, sum);
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) {
    pstoreu(tile + i / V * tile_columns<Scalar> + i % V * size, sum[i / V][i % V]);
  }
}

}  // namespace moe::detail

MOE_PACKETS_END
