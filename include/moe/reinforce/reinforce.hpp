#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "moe/nn/packed_rows.hpp"
#include "moe/optim/gradient_clipping.hpp"
#include "moe/reinforce/advantages.hpp"
#include "moe/reinforce/baseline.hpp"
#include "moe/reinforce/config.hpp"
#include "moe/reinforce/logits_gradient.hpp"
#include "moe/reinforce/plan.hpp"
#include "moe/reinforce/policy.hpp"
#include "moe/reinforce/returns.hpp"
#include "moe/reinforce/rollout.hpp"
#include "moe/reinforce/sampled_steps.hpp"
#include "moe/reinforce/schedule.hpp"
#include "moe/reinforce/statistics.hpp"

/// \file
/// Training of sequence models by a score that has no derivative.

namespace moe {

/// REINFORCE [W92] for sequences, combined with cross-entropy, from which training begins [R16]. N
/// sequences, V symbols to choose from, temperature τ:
///
///     cross-entropy   (1/N) Σ_n Σ_t -log π(reference_t | ...)
///     REINFORCE       -(1/N) Σ_n Σ_t A_t·log π_τ(a_t | ...),            a_t sampled from π_τ
///     R_t             Σ_{u >= t} discount^(u - t)·r_u
///     A_t             discount^t·(R_t - b_t),   b_t see baseline.hpp
///     w.r.t. logits   (A_t / (N·τ))·(softmax(z_t / τ) - onehot(a_t))
///
/// Both are means over sequences, not over symbols. So the expectation of REINFORCE's gradient is
/// exactly the negative gradient of the expected return Σ_t discount^t·r_t of a sequence. (That
/// includes the factor discount^t of A_t, which many programs leave out.) If a sequence begins with
/// a forced prefix, t counts from the end of the prefix. The end symbol is a symbol like the
/// others: its step is trained, and no step after it. So sequences of unequal length can share a
/// batch: padding does not count in any sum, mean, entropy or normalisation.
///
///     moe::Reinforce<MyPolicy> reinforce({.end = 0, .max_length = 20,
///                                         .baseline = moe::LeaveOneOutBaseline{}, .samples = 4});
///     const moe::Alternation schedule{.warm_up = 5000, .rise = 5000, .highest = 0.5};
///     decltype(reinforce)::Tape tape;
///     for (moe::Index step = 1; step <= 20000; ++step) {
///       moe::zero_gradients(policy);
///       const moe::NoiseKey key{.step = static_cast<std::uint64_t>(step)};
///       const auto statistics = reinforce.add_gradients(policy, inputs, references, score,
///                                                       schedule(step), key, tape);
///       adam.update(policy, 1e-3);
///     }
///
/// A reward is anything that can be called as reward(input, sequence, done) and returns a number;
/// `sequence` has the symbols written so far, the end symbol included, and `done` is true after the
/// end symbol or at the length limit. It is called once for every symbol of every sequence that has
/// a sampled symbol, after all sequences are complete, from one thread, in a fixed order; with
/// GreedyBaseline, also for the greedy sequences. For a score of the whole sequence return 0 until
/// done.
///
/// The baseline is the only state that changes from update to update, see baseline() and
/// set_baseline(). A LinearBaseline has parameters and needs an optimizer of its own:
///
///     moe::zero_gradients(reinforce);                   // with those of the policy
///     if (statistics.sampled_steps > 0) baseline_adam.update(reinforce, 1e-2);
///
/// By default the baseline is one of the library's, see Baselines; with Reinforce<MyPolicy, MyBaseline>
/// it is MyBaseline.
template <class P, class... Own>
class Reinforce {
  static_assert(detail::check_policy_requirements<P>());
  static_assert((BaselineFor<Own, P> && ...), "a baseline must have the functions of BaselineFor");

