#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "moe/routing/choices.hpp"
#include "moe/routing/router_scores.hpp"

/// \file
/// The weights of the experts that a top-k gate chose, and their gradient.

namespace moe::detail {

/// w = s of the chosen, s / (Σ_chosen s + ε) if renormalised, or the softmax of c over the chosen.
template <class Scalar>
class ChoiceWeights {
 public:
  explicit ChoiceWeights(const TopKConfig& config)
      : top_k_(config.top_k),
        softmax_of_chosen_(config.score == Score::softmax_of_chosen),
        adds_up_to_one_(config.renormalise || softmax_of_chosen_),
        epsilon_(softmax_of_chosen_ ? Scalar{0}  // which has a term of 1 in its sum
                                    : static_cast<Scalar>(config.renormalise_epsilon)),
        scale_(static_cast<Scalar>(config.scale)) {}

  /// Fills the weights of token t's choices.
  void forward(const RouterScores<Scalar>& router, Index t, Choices<Scalar>& choices) const {
    const Index* chosen = &choices.expert[t * top_k_];
    Scalar* w = &choices.weight[t * top_k_];
    if (softmax_of_chosen_) {
      const Scalar* c = row_data(router.logits, t);
      Scalar shift = c[chosen[0]];
      for (Index k = 1; k < top_k_; ++k) shift = std::max(shift, c[chosen[k]]);
      for (Index k = 0; k < top_k_; ++k) w[k] = std::exp(c[chosen[k]] - shift);
    } else {
      for (Index k = 0; k < top_k_; ++k) w[k] = router.scores(t, chosen[k]);
    }
    if (!adds_up_to_one_) return;
    const Scalar total = std::accumulate(w, w + top_k_, epsilon_);
    if (total == Scalar{0}) return;  // all scores are 0 to the last bit
    for (Index k = 0; k < top_k_; ++k) w[k] /= total;
  }

  /// Adds to `gradient` (N x E) what comes through the weights: ∂L/∂s of the chosen, or ∂L/∂c where
  /// the weights are a softmax of the chosen. dweight (S) is the gradient w.r.t. the slots' weights.
  /// With g that w.r.t. w, 0 where dropped, and S = Σ s + ε: ds = g; renormalised,
  /// ds = (g − Σ g·w) / S; and dc = w·(g − Σ g·w).
  void backward(std::span<const Scalar> dweight, const RouterScores<Scalar>& router,
                const Choices<Scalar>& choices, Matrix<Scalar>& gradient) const {
    const Work work = function_work(choices.size());
    parallel_for_blocks(router.scores.rows(), router_block, work, [&](Index first, Index count) {
      for (Index t = first; t < first + count; ++t) {
        backward(t, dweight, router, choices, gradient);
      }
    });
  }

 private:
  void backward(Index t, std::span<const Scalar> dweight, const RouterScores<Scalar>& router,
                const Choices<Scalar>& choices, Matrix<Scalar>& gradient) const {
    const Index begin = t * top_k_;
    const auto g = [&](Index choice) {
      return choices.keeps[choice] == 0 ? Scalar{0}
                                        : scale_ * dweight[to_size(choices.slot[choice])];
    };
    Scalar mean{0};
    Scalar total = epsilon_;
    if (adds_up_to_one_) {
      for (Index c = begin; c < begin + top_k_; ++c) {
        mean += g(c) * choices.weight[c];
        total += router.scores(t, choices.expert[c]);
      }
    }
    for (Index c = begin; c < begin + top_k_; ++c) {
      const Scalar factor = softmax_of_chosen_ ? choices.weight[c]
                            : adds_up_to_one_  ? finite_inverse(total)
                                               : Scalar{1};
      gradient(t, choices.expert[c]) += factor * (g(c) - mean);
    }
  }

  Index top_k_;
  bool softmax_of_chosen_;
  bool adds_up_to_one_;
  Scalar epsilon_;
  Scalar scale_;
};

}  // namespace moe::detail
