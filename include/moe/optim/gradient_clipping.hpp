#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

#include "moe/kernels/simd.hpp"
#include "moe/optim/parameter_blocks.hpp"

namespace moe {

namespace detail {

/// Σ x[i]² in double, in which the square of a float neither overflows nor underflows.
template <class Scalar>
double squared_norm(Index count, const Scalar* x) {
  if constexpr (std::is_same_v<Scalar, double>) {
    return dot(count, x, x);
  } else {
    constexpr Index chunk = 512;
    double wide[chunk];
    double sum = 0;
    for (Index i = 0; i < count; i += chunk) {
      const Index size = std::min(chunk, count - i);
      std::copy_n(x + i, size, wide);
      sum += dot(size, wide, wide);
    }
    return sum;
  }
}

template <class Module>
void scale_gradients(Module& module, double scale, Updates updates) {
  for_each_parameter_block(
      module, updates,
      [&]<class Scalar>(Index, Index, Parameter<Scalar>& parameter, Index first, Index count) {
        const auto factor = static_cast<Scalar>(scale);
        Scalar* g = parameter.stored.memory.data() + first;
        for (Index i = 0; i < count; ++i) g[i] *= factor;
      });
}

}  // namespace detail

/// The Euclidean norm of all gradients of a module together. Dense and lazy give the same bits. Does not
/// allocate.
template <class Module>
double gradient_norm(const Module& module, Updates updates = Updates::dense) {
  std::array<double, detail::optimizer_lanes> partial{};
  detail::for_each_parameter_block(
      module, updates, [&](Index lane, Index, const auto& parameter, Index first, Index count) {
        partial[detail::to_size(lane)] +=
            detail::squared_norm(count, parameter.stored.memory.data() + first);
      });
  double sum = 0;
  for (const double part : partial) sum += part;
  return std::sqrt(sum);
}

/// Scales all gradients of a module by one factor so that their norm is at most `max_norm`, and
/// returns the norm they had before. Dense and lazy give the same bits.
/// R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks",
/// ICML 2013.
///
/// If the norm is not finite, it is returned and the gradients are not changed, so that the caller can
/// skip the update. Throws std::invalid_argument unless max_norm > 0.
template <class Module>
double clip_gradients(Module& module, double max_norm, Updates updates = Updates::dense) {
  detail::require(max_norm > 0, "clip_gradients: max_norm = ", max_norm, ", must be above 0");
  const double norm = gradient_norm(module, updates);
  if (!std::isfinite(norm) || norm <= max_norm) return norm;
  detail::scale_gradients(module, max_norm / norm, updates);
  return norm;
}

}  // namespace moe
