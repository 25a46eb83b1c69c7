#pragma once

#include "moe/kernels/gemm.hpp"

namespace moe::detail {

/// sums[0, j] += Σ_i rows[i, j], i ascending: the gradient of a bias. As a product with a column of
/// ones (a single one that every row shares) it is parallel over columns and keeps its bits.
template <class Scalar>
void add_column_sums(const GatheredRows<Scalar>& rows, Matrix<Scalar>& sums) {
  const Scalar one{1};
  product_tn(GatheredRows<Scalar>(&one, 0, rows.count(), 1), rows, view(sums));
}

}  // namespace moe::detail
