#pragma once

#include <algorithm>

#include "moe/kernels/blocking.hpp"

/// \file
/// What C holds before the first step of a product, and so after one of depth 0.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// Sets `count` columns of a row of C to their initial values, the bias of row r among them.
template <class Scalar>
void set_initial_values(Start start, const Bias<Scalar>& bias, Index r, Index count, Scalar* row) {
  if (start == Start::zero) std::fill_n(row, count, Scalar{0});
  if (bias.values != nullptr) add_scaled(count, *bias.factors.at(r), bias.values, row);
}

/// The same for C.
template <class Scalar, class B>
void set_initial_values(const GemmNN<Scalar, B>& product) {
  const Range columns = product.column_range();
  const Bias<Scalar> bias = product.bias.at(0, columns.first);
  for (Index r = 0; r < product.c.count(); ++r) {
    set_initial_values(product.start, bias, r, columns.count, product.c.row(r) + columns.first);
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
