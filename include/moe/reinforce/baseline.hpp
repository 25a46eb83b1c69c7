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
/// Baselines: an expected return b that is subtracted from the return R_t, which lowers the variance of
/// the gradient and not its expectation ([W92], see returns.hpp; [R16], see schedule.hpp).
///
/// b in the advantage R_t - b never depends on the symbols whose log-probability the advantage
/// multiplies. Except in LinearBaseline, b is an estimate of the return at the first sampled step of a
/// sequence, and is the same at all its steps. This suits rewards at the end of a sequence. If rewards
/// come at every step, the return falls along the sequence, and only LinearBaseline can follow.

namespace moe {

/// A baseline is a value: its settings and what it has learned.
///
///     needs_greedy_rollout     whether it uses SampledSteps::greedy_return(), which costs a rollout
///     check(samples)           const; throws std::invalid_argument for settings out of range
///     predict(steps, b)        sets b_t of every sampled step, steps.count() >= 1 of them; changes
///                              nothing that later predictions depend on
///     learn(steps, b)          called when the update can no longer fail, with the b of predict()
///
/// A baseline with parameters has visit_parameters, and learn() adds to their gradients.
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
  /// See BaselineFor.
  static constexpr bool needs_greedy_rollout = false;
  /// Any settings are possible.
  void check(Index) const {}

  /// Zeros.
  template <Policy P>
  void predict(const SampledSteps<P>&, std::span<double> b) const {
    std::fill(b.begin(), b.end(), 0.0);
  }
  /// Does nothing.
  template <Policy P>
  void learn(const SampledSteps<P>&, std::span<const double>) const {}
};

/// An exponential moving average; its two numbers are all of its state, to save and restore.
struct RunningMean {
  double sum = 0;     ///< the weighted sum
  double weight = 0;  ///< the sum of the weights

  /// The average of the values so far, 0 before the first.
  double mean() const { return weight > 0 ? sum / weight : 0; }

  /// Adds a value: it gets the weight `rate`, in (0, 1], and the weights of the older values are
  /// multiplied by 1 - rate.
  void add(double value, double rate) {
    sum += rate * (value - sum);
    weight += rate * (1 - weight);
  }
};

/// b = an exponential moving average of the mean return of earlier batches.
struct RunningMeanBaseline {
  double rate = 0.05;  ///< the weight of a new batch in the mean, in (0, 1]
  RunningMean mean{};  ///< its sum finite, its weight in [0, 1]

  /// See BaselineFor.
  static constexpr bool needs_greedy_rollout = false;
  /// Throws std::invalid_argument for a field out of range.
  void check(Index) const {
    detail::require(rate > 0 && rate <= 1, "RunningMeanBaseline.rate = ", rate,
                    ", must be in (0, 1]");
    detail::require(std::isfinite(mean.sum) && mean.weight >= 0 && mean.weight <= 1,
                    "RunningMeanBaseline.mean: sum = ", mean.sum, ", weight = ", mean.weight,
                    ", must be finite and in [0, 1]");
  }

  /// The mean, 0 before the first update, at every step.
  template <Policy P>
  void predict(const SampledSteps<P>&, std::span<double> b) const {
    std::fill(b.begin(), b.end(), mean.mean());
  }
  /// Adds the mean return of this batch.
  template <Policy P>
  void learn(const SampledSteps<P>& steps, std::span<const double>) {
    mean.add(steps.mean_return(), rate);
  }
};

/// b_t = w·h_t + c of the policy's state h_t, trained by squared error, without a gradient to the policy
/// [R16 sec. 3.2.1]. Needs a PolicyWithHidden with the same Scalar. w and c are parameters, "weight" and
/// "bias", and are 0 initially.
template <class Scalar = float>
class LinearBaseline {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    Index hidden = 0;  ///< W, the width of the policy's state, at least 1
  };

  /// Throws std::invalid_argument for a configuration out of range.
  explicit LinearBaseline(const Config& config)
      : config_(checked(config)), linear_({.inputs = config.hidden, .outputs = 1}, 0) {
    linear_.weight.value.setZero();
    linear_.bias.value.setZero();
  }

  /// See BaselineFor.
  static constexpr bool needs_greedy_rollout = false;
  /// The constructor has checked the configuration.
  void check(Index) const {}

  /// b_t = w·h_t + c. Throws std::invalid_argument unless the policy's hidden(tape) has
  /// Config.hidden columns and a row for each row of the logits.
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

  /// "weight" and "bias".
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

/// b = the return of the sequence that the policy writes for the same input with the most probable symbol
/// at every step, without noise.
///
/// S. Rennie, E. Marcheret, Y. Mroueh, J. Ross, V. Goel, "Self-critical Sequence Training for Image
/// Captioning", CVPR 2017.
struct GreedyBaseline {
  /// See BaselineFor.
  static constexpr bool needs_greedy_rollout = true;
  /// Any settings are possible.
  void check(Index) const {}

  /// The return of the greedy sequence of the same input, at every step.
  template <Policy P>
  void predict(const SampledSteps<P>& steps, std::span<double> b) const {
    for (Index i = 0; i < steps.count(); ++i) {
      b[detail::to_size(i)] = steps.greedy_return(steps.input(i));
    }
  }
  /// Does nothing.
  template <Policy P>
  void learn(const SampledSteps<P>&, std::span<const double>) const {}
};

/// b = the mean return of the other samples for the same input.
///
/// W. Kool, H. van Hoof, M. Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.
struct LeaveOneOutBaseline {
  /// See BaselineFor.
  static constexpr bool needs_greedy_rollout = false;
  /// Throws std::invalid_argument unless there are at least two samples.
  void check(Index samples) const {
    detail::require(samples >= 2, "Reinforce::Config.samples = ", samples,
                    ", must be at least 2 for LeaveOneOutBaseline");
  }

  /// The mean return of the other samples, at every step.
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
  /// Does nothing.
  template <Policy P>
  void learn(const SampledSteps<P>&, std::span<const double>) const {}
};

/// The baselines of the library, of which a Reinforce<P> has one; LinearBaseline only for a
/// PolicyWithHidden.
template <Policy P>
using Baselines = std::conditional_t<
    PolicyWithHidden<P>,
    std::variant<RunningMeanBaseline, NoBaseline, LinearBaseline<typename P::Scalar>,
                 GreedyBaseline, LeaveOneOutBaseline>,
    std::variant<RunningMeanBaseline, NoBaseline, GreedyBaseline, LeaveOneOutBaseline>>;

}  // namespace moe
