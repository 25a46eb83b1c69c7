#pragma once

#include <algorithm>

#include "moe/kernels/blocking.hpp"

/// \file
/// What C holds before the first step of a product, and so after one of depth 0.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// Sets C to its initial values, the bias among them.
template <class Scalar, class B>
void set_initial_values(const GemmNN<Scalar, B>& product) {
  const Range columns = product.column_range();
  for (Index r = 0; r < product.c.count(); ++r) {
    Scalar* row = product.c.row(r) + columns.first;
    const Bias<Scalar> bias = product.bias.at(r, columns.first);
    if (product.start == Start::zero) std::fill_n(row, columns.count, Scalar{0});
    if (bias.values != nullptr) add_scaled(columns.count, *bias.factors.at(0), bias.values, row);
  }
}

/// C = A·B of depth 0. B has no rows then, and the address of such a matrix may be null, to which the other
/// products would add the number of a column.
template <class Scalar, class B>
MOE_NOINLINE void gemm_depth_zero(const GemmNN<Scalar, B>& product) {
  set_initial_values(product);
  call_epilogue<Scalar>(product.epilogue, product.c.count(), product.column_range());
}

}  // namespace moe::detail

MOE_PACKETS_END
