#pragma once

#include <algorithm>

#include "moe/kernels/gemm_direct.hpp"

/// \file
/// The product A·Bᵀ with a small depth, as that of a gate with few experts.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The largest depth for which gemm_small_k() is used, if there are at least two tiles of rows.
inline constexpr Index small_k_depth = 64;

/// C = A·Bᵀ for a small depth: packing Bᵀ costs less than transposing tiles of C, a cost that a
/// small depth spreads over few steps.
template <class Scalar>
void gemm_small_k(const GemmNT<Scalar>& product) {
  constexpr Index widest = panel_columns<Scalar>;
  alignas(64) Scalar buffer[to_size(small_k_depth * widest)];
  const Index depth = product.a.width();
  const Range columns = product.column_range();
  const Index end = columns.first + columns.count;
  for (Index first = columns.first; first < end; first += widest) {
    const Index width = std::min(widest, end - first);
    copy_transposed(GatheredRows<Scalar>(product.b.row(first), product.b.stride, width, depth),
                    width, buffer);
    const PartEpilogue epilogue{product.epilogue, 0, first};
    gemm_direct(GemmNN<Scalar>{.a = product.a,
                               .b = {buffer, depth, width, width},
                               .c = product.c.columns(first, width),
                               .start = product.start,
                               .epilogue = epilogue.get()});
  }
}

}  // namespace moe::detail

MOE_PACKETS_END
