#pragma once

#include "moe/kernels/column_sums.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/kernels/softmax.hpp"
#include "moe/parameter.hpp"

/// \file
/// Scores of experts: a linear map of the token, and a softmax over all experts.

namespace moe {

namespace detail {

inline void check_score_bias(const char* function, Index numbers, Index experts) {
  require(numbers == 0 || numbers == experts, function, ": the bias has ", numbers, " numbers for ",
          experts, " experts");
}

}  // namespace detail

/// scores (N x E) = x·W + b. x is N x D, a matrix or rows gathered from one, W is D x E, and b is 1 x E,
/// or empty if there is none. Throws std::invalid_argument, with nothing changed, for other shapes. O(N·D·E).
template <class Scalar>
void linear_scores(const std::type_identity_t<GatheredRows<Scalar>>& x,
                   const Parameter<Scalar>& weight, const Parameter<Scalar>& bias,
                   Matrix<Scalar>& scores) {
  detail::require(x.width() == weight.value.rows(), "linear_scores: x is ", x.width(),
                  " wide, the weight is ", weight.value.rows(), " x ", weight.value.cols());
  detail::check_score_bias("linear_scores", bias.size(), weight.value.cols());
  detail::resize(scores, x.count(), weight.value.cols());
  detail::gemm(
      detail::GemmNN<Scalar>{.a = x,
                             .b = weight.value,
                             .c = scores,
                             .bias = {.values = bias.size() > 0 ? bias.value.data() : nullptr}});
}
/// The same without a bias.
template <class Scalar>
void linear_scores(const std::type_identity_t<GatheredRows<Scalar>>& x,
                   const Parameter<Scalar>& weight, Matrix<Scalar>& scores) {
  linear_scores(x, weight, Parameter<Scalar>(), scores);
}

/// Adds xᵀ·dscores to W's gradient and the column sums of dscores to b's, if they are trained, and
/// dscores·Wᵀ to dx (N x D, a matrix or scattered rows of one). Throws std::invalid_argument, with
/// nothing changed, unless x, dscores and dx have the same number of rows, x and dx are D wide,
/// dscores is E wide, and b is 1 x E or empty.
template <class Scalar>
void linear_scores_backward(const std::type_identity_t<GatheredRows<Scalar>>& x,
                            const std::type_identity_t<GatheredRows<Scalar>>& dscores,
                            Parameter<Scalar>& weight, Parameter<Scalar>& bias,
                            const std::type_identity_t<ScatteredRows<Scalar>>& dx) {
  detail::require(x.count() == dscores.count() && dx.count() == dscores.count(),
                  "linear_scores_backward: x has ", x.count(), " rows, dscores ", dscores.count(),
                  ", dx ", dx.count());
  detail::require(x.width() == weight.value.rows() && dx.width() == weight.value.rows() &&
                      dscores.width() == weight.value.cols(),
                  "linear_scores_backward: x is ", x.width(), " wide, dx ", dx.width(),
                  ", dscores ", dscores.width(), ", the weight is ", weight.value.rows(), " x ",
                  weight.value.cols());
  detail::check_score_bias("linear_scores_backward", bias.size(), weight.value.cols());
  detail::gemm(detail::GemmNT<Scalar>{
      .a = dscores, .b = weight.value, .c = dx, .start = detail::Start::accumulate});
  if (bias.size() > 0 && bias.trained) {
    detail::add_column_sums(dscores, bias.gradient());
  }
  if (!weight.trained) return;
  if (weight.stored.factors != nullptr) return weight.stored.factors->add(x, dscores);
  const bool replace = detail::accumulate(weight, true);
  detail::gemm(detail::GemmTN<Scalar>{
      .a = x, .b = dscores, .c = view(weight.gradient()), .start = detail::start_of(replace)});
}
/// The same without a bias.
template <class Scalar>
void linear_scores_backward(const std::type_identity_t<GatheredRows<Scalar>>& x,
                            const std::type_identity_t<GatheredRows<Scalar>>& dscores,
                            Parameter<Scalar>& weight,
                            const std::type_identity_t<ScatteredRows<Scalar>>& dx) {
  Parameter<Scalar> none;
  linear_scores_backward(x, dscores, weight, none, dx);
}

namespace detail {

inline constexpr Index softmax_block = 64;  ///< tokens in a task

}  // namespace detail

/// p = softmax of each row of scores (N x E); the two may be the same matrix. A row with NaN or
/// +infinity, or with nothing but -infinity, becomes NaN as a whole.
template <class Scalar>
void softmax_rows(const Matrix<Scalar>& scores, Matrix<Scalar>& p) {
  const Index experts = scores.cols();
  detail::resize(p, scores.rows(), experts);
  parallel_for_blocks(
      scores.rows(), detail::softmax_block, function_work(scores.size()),
      [&](Index first, Index count) {
        for (Index t = first; t < first + count; ++t) {
          const auto softmax =
              detail::softmax_row(experts, detail::row_data(scores, t), detail::row_data(p, t));
          const auto total = detail::broadcast(static_cast<Scalar>(softmax.sum));
          detail::map(
              experts, detail::row_data(p, t),
              [&](const detail::Packet<Scalar>& e) { return Eigen::internal::pdiv(e, total); },
              detail::row_data(p, t));
        }
      });
}

/// Turns the gradient g with respect to p into that with respect to the scores, p ⊙ (g − Σ_i p_i·g_i) in
/// each row. Throws std::invalid_argument, with nothing changed, if their shapes differ.
template <class Scalar>
void softmax_rows_backward(const Matrix<Scalar>& p, Matrix<Scalar>& gradient) {
  detail::require(gradient.rows() == p.rows() && gradient.cols() == p.cols(),
                  "softmax_rows_backward: the gradient is ", gradient.rows(), " x ",
                  gradient.cols(), ", p is ", p.rows(), " x ", p.cols());
  const Index experts = p.cols();
  parallel_for_blocks(
      p.rows(), detail::softmax_block, element_work(p.size()), [&](Index first, Index count) {
        using namespace Eigen::internal;
        for (Index t = first; t < first + count; ++t) {
          Scalar* g = detail::row_data(gradient, t);
          const auto mean = detail::broadcast(detail::dot(experts, detail::row_data(p, t), g));
          detail::map(
              experts, g,
              [&](const detail::Packet<Scalar>& pi, const detail::Packet<Scalar>& gi) {
                return pmul(pi, psub(gi, mean));
              },
              detail::row_data(p, t), g);
        }
      });
}

}  // namespace moe
