#pragma once

#include "moe/kernels/gemm.hpp"

/// \file
/// The gradient of a bias.

namespace moe::detail {

/// sums[0, j] += Σ_i factor[i]·rows[i, j], parallel over columns.
template <class Scalar>
void add_column_sums(const GatheredRows<Scalar>& rows, Matrix<Scalar>& sums,
                     const RowFactors<Scalar>& factors = {}) {
  MOE_ASSERT(sums.rows() == 1 && sums.cols() == rows.width());
  for_each_block({0, 1}, {0, rows.width()}, rows.count(), 2 * panel_columns<Scalar>,
                 [&](Range, Range columns) {
                   add_many_scaled_rows(rows.columns(columns.first, columns.count), factors,
                                        sums.data() + columns.first);
                 });
}

}  // namespace moe::detail
