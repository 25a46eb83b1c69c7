#pragma once

#include <algorithm>

#include "moe/parallel.hpp"
#include "moe/random.hpp"

/// \file
/// Switch Transformer's noise: the gate's input is multiplied by factors near 1 in training.

namespace moe::detail {

/// factor (T x D) uniform in [1 - size, 1 + size), keyed by (seed, step, token, column), and
/// jittered = x ⊙ factor: the noise of Switch Transformer's gate [F22 app. C, cited in
/// capacity.hpp].
template <class Scalar>
void jitter_input(double size, std::uint64_t seed, const NoiseKey& key, const MatrixRef<Scalar>& x,
                  Matrix<Scalar>& factor, Matrix<Scalar>& jittered) {
  const Index width = x.cols();
  resize(factor, x.rows(), width);
  resize(jittered, x.rows(), width);
  parallel_for_blocks(x.rows(), 64, function_work(x.size()), [&](Index first, Index count) {
    for (Index t = first; t < first + count; ++t) {
      for (Index d = 0; d < width; d += 4) {
        const auto words = noise_words(seed, key, t, d / 4);
        for (Index i = d; i < std::min(d + 4, width); ++i) {
          const auto unit = static_cast<Scalar>(uniform(words[to_size(i - d)]));
          factor(t, i) = Scalar{1} + static_cast<Scalar>(size) * (Scalar{2} * unit - Scalar{1});
          jittered(t, i) = x(t, i) * factor(t, i);
        }
      }
    }
  });
}

/// dx += djittered ⊙ factor.
template <class Scalar>
void jitter_input_backward(const Matrix<Scalar>& factor, const Matrix<Scalar>& djittered,
                           Matrix<Scalar>& dx) {
  parallel_for_blocks(dx.rows(), 64, element_work(dx.size()), [&](Index first, Index count) {
    dx.middleRows(first, count).array() +=
        djittered.middleRows(first, count).array() * factor.middleRows(first, count).array();
  });
}

}  // namespace moe::detail
