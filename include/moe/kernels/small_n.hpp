#pragma once

#include <algorithm>

#include "moe/kernels/gemm_direct.hpp"

/// \file
/// The product Aᵀ·B with few columns, as that of a gate with few experts.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The largest number of columns of C for which gemm_small_n() is used, if C has at least
/// tile_columns rows.
inline constexpr Index small_n_columns = max_tile_rows;

/// C = Aᵀ·B where C has few columns: computed as Cᵀ = Bᵀ·A in a buffer.
template <class Scalar>
void gemm_small_n(const GemmTN<Scalar>& product) {
  constexpr Index widest = 2 * panel_columns<Scalar>;
  alignas(64) Scalar buffer[to_size(small_n_columns * widest)];
  const Range rows = product.row_range();
  const Range columns = product.column_range();
  const Index end = rows.first + rows.count;
  for (Index first = rows.first; first < end; first += widest) {
    const Index width = std::min(widest, end - first);
    const MatrixView<Scalar> transposed(buffer, columns.count, width, Eigen::OuterStride<>(widest));
    const ScatteredRows<Scalar> in_buffer(buffer, widest, columns.count, width);
    const ScatteredRows<Scalar> in_c =
        ScatteredRows<Scalar>(product.c).slice(first, width).columns(columns.first, columns.count);
    if (product.start == Start::accumulate) transpose_rows(in_c, in_buffer);
    gemm_direct(GemmTN<Scalar>{.a = product.b.columns(columns.first, columns.count),
                               .b = product.a.columns(first, width),
                               .c = transposed,
                               .start = product.start});
    transpose_rows(in_buffer, in_c);
  }
}

}  // namespace moe::detail

MOE_PACKETS_END
