#pragma once

#include "moe/kernels/activations.hpp"
#include "moe/parallel.hpp"

/// \file
/// The activation of a layer's weighted sum: a sigmoid in [S17 App. C.1].

namespace moe::detail {

/// y = act(sum), both T x D.
template <class Scalar>
void activate_output(Activation activation, const Matrix<Scalar>& sum, Matrix<Scalar>& y) {
  resize(y, sum.rows(), sum.cols());
  parallel_for_blocks(sum.size(), Index{1} << 14, function_work(sum.size()),
                      [&](Index first, Index count) {
                        activate(activation, count, sum.data() + first, y.data() + first);
                      });
}

/// The gradient with respect to the sum, dy ⊙ act'(sum): dy itself without an activation, else in
/// `dsum`.
template <class Scalar>
MatrixRef<Scalar> activate_output_backward(Activation activation, const Matrix<Scalar>& sum,
                                           const MatrixRef<Scalar>& dy, Matrix<Scalar>& dsum) {
  if (activation == Activation::identity) return dy;
  copy_matrix(dy, dsum);
  parallel_for_blocks(dsum.size(), Index{1} << 14, function_work(dsum.size()),
                      [&](Index first, Index count) {
                        Scalar* d = dsum.data() + first;
                        activate_backward(activation, count, sum.data() + first, d, d);
                      });
  return dsum;
}

}  // namespace moe::detail
