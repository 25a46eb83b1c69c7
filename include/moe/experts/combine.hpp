#pragma once

#include "moe/kernels/simd.hpp"

/// \file
/// From rows grouped by expert back to tokens.

namespace moe::detail {

/// to[i, columns] += weight[i]·rows[i, columns], row by row. A null `weight` stands for ones. Row i
/// of `to` is the token of slot i, so calls for one expert after the other add up the slots of a
/// token in the order of the experts. O(rows·columns).
template <class Scalar>
void combine(const GatheredRows<Scalar>& rows, const Scalar* weight, Index first_column,
             Index columns, const ScatteredRows<Scalar>& to) {
  MOE_ASSERT(rows.count() == to.count());
  for (Index i = 0; i < rows.count(); ++i) {
    add_scaled(columns, weight != nullptr ? weight[i] : Scalar{1}, rows.row(i) + first_column,
               to.row(i) + first_column);
  }
}

}  // namespace moe::detail
