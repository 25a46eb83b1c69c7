#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <span>
#include <type_traits>
#include <variant>

#include "moe/nn/linear.hpp"
#include "moe/reinforce/sampled_steps.hpp"

/// \file
/// Baselines: what is subtracted from a return, so that the sum of what was better and what was
/// worse than expected remains: the expectation of the gradient stays, its variance falls ([W92],
/// see returns.hpp; [R16], see schedule.hpp).
///
/// b in the advantage R_t - b never depends on the symbols whose probability it weighs. A
/// sequence's return below is that of its first sampled step, and b is then the same at all its
/// steps: right for rewards at the end. Where rewards come at every step, late steps have less to
/// come, and of these baselines only the linear one knows.

namespace moe {

/// A baseline is a value: its settings and what it has learned.
///
///     needs_greedy_rollout     whether SampledSteps::greedy_return() is used; costs a rollout
///     check(samples)           const; throws std::invalid_argument for settings out of range
///     predict(steps, b)        b_t of every sampled step, steps.count() of them, at least one;
///                              changes nothing that later predictions depend on
///     learn(steps, b)          once the update cannot fail any more, b being what predict() gave
///
/// One with parameters has visit_parameters, and learn() adds to their gradients.
// clang-format off
template <class B, class P>
concept BaselineFor =
    std::copyable<B> &&
    requires(B& baseline, const B& checked, const SampledSteps<P>& steps, std::span<double> b,
             Index samples) {
      { B::needs_greedy_rollout } -> std::convertible_to<bool>;
      checked.check(samples);
      baseline.predict(steps, b);
      baseline.learn(steps, std::span<const double>(b));
    };
// clang-format on

/// b = 0.
struct NoBaseline {
  static constexpr bool needs_greedy_rollout = false;
  void check(Index) const {}

  template <Policy P>
  void predict(const SampledSteps<P>&, std::span<double> b) const {
    std::fill(b.begin(), b.end(), 0.0);
  }
  template <Policy P>
  void learn(const SampledSteps<P>&, std::span<const double>) const {}
};

/// An exponential moving average. Two numbers, so that it can be saved and restored.
struct RunningMean {
  double sum = 0;
  double weight = 0;

  /// 0 before the first value.
  double mean() const { return weight > 0 ? sum / weight : 0; }

  /// The older values lose `rate` of their weight, which is 1 in the end.
  void add(double value, double rate) {
    sum += rate * (value - sum);
    weight += rate * (1 - weight);
  }
};

/// The mean return of the sequences in batches before.
struct RunningMeanBaseline {
  double rate = 0.05;  ///< how much of the mean a batch replaces, in (0, 1]
  RunningMean mean{};  ///< its sum finite, its weight in [0, 1]

  static constexpr bool needs_greedy_rollout = false;
  void check(Index) const {
    detail::require(rate > 0 && rate <= 1, "RunningMeanBaseline.rate = ", rate,
                    ", must be in (0, 1]");
    detail::require(std::isfinite(mean.sum) && mean.weight >= 0 && mean.weight <= 1,
                    "RunningMeanBaseline.mean: sum = ", mean.sum, ", weight = ", mean.weight,
                    ", must be finite and in [0, 1]");
  }

  template <Policy P>
  void predict(const SampledSteps<P>&, std::span<double> b) const {
    std::fill(b.begin(), b.end(), mean.mean());
  }
  template <Policy P>
  void learn(const SampledSteps<P>& steps, std::span<const double>) {
    mean.add(steps.mean_return(), rate);
  }
};

/// b_t = w·h_t + c in the policy's state h_t, trained by squared error, with no gradient into the
/// policy [R16 sec. 3.2.1]; needs a PolicyWithHidden with the same Scalar. w and c are parameters,
/// "weight" and "bias", and start from 0.
template <class Scalar = float>
class LinearBaseline {
 public:
  struct Config {
    Index hidden = 0;  ///< W, the width of the policy's state, at least 1
  };

  /// Throws std::invalid_argument for a configuration out of range.
  explicit LinearBaseline(const Config& config)
      : config_(checked(config)), linear_({.inputs = config.hidden, .outputs = 1}, 0) {
    linear_.weight.value.setZero();
    linear_.bias.value.setZero();
  }