 public:
  using Scalar = typename P::Scalar;     ///< that of the policy
  using Input = typename P::Input;       ///< that of the policy
  using Reference = std::vector<Index>;  ///< symbols, without the end symbol
  /// A std::variant of the baselines it can have.
  using Baseline = std::conditional_t<sizeof...(Own) == 0, Baselines<P>, std::variant<Own...>>;
  using Config = ReinforceConfig<Baseline>;  ///< see ReinforceConfig
  using Statistics = ReinforceStatistics;    ///< see ReinforceStatistics

  /// The caller's scratch, and the sequences and figures of the last update.
  struct Tape {
    Rollout rollout;                      ///< the sequences, rows() = R
    std::vector<double> rewards;          ///< R x max_length
    std::vector<double> returns;          ///< R x max_length, of forced steps too; 0 for references
    std::vector<double> log_probability;  ///< R x max_length, as the gradient pass computed them
    std::vector<double> entropy;          ///< R x max_length, at sampled steps
    std::vector<double> advantages;       ///< A_t, one per sampled step, time-major
    Matrix<Scalar> dlogits;               ///< (steps·R) x V
    typename P::Tape policy;              ///< the policy's own

    Rollout greedy;                      ///< the greedy sequences, for GreedyBaseline
    std::vector<double> greedy_rewards,  ///< inputs x max_length
        greedy_returns;                  ///< inputs x max_length
    std::vector<double> baselines;       ///< b_t, one per sampled step
    PackedRows sampled;                  ///< the sampled steps among the rows of the logits
    typename P::State state,             ///< the policy's state during the rollout
        greedy_state;                    ///< and during the greedy rollout
    Matrix<Scalar> terms,                ///< scratch
        greedy_terms;                    ///< scratch
  };

  /// Throws std::invalid_argument for a configuration out of range.
  explicit Reinforce(Config config) : config_(detail::checked<Scalar>(std::move(config))) {}

  /// The configuration, with the present baseline, and the end symbol in place of a `start` of -1.
  const Config& config() const { return config_; }

  /// The baseline with what it has learned, for example to save it: the `mean` of
  /// std::get<RunningMeanBaseline>(baseline()), or the parameters of a LinearBaseline.
  const Baseline& baseline() const { return config_.baseline; }

  /// Replaces the baseline, for example by one that was saved. Throws std::invalid_argument, with nothing
  /// changed, if it is out of range.
  void set_baseline(Baseline baseline) {
    std::visit([&](const auto& b) { b.check(config_.samples); }, baseline);
    config_.baseline = std::move(baseline);
  }

