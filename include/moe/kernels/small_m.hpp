#pragma once

#include <algorithm>

#include "moe/kernels/initial_values.hpp"
#include "moe/kernels/pack.hpp"

/// \file
/// Products with few rows of A, which take as long as reading B once.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The largest M for which reading B sequentially is fastest. For more rows, reading several rows of
/// B side by side passes over C less often.
inline constexpr Index small_m_rows = l2_feeds_tiles ? 5 : 4;

/// Packets of a tile: few enough for the registers, and a divisor of most widths.
inline constexpr Index small_m_packets = l2_feeds_tiles ? 4 : 2;

/// The first element of B that gemm_small_m() prefetches, a `block` of elements at a time: about
/// `ahead` elements ahead, such that the end of B is the end of a block.
constexpr Index first_prefetched(Index block, Index end, Index ahead) {
  return std::min(end, block + ahead / block * block + end % block);
}

/// Rows of B that gemm_small_m() reads side by side for a number of rows of A: just enough that
/// reading and writing C, which is in L1, takes less time than reading B from memory.
constexpr Index small_m_steps(Index rows) { return rows <= 2 ? 1 : rows <= 4 ? 2 : 4; }

/// One tile of gemm_small_m(): R rows of C += `steps` rows of B. The elements from
/// `ahead + further` on are prefetched.
template <Index R, class Scalar>
EIGEN_ALWAYS_INLINE void small_m_tile(const Scalar* const (&left)[to_size(R)], const Scalar* b,
                                      Index stride, Index steps, const Scalar* ahead, Index further,
                                      Index column, Scalar* const (&c)[to_size(R)]) {
  constexpr Index V = small_m_packets;
  constexpr Index size = packet_size<Scalar>;
  // The hardware prefetcher fetches most of B where its rows are read one after the other, and more
  // prefetches than one in four lines would take the line fill buffers from it.
  constexpr Index tile_lines = (V * size + cache_line<Scalar> - 1) / cache_line<Scalar>;
  constexpr Index lines = small_m_steps(R) > 1 ? tile_lines : tile_lines / 4;
  Packet<Scalar> sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) sum[i / V][i % V] = load(c[i / V] + column + i % V * size);
  b += column;
  for (Index k = 0; k < steps; ++k, b += stride, further += V * size) {
    if constexpr (lines > 0) prefetch_far<lines>(ahead, further);
    add_products(left, k, b, sum);
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) store(c[i / V] + column + i % V * size, sum[i / V][i % V]);
}

/// R rows of C += a[r][k]·b[k, :], where the rows of B are whole tiles and contiguous, so that all of
/// it is read and prefetched sequentially, and after its end the start of `next_b`.
template <Index R, class Scalar>
MOE_NOINLINE void gemm_small_m(const Scalar* const* a, const MatrixOperand<Scalar>& b,
                               Scalar* const* c, const Scalar* next_b) {
  constexpr Index width = small_m_packets * packet_size<Scalar>;
  constexpr Index side_by_side = small_m_steps(R);
  constexpr Index ahead = (Index{8} << 10) / static_cast<Index>(sizeof(Scalar));
  const Scalar* row[to_size(R)];
  Scalar* out[to_size(R)];
  std::copy_n(a, R, row);
  std::copy_n(c, R, out);
  const Index columns = b.columns;
  const Index block = side_by_side * columns;
  const Index end = b.rows * columns;
  Index prefetched = first_prefetched(block, end, ahead);
  for (Index at = 0; at < end; at += block, prefetched += block) {
    const Index steps = side_by_side == 1 ? 1 : std::min(side_by_side, (end - at) / columns);
    const Scalar* place = b.data + at;
    const bool is_in_next = prefetched >= end && next_b != nullptr;
    const Scalar* from = is_in_next ? next_b : place;
    // If nothing is left to prefetch, the address is one that is read anyway.
    Index further = is_in_next ? prefetched - end : prefetched < end ? prefetched - at : 0;
    for (Index column = 0; column < columns; column += width) {
      small_m_tile<R>(row, place, columns, steps, from, further, column, out);
      further += steps * width;
    }
    for (const Scalar*& r : row) r += steps;
  }
}

/// Whether gemm_small_m() is used for a number of rows of A and all columns of B, whose rows are
/// `stride` apart: for few rows of A, and short, contiguous rows of B that are whole tiles. Where
/// rows of B are longer than a page of memory, reading eight side by side is as fast in large pages
/// and faster in small ones.
template <class Scalar>
constexpr bool is_small_m(Index rows, Index columns, Index stride) {
  return rows <= small_m_rows && columns == stride && columns > 0 &&
         columns % (small_m_packets * packet_size<Scalar>) == 0 &&
         stride <= 64 * cache_line<Scalar>;
}

/// C = A·B for all columns of B, where is_small_m().
template <class Scalar>
void gemm_small_m(const GemmNN<Scalar>& product) {
  const MatrixOperand<Scalar>& b = product.b;
  const Scalar* from[to_size(small_m_rows)];
  Scalar* to[to_size(small_m_rows)];
  set_initial_values(product);
  for (Index r = 0; r < product.a.count(); ++r) {
    from[r] = product.a.row(r);
    to[r] = product.c.row(r);
  }
  with_constant<small_m_rows>(product.a.count(),
                              [&](auto R) { gemm_small_m<R>(from, b, to, product.prefetch_next); });
  call_epilogue<Scalar>(product.epilogue, product.a.count(), product.column_range());
}

}  // namespace moe::detail

MOE_PACKETS_END