  static constexpr bool needs_greedy_rollout = false;
  void check(Index) const {}

  template <PolicyWithHidden P>
  requires std::same_as<typename P::Scalar, Scalar>
  void predict(const SampledSteps<P>& steps, std::span<double> b) {
    steps.pack_hidden(hidden_);
    detail::require(hidden_.cols() == config_.hidden,
                    "LinearBaseline::Config.hidden = ", config_.hidden,
                    ", the policy's hidden state has the width ", hidden_.cols());
    const Matrix<Scalar>& y = linear_.forward(hidden_, tape_);
    for (Index i = 0; i < y.rows(); ++i) b[detail::to_size(i)] = static_cast<double>(y(i, 0));
  }

  /// Adds the gradient of the mean over sampled steps of (R_t - b_t)².
  template <PolicyWithHidden P>
  requires std::same_as<typename P::Scalar, Scalar>
  void learn(const SampledSteps<P>& steps, std::span<const double> b) {
    detail::resize(dy_, steps.count(), 1);
    const auto count = static_cast<double>(steps.count());
    for (Index i = 0; i < steps.count(); ++i) {
      dy_(i, 0) = static_cast<Scalar>(2 * (b[detail::to_size(i)] - steps.return_at(i)) / count);
    }
    linear_.backward(dy_, tape_);
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Linear<Scalar>::visit_parameters(self.linear_, visit);
  }

 private:
  static const Config& checked(const Config& config) {
    detail::require(config.hidden >= 1, "LinearBaseline::Config.hidden = ", config.hidden,
                    ", must be at least 1");
    return config;
  }

  Config config_;
  Linear<Scalar> linear_;
  typename Linear<Scalar>::Tape tape_;  // scratch, from predict() to learn()
  Matrix<Scalar> hidden_, dy_;
};

/// The return of what the policy writes for the same input when it takes the most probable symbol
/// at every step, without noise.
///
/// S. Rennie, E. Marcheret, Y. Mroueh, J. Ross, V. Goel, "Self-critical Sequence Training for Image
/// Captioning", CVPR 2017.
struct GreedyBaseline {
  static constexpr bool needs_greedy_rollout = true;
  void check(Index) const {}

  template <Policy P>
  void predict(const SampledSteps<P>& steps, std::span<double> b) const {
    for (Index i = 0; i < steps.count(); ++i) {
      b[detail::to_size(i)] = steps.greedy_return(steps.input(i));
    }
  }
  template <Policy P>
  void learn(const SampledSteps<P>&, std::span<const double>) const {}
};

/// The mean return of the other samples for the same input.
///
/// W. Kool, H. van Hoof, M. Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.
struct LeaveOneOutBaseline {
  static constexpr bool needs_greedy_rollout = false;
  void check(Index samples) const {
    detail::require(samples >= 2, "Reinforce::Config.samples = ", samples,
                    ", must be at least 2 for LeaveOneOutBaseline");
  }

  template <Policy P>
  void predict(const SampledSteps<P>& steps, std::span<double> b) const {
    for (Index i = 0; i < steps.count(); ++i) {
      const Index first = steps.first_row(steps.input(i));
      double sum = 0;
      for (Index other = first; other < first + steps.samples(); ++other) {
        if (other != steps.row(i)) sum += steps.return_of(other);
      }
      b[detail::to_size(i)] = sum / static_cast<double>(steps.samples() - 1);
    }
  }
  template <Policy P>
  void learn(const SampledSteps<P>&, std::span<const double>) const {}
};

/// The baselines that come with the library, of which a Reinforce<P> has one: the linear one only
/// where the policy shows its state.
template <Policy P>
using Baselines = std::conditional_t<
    PolicyWithHidden<P>,
    std::variant<RunningMeanBaseline, NoBaseline, LinearBaseline<typename P::Scalar>,
                 GreedyBaseline, LeaveOneOutBaseline>,
    std::variant<RunningMeanBaseline, NoBaseline, GreedyBaseline, LeaveOneOutBaseline>>;

}  // namespace moe