  /// Adds the gradient of the objective, which is to be minimised, to the gradients of the policy, and
  /// that of the baseline's squared error to its own, if it has parameters.
  ///
  /// `references` has a sequence for each input, or may be empty for {.reinforce = 1}. Give every update
  /// its own key.step: the same key samples the same sequences, and the policy draws the same noise, in
  /// the rollout and in the gradient pass. Sample s of input i is drawn as token
  /// first_token + i·Config::samples + s, so that parts of a batch can draw the same symbols as the
  /// whole.
  ///
  /// Throws std::invalid_argument for an empty batch, for a Config.end that is not a symbol of the policy, for
  /// an objective out of range, for a number of references that is not that of the inputs, for a
  /// reference that is too long, contains Config.end, or has a symbol that is out of range or
  /// forbidden, for a reward, return or baseline that is not finite, for a logit that is NaN or
  /// +infinity, for a row of logits that are all -infinity, and for logits of the wrong shape. Then
  /// no gradient was added and the baseline's predictions are unchanged. The same holds for
  /// exceptions of the reward and of the policy, except of its backward().
  template <detail::RewardOf<Input> Reward>
  Statistics add_gradients(P& policy, std::span<const Input> inputs,
                           std::span<const Reference> references, Reward&& reward,
                           const Objective& objective, const NoiseKey& key, Tape& tape) {
    check_batch(policy, inputs);
    detail::check_references(config_, policy.symbols(), inputs.size(), references, objective);
    const detail::Plan plan(objective, config_.samples);
    write(policy, inputs, references, plan, key, tape);
    detail::call_reward(inputs, reward, tape.rollout, tape.rewards);
    detail::make_returns(tape.rollout, tape.rewards, config_.discount, tape.returns);
    if (needs_greedy_rollout() && plan.samples > 0) {
      score_greedy(policy, inputs, references, reward, plan, tape);
    }

    const Matrix<Scalar>& logits = forward(policy, inputs, key, tape);
    detail::list_sampled(tape.rollout, tape.sampled);
    const SampledSteps<P> steps(tape.rollout, tape.sampled, tape.returns, plan.samples, tape.greedy,
                                tape.greedy_returns, policy, tape.policy);
    predict(steps, tape.baselines);
    detail::make_advantages(steps, tape.rollout, tape.baselines, config_.discount,
                            config_.normalise, tape.advantages);
    detail::make_dlogits(logits_objective(plan, static_cast<Index>(inputs.size())), plan,
                         tape.rollout, tape.sampled, tape.advantages, logits, tape.log_probability,
                         tape.entropy, tape.dlogits);
    Statistics statistics = detail::make_statistics(
        steps, tape.rollout, tape.rewards, tape.log_probability, tape.entropy, tape.baselines);

    policy.backward(tape.dlogits, tape.policy);
    learn(steps, tape.baselines);
    statistics.gradient_norm =
        gradient_norm(policy, Updates::lazy);  // has the same bits as the dense norm
    return statistics;
  }

  /// Samples Config::samples sequences for each input, at the temperature, as add_gradients() does with
  /// the same key: tape.rollout. Throws std::invalid_argument for an empty batch, for a Config.end that is not
  /// a symbol of the policy, for a logit that is NaN or +infinity, for a row of logits that are all
  /// -infinity, and for logits of the wrong shape.
  void sample(const P& policy, std::span<const Input> inputs, const NoiseKey& key,
              Tape& tape) const {
    check_batch(policy, inputs);
    detail::reset(tape.rollout, static_cast<Index>(inputs.size()) * config_.samples,
                  config_.samples, config_.max_length);
    detail::write_all(policy, inputs, key, sampling(key), tape.rollout, tape.state, tape.terms);
  }

  /// Evaluation: writes a sequence for each input, with the most probable symbol at every step and without
  /// noise: tape.rollout. Throws as sample() does.
  void decode(const P& policy, std::span<const Input> inputs, Tape& tape) const {
    check_batch(policy, inputs);
    detail::reset(tape.rollout, static_cast<Index>(inputs.size()), 1, config_.max_length);
    detail::write_all(policy, inputs, std::nullopt, greedy(), tape.rollout, tape.greedy_state,
                      tape.greedy_terms);
  }

  /// The baseline's parameters, if it has any: "baseline.weight" and "baseline.bias".
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    std::visit(
        [&](auto& baseline) {
          using B = std::remove_cvref_t<decltype(baseline)>;
          if constexpr (requires { B::visit_parameters(baseline, detail::AnyVisitor{}); }) {
            visit("baseline", baseline);
          }
        },
        self.config_.baseline);
  }

 private:
  void check_batch(const P& policy, std::span<const Input> inputs) const {
    detail::require(!inputs.empty(), "Reinforce: the batch is empty");
    detail::require(config_.end < policy.symbols(), "Reinforce::Config.end = ", config_.end,
                    ", the policy has ", policy.symbols(), " symbols");
  }

  // ---- Sequences.

  detail::Sampling sampling(const NoiseKey& key) const {
    return {.temperature = config_.temperature,
            .seed = derive_seed(config_.seed, 0x64696365),
            .key = key,
            .samples = config_.samples,
            .start = config_.start,
            .end = config_.end};
  }
  detail::Sampling greedy() const {
    return {.greedy = true, .start = config_.start, .end = config_.end};
  }

