#pragma once

#include <cmath>
#include <limits>

#include "moe/kernels/activations.hpp"
#include "moe/routing/linear_scores.hpp"
#include "moe/routing/top_k_config.hpp"

/// \file
/// The scores by which a top-k gate chooses, from logits, and their backward.

namespace moe::detail {

/// The logits and scores of N tokens.
template <class Scalar>
struct RouterScores {
  Matrix<Scalar> logits;             ///< c, N x E
  Matrix<Scalar> scores;             ///< softmax(c), sigmoid(c) or sqrt(softplus(c)), N x E
  Vector<Scalar> probability_scale;  ///< N, P is scores times this
  Vector<Scalar> log_sum;  ///< N, log Σ_i e^c_i; without a softmax only if needed, else 0
};

/// Whether an expert's score depends on its own logit alone.
inline bool is_elementwise(Score score) {
  return score == Score::sigmoid || score == Score::sqrt_softplus;
}

inline constexpr Index router_block = 64;  ///< tokens in a task

/// 1 / sum, but 0 for a sum below the smallest normal number, whose inverse can be infinite.
template <class Scalar>
Scalar finite_inverse(Scalar sum) {
  return sum < std::numeric_limits<Scalar>::min() ? Scalar{0} : Scalar{1} / sum;
}

/// Computes the rest of `router` from its logits.
template <class Scalar>
void score_logits(Score score, bool needs_log_sum, RouterScores<Scalar>& router) {
  using P = Packet<Scalar>;
  const Index tokens = router.logits.rows();
  const Index experts = router.logits.cols();
  resize(router.scores, tokens, experts);
  resize(router.probability_scale, tokens);
  resize(router.log_sum, tokens);
  const auto log_sum = [](const SoftmaxRow<Scalar>& softmax) {
    return softmax.shift + static_cast<Scalar>(std::log(softmax.sum));
  };
  const Work work = function_work(router.scores.size());
  parallel_for_blocks(tokens, router_block, work, [&](Index first, Index count) {
    for (Index t = first; t < first + count; ++t) {
      const Scalar* c = row_data(router.logits, t);
      Scalar* s = row_data(router.scores, t);
      if (is_elementwise(score)) {
        router.log_sum[t] =
            needs_log_sum ? log_sum(softmax_row<Scalar>(experts, c, nullptr)) : Scalar{0};
        if (score == Score::sigmoid) {
          map(
              experts, s, [](const P& v) { return sigmoid<Scalar>(v); }, c);
        } else {
          map(
              experts, s, [](const P& v) { return moe::detail::sqrt<Scalar>(softplus<Scalar>(v)); },
              c);
        }
        router.probability_scale[t] = finite_inverse(sum(experts, s));
      } else {
        const auto softmax = softmax_row(experts, c, s);
        router.log_sum[t] = log_sum(softmax);
        const P total = broadcast(static_cast<Scalar>(softmax.sum));
        map(
            experts, s, [&](const P& e) { return Eigen::internal::pdiv(e, total); }, s);
        router.probability_scale[t] = Scalar{1};
      }
    }
  });
}

/// Turns ∂L/∂s (N x E) into ∂L/∂c: ds/dc is s·(1 − s) for sigmoids, sigmoid(c) / (2·s) for roots.
template <class Scalar>
void score_logits_backward(Score score, const RouterScores<Scalar>& router,
                           Matrix<Scalar>& gradient) {
  using P = Packet<Scalar>;
  if (!is_elementwise(score)) return softmax_rows_backward(router.scores, gradient);
  const Index experts = router.scores.cols();
  const Work work = element_work(router.scores.size());
  parallel_for_blocks(router.scores.rows(), router_block, work, [&](Index first, Index count) {
    using namespace Eigen::internal;
    const P one = broadcast(Scalar{1});
    // The slope at a root that was rounded to 0 is not known.
    const P least = broadcast(std::numeric_limits<Scalar>::min());
    for (Index t = first; t < first + count; ++t) {
      Scalar* d = row_data(gradient, t);
      if (score == Score::sigmoid) {
        map(
            experts, d, [&](const P& g, const P& s) { return pmul(g, pmul(s, psub(one, s))); }, d,
            row_data(router.scores, t));
      } else {
        map(
            experts, d,
            [&](const P& g, const P& s, const P& c) {
              const P slope = pdiv(sigmoid<Scalar>(c), padd(s, s));
              return pmul(g, pselect(pcmp_lt(s, least), pzero(s), slope));
            },
            d, row_data(router.scores, t), row_data(router.logits, t));
      }
    }
  });
}

/// Turns ∂L/∂P (E) of token t into ∂L/∂s. For a softmax P = s. For other scores P = s / S with S = Σ s,
/// and ds = (dP − Σ dP·P) / S.
template <class Scalar>
void probability_backward(Score score, const RouterScores<Scalar>& router, Index t, Scalar* d) {
  using P = Packet<Scalar>;
  using namespace Eigen::internal;
  if (!is_elementwise(score)) return;
  const Index experts = router.scores.cols();
  const Scalar scale = router.probability_scale[t];
  const P factor = broadcast(scale);
  const P mean = broadcast(scale * dot(experts, d, row_data(router.scores, t)));
  map(
      experts, d, [&](const P& g) { return pmul(factor, psub(g, mean)); }, d);
}

}  // namespace moe::detail
