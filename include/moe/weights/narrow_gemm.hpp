#pragma once

#include "moe/weights/integer_product.hpp"
#include "moe/weights/narrow_product.hpp"

/// \file
/// gemm() and gemm_serial() with a B of narrow weights, by its operand().
///
///     gemm(GemmNN<float, NarrowOperand<Int8>>{.a = x, .b = weight.operand(), .c = y});

namespace moe::detail {

/// C = A·B on the calling thread.
template <class Format>
void gemm_serial(const GemmNN<float, NarrowOperand<Format>>& product) {
  if (product.a.count() == 0 || product.column_range().count == 0) return;
  if constexpr (Format::scaled) {
    if (product.b.activations == Activations::int8) return gemm_integer(product);
  }
  MOE_ASSERT(product.b.activations == Activations::float32);
  gemm_widening(product);
}

/// C = A·B on all workers.
template <class Format>
void gemm(const GemmNN<float, NarrowOperand<Format>>& product) {
  MOE_ASSERT(product.a.width() == product.b.rows && product.c.count() == product.a.count() &&
             product.c.width() == product.b.columns);
  for_each_block({0, product.c.count()}, product.column_range(), product.a.width(),
                 2 * panel_columns<float>,
                 [&](Range rows, Range columns) { gemm_block(product, rows, columns); });
}

/// C = A·Bᵀ on all workers. Activations are not rounded: this is for gradients.
template <class Format>
void gemm(const GemmNT<float, NarrowOperand<Format>>& product) {
  MOE_ASSERT(product.a.width() == product.b.columns && product.c.count() == product.a.count() &&
             product.c.width() == product.b.rows);
  for_each_block({0, product.c.count()}, product.column_range(), product.a.width(),
                 panel_columns<float>,
                 [&](Range rows, Range columns) { gemm_block(product, rows, columns); });
}

}  // namespace moe::detail
