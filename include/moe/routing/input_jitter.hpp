#pragma once

#include <algorithm>

#include "moe/parallel.hpp"
#include "moe/random.hpp"
#include "moe/routing/pass.hpp"

/// \file
/// Switch Transformer's noise: the gate's input is multiplied by factors near 1 in training.

namespace moe::detail {

/// The noise of Switch Transformer's gate [F22 app. C, cited in capacity.hpp]: factor (N x D) =
/// 1 + size·u and jittered = x ⊙ factor over the N tokens of x. u is uniform in [-1, 1), keyed by
/// (seed, step, first_token + row of x, column), or given; `size` is the gate's times
/// Pass::noise_factor.
template <class Scalar>
void jitter_input(double size, std::uint64_t seed, const NoiseSource& noise,
                  const ValidTokens& tokens, const MatrixRef<Scalar>& x, Matrix<Scalar>& factor,
                  Matrix<Scalar>& jittered) {
  const Index width = x.cols();
  resize(factor, tokens.count, width);
  resize(jittered, tokens.count, width);
  if (size == 0) {
    factor.setOnes();
    for (Index t = 0; t < tokens.count; ++t) jittered.row(t) = x.row(tokens.row_of(t));
    return;
  }
  const Work work = function_work(factor.size());
  parallel_for_blocks(tokens.count, 64, work, [&](Index first, Index count) {
    for (Index t = first; t < first + count; ++t) {
      const Index row = tokens.row_of(t);
      for (Index d = 0; d < width; d += 4) {
        const auto words = noise_words(seed, noise.key, row, d / 4);
        for (Index i = d; i < std::min(d + 4, width); ++i) {
          const auto drawn = static_cast<Scalar>(uniform(words[to_size(i - d)]));
          const Scalar u = noise.given == nullptr
                               ? Scalar{2} * drawn - Scalar{1}
                               : static_cast<Scalar>(noise.given[row * noise.stride + i]);
          factor(t, i) = Scalar{1} + static_cast<Scalar>(size) * u;
          jittered(t, i) = x(row, i) * factor(t, i);
        }
      }
    }
  });
}

/// dx += djittered ⊙ factor, dx being N rows.
template <class Scalar>
void jitter_input_backward(const Matrix<Scalar>& factor, const Matrix<Scalar>& djittered,
                           const ScatteredRows<Scalar>& dx) {
  parallel_for_blocks(dx.count(), 64, element_work(factor.size()), [&](Index first, Index count) {
    for (Index t = first; t < first + count; ++t) {
      Scalar* to = dx.row(t);
      for (Index i = 0; i < dx.width(); ++i) to[i] += djittered(t, i) * factor(t, i);
    }
  });
}

}  // namespace moe::detail