  /// tape.rollout: the sequences that the objective trains.
  void write(const P& policy, std::span<const Input> inputs, std::span<const Reference> references,
             const detail::Plan& plan, const NoiseKey& key, Tape& tape) const {
    Rollout& rollout = tape.rollout;
    const Index rows_of_input = plan.rows_of_input();
    const Index rows = static_cast<Index>(inputs.size()) * rows_of_input;
    detail::reset(rollout, rows, rows_of_input, config_.max_length);
    bool all_forced = true;
    for (Index row = 0; row < rows; ++row) {
      const Index count = plan.is_reference(row) ? config_.max_length : plan.prefix;
      if (count > 0) {
        detail::force(references[detail::to_size(row / rows_of_input)], count, config_.end, row,
                      rollout);
      }
      all_forced = all_forced && plan.is_reference(row);
    }
    if (all_forced) {
      detail::read_all(rollout, sampling(key));
    } else {
      detail::write_all(policy, inputs, key, sampling(key), rollout, tape.state, tape.terms);
    }
  }

  /// Fills tape.greedy and tape.greedy_returns; the greedy sequences start from the same prefix.
  template <class Reward>
  void score_greedy(const P& policy, std::span<const Input> inputs,
                    std::span<const Reference> references, Reward& reward, const detail::Plan& plan,
                    Tape& tape) const {
    Rollout& rollout = tape.greedy;
    detail::reset(rollout, static_cast<Index>(inputs.size()), 1, config_.max_length);
    for (Index row = 0; row < rollout.rows() && plan.prefix > 0; ++row) {
      detail::force(references[detail::to_size(row)], plan.prefix, config_.end, row, rollout);
    }
    detail::write_all(policy, inputs, std::nullopt, greedy(), rollout, tape.greedy_state,
                      tape.greedy_terms);
    detail::call_reward(inputs, reward, rollout, tape.greedy_rewards);
    detail::make_returns(rollout, tape.greedy_rewards, config_.discount, tape.greedy_returns);
  }

  // ---- The gradient pass.

  static const Matrix<Scalar>& forward(const P& policy, std::span<const Input> inputs,
                                       const NoiseKey& key, Tape& tape) {
    const Rollout& rollout = tape.rollout;
    const Matrix<Scalar>& logits = policy.forward(
        inputs, rollout.samples, std::span<const Index>(rollout.previous), key, tape.policy);
    detail::require(
        logits.rows() == rollout.steps * rollout.rows() && logits.cols() == policy.symbols(),
        "Reinforce: the policy's forward gave ", logits.rows(), " x ", logits.cols(),
        " logits for ", rollout.steps, " steps of ", rollout.rows(), " rows and ", policy.symbols(),
        " symbols");
    return logits;
  }

  detail::LogitsObjective logits_objective(const detail::Plan& plan, Index inputs) const {
    return {.temperature = config_.temperature,
            .entropy_bonus = config_.entropy_bonus,
            .sampled_weight = plan.sampled_weight,
            .reference_weight = plan.reference_weight,
            .sequences = static_cast<double>(inputs * std::max<Index>(1, plan.samples)),
            .references = static_cast<double>(inputs)};
  }

  // ---- The baseline.

  bool needs_greedy_rollout() const {
    return std::visit([](const auto& baseline) -> bool { return baseline.needs_greedy_rollout; },
                      config_.baseline);
  }

  void predict(const SampledSteps<P>& steps, std::vector<double>& b) {
    detail::assign(b, steps.count(), 0.0);
    if (steps.count() == 0) return;
    std::visit([&](auto& baseline) { baseline.predict(steps, std::span<double>(b)); },
               config_.baseline);
  }

  void learn(const SampledSteps<P>& steps, std::span<const double> b) {
    if (steps.count() == 0) return;
    std::visit([&](auto& baseline) { baseline.learn(steps, b); }, config_.baseline);
  }

  Config config_;
};

}  // namespace moe
