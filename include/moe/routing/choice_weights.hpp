#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "moe/routing/choices.hpp"
#include "moe/routing/router_scores.hpp"

/// \file
/// The weights of the experts that a top-k gate chose, and their gradient.

namespace moe::detail {

/// The weights w of the chosen: s; if renormalised s / (N + ε) with N = (Σ_chosen s^p)^(1/p); or the
/// softmax of c over the chosen. If weights are renormalised after drops, dropped choices do not count.
template <class Scalar>
class ChoiceWeights {
 public:
  explicit ChoiceWeights(const TopKConfig& config)
      : top_k_(config.top_k),
        softmax_of_chosen_(config.score == Score::softmax_of_chosen),
        adds_up_to_one_(config.renormalise || softmax_of_chosen_),
        after_drops_(config.renormalise_after_drops),
        norm_(static_cast<Scalar>(config.renormalise_norm)),
        epsilon_(softmax_of_chosen_ ? Scalar{0}  // which has a term of 1 in its sum
                                    : static_cast<Scalar>(config.renormalise_epsilon)),
        scale_(static_cast<Scalar>(config.scale)) {}

  /// Fills the weights of token t's choices, before drops; drops may depend on them.
  void forward(const RouterScores<Scalar>& router, Index t, Choices<Scalar>& choices) const {
    weigh(router, t, adds_up_to_one_ && (softmax_of_chosen_ || !after_drops_), choices);
  }
  /// If weights are renormalised after drops: sets those of the choices that are left; the others get 0.
  void renormalise(const RouterScores<Scalar>& router, Choices<Scalar>& choices) const {
    if (!after_drops_) return;
    const Work work = function_work(choices.size());
    parallel_for_blocks(router.scores.rows(), router_block, work, [&](Index first, Index count) {
      for (Index t = first; t < first + count; ++t) weigh(router, t, true, choices);
    });
  }

  /// Adds the gradient through the weights to `gradient` (N x E): ∂L/∂s of the chosen, or ∂L/∂c if the
  /// weights are a softmax of the chosen. dweight (S) is the gradient w.r.t. the slots' weights. Let g
  /// be the gradient w.r.t. w, 0 for dropped choices. Then ds = g, or if renormalised
  /// ds = (g − (s/N)^(p−1)·Σ g·w) / (N + ε); for the softmax dc = w·(g − Σ g·w).
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
  /// The scores of token t's choices that have a part in its weights, 0 for the others.
  auto scores_of(const RouterScores<Scalar>& router, Index t,
                 const Choices<Scalar>& choices) const {
    return [this, &router, &choices, t](Index k) {
      const Index c = t * top_k_ + k;
      return counts(choices, c) ? router.scores(t, choices.expert[c]) : Scalar{0};
    };
  }
  bool counts(const Choices<Scalar>& choices, Index choice) const {
    return !after_drops_ || choices.keeps[choice] != 0;
  }

  void weigh(const RouterScores<Scalar>& router, Index t, bool adds_up_to_one,
             Choices<Scalar>& choices) const {
    Scalar* w = &choices.weight[t * top_k_];
    if (softmax_of_chosen_) {
      exponentials(router, t, choices, w);
    } else {
      const auto s = scores_of(router, t, choices);
      for (Index k = 0; k < top_k_; ++k) w[k] = s(k);
    }
    if (!adds_up_to_one) return;
    const Scalar total = divisor([w](Index k) { return w[k]; });
    if (total == Scalar{0}) return;  // all scores are 0 to the last bit
    for (Index k = 0; k < top_k_; ++k) w[k] /= total;
  }
  void exponentials(const RouterScores<Scalar>& router, Index t, const Choices<Scalar>& choices,
                    Scalar* w) const {
    constexpr Scalar lowest = -std::numeric_limits<Scalar>::infinity();
    const auto logit = [&](Index k) {
      const Index c = t * top_k_ + k;
      return counts(choices, c) ? router.logits(t, choices.expert[c]) : lowest;
    };
    Scalar shift = logit(0);
    for (Index k = 1; k < top_k_; ++k) shift = std::max(shift, logit(k));
    for (Index k = 0; k < top_k_; ++k) {
      w[k] = counts(choices, t * top_k_ + k) ? std::exp(logit(k) - shift) : Scalar{0};
    }
  }

  /// N of the scores s(0), s(1), ..., computed from their ratios to the largest, so that no power
  /// overflows.
  template <class F>
  Scalar norm_of(const F& s) const {
    Scalar largest = s(0);
    for (Index k = 1; k < top_k_; ++k) largest = std::max(largest, s(k));
    if (largest == Scalar{0}) return largest;
    Scalar sum{0};
    for (Index k = 0; k < top_k_; ++k) sum += std::pow(s(k) / largest, norm_);
    return largest * std::pow(sum, Scalar{1} / norm_);
  }
  /// N + ε.
  template <class F>
  Scalar divisor(const F& s) const {
    if (norm_ != Scalar{1}) return norm_of(s) + epsilon_;
    Scalar total = epsilon_;
    for (Index k = 0; k < top_k_; ++k) total += s(k);
    return total;
  }

  void backward(Index t, std::span<const Scalar> dweight, const RouterScores<Scalar>& router,
                const Choices<Scalar>& choices, Matrix<Scalar>& gradient) const {
    const Index begin = t * top_k_;
    const auto g = [&](Index choice) {
      return choices.keeps[choice] == 0 ? Scalar{0}
                                        : scale_ * dweight[to_size(choices.slot[choice])];
    };
    if (!adds_up_to_one_) {
      for (Index c = begin; c < begin + top_k_; ++c) gradient(t, choices.expert[c]) += g(c);
      return;
    }
    Scalar mean{0};
    for (Index c = begin; c < begin + top_k_; ++c) mean += g(c) * choices.weight[c];
    if (softmax_of_chosen_) {
      for (Index c = begin; c < begin + top_k_; ++c) {
        gradient(t, choices.expert[c]) += choices.weight[c] * (g(c) - mean);
      }
      return;
    }
    const auto s = scores_of(router, t, choices);
    const Scalar factor = finite_inverse(divisor(s));
    const Scalar inverse = norm_ == Scalar{1} ? Scalar{1} : finite_inverse(norm_of(s));
    for (Index k = 0; k < top_k_; ++k) {
      const Index c = begin + k;
      if (!counts(choices, c)) continue;
      const Scalar slope =
          norm_ == Scalar{1} ? Scalar{1} : std::pow(s(k) * inverse, norm_ - Scalar{1});
      gradient(t, choices.expert[c]) += factor * (g(c) - mean * slope);
    }
  }

  Index top_k_;
  bool softmax_of_chosen_;
  bool adds_up_to_one_;
  bool after_drops_;
  Scalar norm_;
  Scalar epsilon_;
  Scalar scale_;
};

}  // namespace moe::detail
