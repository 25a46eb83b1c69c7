#pragma once

#include "moe/kernels/gemm.hpp"
#include "moe/kernels/softmax.hpp"
#include "moe/parameter.hpp"

/// \file
/// Scores of experts: a linear map of the token, and a softmax over all experts.

namespace moe::detail {

/// scores = x·W, x being T x D and W D x E.
template <class Scalar>
void linear_scores(const MatrixRef<Scalar>& x, const Parameter<Scalar>& weight,
                   Matrix<Scalar>& scores) {
  resize(scores, x.rows(), weight.value.cols());
  gemm(GemmNN<Scalar>{.a = x, .b = weight.value, .c = scores});
}

/// Adds xᵀ·dscores to W's gradient, if W is trained, and dscores·Wᵀ to dx (T x D).
template <class Scalar>
void linear_scores_backward(const MatrixRef<Scalar>& x, const Matrix<Scalar>& dscores,
                            Parameter<Scalar>& weight, Matrix<Scalar>& dx) {
  gemm(GemmNT<Scalar>{.a = dscores, .b = weight.value, .c = dx, .start = Start::accumulate});
  if (!weight.trained) return;
  gemm(GemmTN<Scalar>{
      .a = x, .b = dscores, .c = view(weight.gradient()), .start = Start::accumulate});
}

inline constexpr Index softmax_block = 64;  ///< tokens in a task

/// p = softmax of each row of scores; the two may be one matrix. NaN or +infinity in a row makes
/// the whole row NaN.
template <class Scalar>
void softmax_rows(const Matrix<Scalar>& scores, Matrix<Scalar>& p) {
  const Index experts = scores.cols();
  resize(p, scores.rows(), experts);
  parallel_for_blocks(
      scores.rows(), softmax_block, function_work(scores.size()), [&](Index first, Index count) {
        for (Index t = first; t < first + count; ++t) {
          const auto softmax = softmax_row(experts, row_data(scores, t), row_data(p, t));
          const auto total = broadcast(static_cast<Scalar>(softmax.sum));
          map(
              experts, row_data(p, t),
              [&](const Packet<Scalar>& e) { return Eigen::internal::pdiv(e, total); },
              row_data(p, t));
        }
      });
}

/// Turns the gradient by p into that by the scores: p ⊙ (g − Σ_i p_i·g_i) in each row.
template <class Scalar>
void softmax_rows_backward(const Matrix<Scalar>& p, Matrix<Scalar>& gradient) {
  const Index experts = p.cols();
  parallel_for_blocks(p.rows(), softmax_block, element_work(p.size()),
                      [&](Index first, Index count) {
                        using namespace Eigen::internal;
                        for (Index t = first; t < first + count; ++t) {
                          Scalar* g = row_data(gradient, t);
                          const auto mean = broadcast(dot(experts, row_data(p, t), g));
                          map(
                              experts, g,
                              [&](const Packet<Scalar>& pi, const Packet<Scalar>& gi) {
                                return pmul(pi, psub(gi, mean));
                              },
                              row_data(p, t), g);
                        }
                      });
}

}  // namespace moe::detail
