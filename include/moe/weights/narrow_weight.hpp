#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "moe/kernels/bfloat16_rows.hpp"
#include "moe/kernels/gemm_descriptor.hpp"
#include "moe/weights/narrow_matrix.hpp"

namespace moe {

/// How narrow weights are used.
struct NarrowOptions {
  Activations activations = Activations::float32;  ///< int8 only for formats with scales
};

namespace detail {

inline void check_activations(bool scaled, const char* format, Activations activations) {
  require(activations == Activations::float32 || (activations == Activations::int8 && scaled),
          "NarrowOptions.activations = ",
          activations == Activations::int8 ? "int8" : std::to_string(static_cast<int>(activations)),
          ", ", format, scaled ? " has float32 and int8" : " has float32 only");
}

/// A narrow weight, used where a trained network has a Parameter.
template <class Format>
struct NarrowWeight {
  NarrowMatrix<Format> matrix;
  Activations activations = Activations::float32;

  NarrowWeight() = default;
  NarrowWeight(const MatrixRef<float>& weights, std::string_view name, const NarrowOptions& options)
      : NarrowWeight((check_activations(Format::scaled, Format::name, options.activations),
                      NarrowMatrix<Format>(weights, name)),
                     options) {}
  NarrowWeight(NarrowMatrix<Format> packed, const NarrowOptions& options)
      : matrix(std::move(packed)), activations(options.activations) {
    check_activations(Format::scaled, Format::name, activations);
  }
};

template <class Format>
NarrowOperand<Format> operand(const NarrowWeight<Format>& weight) {
  return weight.matrix.operand(weight.activations);
}
/// A narrow weight has no gradient.
template <class Format>
void add_weight_gradient(NarrowWeight<Format>&, const GatheredRows<float>&,
                         const GatheredRows<float>&, Range, Start, Precision) {}
/// Null, for no prefetch by software: the hardware prefetcher follows a packed matrix.
template <class Format>
const float* first_number(const NarrowWeight<Format>&) {
  return nullptr;
}

}  // namespace detail
}  // namespace moe
