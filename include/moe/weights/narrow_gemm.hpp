#pragma once

#include "moe/weights/integer_product.hpp"
#include "moe/weights/narrow_product.hpp"

/// \file
/// gemm_serial(), and with it gemm(), for an operand B of narrow weights. Activations are rounded in A·B
/// only: A·Bᵀ is for gradients.
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

}  // namespace moe::detail
