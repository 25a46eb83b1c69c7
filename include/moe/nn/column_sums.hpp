#pragma once

#include "moe/kernels/gemm.hpp"

namespace moe::detail {

/// sums[0, j] += Σ_i rows[i, j], i ascending: the gradient of a bias, parallel over columns.
template <class Scalar>
void add_column_sums(const GatheredRows<Scalar>& rows, Matrix<Scalar>& sums) {
  MOE_ASSERT(sums.rows() == 1 && sums.cols() == rows.width());
  for_each_block(1, rows.width(), rows.count(), 2 * panel_columns<Scalar>,
                 [&](Index, Index, Index column, Index columns) {
                   add_scaled_rows(rows.columns(column, columns), {}, sums.data() + column);
                 });
}

}  // namespace moe::detail
