#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "moe/nn/linear.hpp"
#include "moe/nn/packed_rows.hpp"
#include "moe/optim/gradient_clipping.hpp"
#include "moe/reinforce/baseline.hpp"
#include "moe/reinforce/policy.hpp"
#include "moe/reinforce/returns.hpp"
#include "moe/reinforce/rollout.hpp"
#include "moe/reinforce/schedule.hpp"

/// \file
/// Training of sequence models by a score that has no derivative.

namespace moe {

namespace detail {

/// A reward: a number for (input, what was written so far, whether that is all of it).
template <class Reward, class Input>
concept RewardOf = requires(Reward& reward, const Input& input, std::span<const Index> sequence) {
  { reward(input, sequence, true) } -> std::convertible_to<double>;
};

}  // namespace detail

/// REINFORCE [W92] for sequences, with the cross-entropy that it starts from and is annealed with
/// [R16]. N sequences, S_n symbols in the n-th, V symbols to choose from, temperature τ:
///
///     cross-entropy   (1/N) Σ_n Σ_t -log π(reference_t | ...)
///     REINFORCE       -(1/N) Σ_n Σ_t A_t·log π_τ(a_t | ...),            a_t sampled from π_τ
///     R_t             Σ_{u >= t} discount^(u - t)·r_u
///     A_t             discount^t·(R_t - b_t),   b_t see Baseline
///     by the logits   (A_t / (N·τ))·(softmax(z_t / τ) - onehot(a_t))
///
/// Both are means over sequences, not over symbols, so the expectation of the second's gradient is,
/// exactly, that of the expected return Σ_t discount^t·r_t of a sequence (the factor discount^t,
/// which many programs leave out, belongs to that). Where a sequence begins with a forced prefix, t
/// counts from its end. The end symbol is a symbol like the others: its step is trained, no step
/// after it is.
///
///     moe::Reinforce<MyPolicy> reinforce({.end = 0, .max_length = 20,
///                                         .baseline = moe::Baseline::leave_one_out, .samples = 4});
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
/// `sequence` is what was written so far, the end symbol included, and `done` says that nothing
/// will follow, either because the end symbol was written or because the length limit was reached.
/// It is called after every symbol, from one thread, in a fixed order; a score of the whole returns
/// 0 until done.
///
/// The only things that it remembers from update to update are the baseline's: the running mean,
/// see running_mean(), and the linear baseline, which has parameters and needs an optimizer of its
/// own:
///
///     moe::zero_gradients(reinforce);                   // with those of the policy
///     if (statistics.sampled_steps > 0) baseline_adam.update(reinforce, 1e-2);
template <Policy P>
class Reinforce {
 public:
  using Scalar = typename P::Scalar;
  using Input = typename P::Input;
  using Reference = std::vector<Index>;  ///< symbols, without the end symbol

  struct Config {
    Index end = 0;         ///< the symbol that ends a sequence
    Index start = -1;      ///< what the policy reads at the first step, at least 0, it need not be
                           ///< one of the V symbols; -1 stands for the end symbol
    Index max_length = 0;  ///< the length limit, the end symbol included, in [1, 1,000,000]; a
                           ///< rollout takes memory for R times as many symbols
    double temperature = 1;  ///< τ > 0 of sampling and of REINFORCE's gradient
    double discount = 1;     ///< in [0, 1]
    Baseline baseline = Baseline::running_mean;
    Index samples = 1;        ///< sequences sampled for an input; at least 2 for leave_one_out
    double mean_rate = 0.05;  ///< how much of the running mean a batch replaces, in (0, 1]
    Index hidden = 0;         ///< W, the width of the policy's state, for the linear baseline
    bool normalise =
        false;  ///< R_t - b_t to mean 0 and standard deviation 1 over a batch's sampled steps,
                ///< which changes their scale and, by the batch's own mean, a little
                ///< of their expectation
    double entropy_bonus = 0;  ///< β >= 0: the gradient of (β/N)·Σ_t (entropy of π_τ at a sampled
                               ///< step) is added, each step by itself: no symbol gets credit for
                               ///< the entropy of later steps
    std::uint64_t seed = 0;  ///< of the dice
  };

  /// Figures of one update. Those of sampled sequences are 0 where sampled_steps is.
  struct Statistics {
    Index sampled_steps = 0;    ///< symbols trained by REINFORCE
    Index forced_steps = 0;     ///< symbols trained by cross-entropy
    double cross_entropy = 0;   ///< nats a forced symbol
    double mean_reward = 0;     ///< mean over sampled sequences of the sum of rewards
    double reward_stddev = 0;   ///< its standard deviation
    double mean_return = 0;     ///< mean over sampled sequences of R at the first sampled step
    double entropy = 0;         ///< nats a sampled step, of π_τ
    double mean_length = 0;     ///< of sampled sequences, the end symbol included
    double truncated = 0;       ///< share of sampled sequences that ran into the length limit
    double baseline_error = 0;  ///< root of the mean squared R_t - b_t over sampled steps
    double gradient_norm = 0;   ///< of all gradients in the policy after this update's were added
  };

  /// The caller's scratch, and what an update left to look at.
  struct Tape {
    Rollout rollout;                      ///< the sequences, rows() = R
    std::vector<double> rewards;          ///< R x max_length
    std::vector<double> returns;          ///< R x max_length, from the first sampled step on
    std::vector<double> log_probability;  ///< R x max_length, as the gradient pass computed them
    std::vector<double> entropy;          ///< R x max_length, at sampled steps
    std::vector<double> advantages;       ///< A_t, one a sampled step, time-major
    Matrix<Scalar> dlogits;               ///< (steps·R) x V
    typename P::Tape policy;

    Rollout greedy;
    std::vector<double> greedy_rewards, greedy_returns;
    std::vector<double> baselines;  ///< one a sampled step
    PackedRows sampled;             ///< the sampled steps among the rows of the logits
    typename P::State state, greedy_state;
    Matrix<Scalar> terms, greedy_terms;
    Matrix<Scalar> hidden;
    Matrix<Scalar> dbaseline;
    typename Linear<Scalar>::Tape linear;
  };

  /// Throws std::invalid_argument for a configuration out of range.
  explicit Reinforce(const Config& config)
      : config_(checked(config)),
        linear_({.inputs = std::max<Index>(1, config.hidden), .outputs = 1}, 0) {
    linear_.weight.value.setZero();
    linear_.bias.value.setZero();
  }

  const Config& config() const { return config_; }
  const RunningMean& running_mean() const { return running_mean_; }
  /// Throws std::invalid_argument unless the sum is finite and the weight in [0, 1].
  void set_running_mean(const RunningMean& mean) {
    detail::require(std::isfinite(mean.sum) && mean.weight >= 0 && mean.weight <= 1,
                    "Reinforce::set_running_mean: sum = ", mean.sum, ", weight = ", mean.weight);
    running_mean_ = mean;
  }

  /// Adds to the policy's gradients those of the objective, to be minimised, and for
  /// Baseline::linear to its own those of the mean squared R_t - b_t.
  ///
  /// `references` has one for each input, and may be empty for {.reinforce = 1}. Give every update
  /// its own key.step: with the same key the same sequences are sampled, and the policy draws the
  /// same noise, in the rollout and in the gradient pass as well. Sample s of input i draws the
  /// dice of token first_token + i·Config::samples + s, so the parts of a batch can draw what the
  /// whole would.
  ///
  /// Throws std::invalid_argument, nothing having been added to any gradient and the running mean
  /// being what it was, for an empty batch, references that are not as many as inputs, too long or
  /// hold a symbol that is out of range or forbidden, a reward, return, baseline or logit that is
  /// not finite, and for logits of the wrong shape. The same holds for exceptions of the reward and
  /// of all functions of the policy but backward.
  template <detail::RewardOf<Input> Reward>
  Statistics add_gradients(P& policy, std::span<const Input> inputs,
                           std::span<const Reference> references, Reward&& reward,
                           const Objective& objective, const NoiseKey& key, Tape& tape) {
    check(policy, inputs, references, objective);
    const Plan plan(objective, config_);
    write(policy, inputs, references, plan, key, tape);
    call_reward(inputs, reward, tape.rollout, tape.rewards);
    make_returns(tape.rollout, tape.rewards, tape.returns);
    if (config_.baseline == Baseline::greedy && plan.samples > 0) {
      score_greedy(policy, inputs, references, reward, plan, tape);
    }

    const Rollout& rollout = tape.rollout;
    const Matrix<Scalar>& logits = policy.forward(
        inputs, rollout.samples, std::span<const Index>(rollout.previous), key, tape.policy);
    detail::require(
        logits.rows() == rollout.steps * rollout.rows() && logits.cols() == policy.symbols(),
        "Reinforce: the policy's forward gave ", logits.rows(), " x ", logits.cols(),
        " logits for ", rollout.steps, " steps of ", rollout.rows(), " rows and ", policy.symbols(),
        " symbols");
    list_sampled(tape);
    make_baselines(policy, plan, tape);
    make_advantages(tape);
    make_dlogits(logits, plan, static_cast<Index>(inputs.size()), tape);
    Statistics statistics = make_statistics(tape);

    policy.backward(tape.dlogits, tape.policy);
    if (config_.baseline == Baseline::linear && tape.sampled.count() > 0) {
      linear_.backward(tape.dbaseline, tape.linear);
    }
    if (statistics.sampled_steps > 0) {
      running_mean_.add(statistics.mean_return, config_.mean_rate);
    }
    statistics.gradient_norm = gradient_norm(policy, Updates::lazy);  // the bits of the dense norm
    return statistics;
  }

  /// Sequences sampled for each input, Config::samples of them at the temperature, as
  /// add_gradients() samples them for the same key. Throws std::invalid_argument for an empty
  /// batch.
  void sample(const P& policy, std::span<const Input> inputs, const NoiseKey& key,
              Tape& tape) const {
    check_batch(policy, inputs);
    detail::reset(tape.rollout, static_cast<Index>(inputs.size()) * config_.samples,
                  config_.samples, config_.max_length);
    detail::write_all(policy, inputs, key, sampling(key), tape.rollout, tape.state, tape.terms);
  }

  /// The most probable symbol at every step, one sequence an input, without noise: evaluation.
  void decode(const P& policy, std::span<const Input> inputs, Tape& tape) const {
    check_batch(policy, inputs);
    detail::reset(tape.rollout, static_cast<Index>(inputs.size()), 1, config_.max_length);
    detail::write_all(policy, inputs, std::nullopt, greedy(), tape.rollout, tape.greedy_state,
                      tape.greedy_terms);
  }

  /// The linear baseline's parameters, "baseline.weight" and "baseline.bias", if that is the one.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    if (self.config_.baseline == Baseline::linear) visit("baseline", self.linear_);
  }

 private:
  /// The rows of an input: `samples` sampled ones, then one for the reference where it is trained.
  struct Plan {
    Plan(const Objective& objective, const Config& config)
        : prefix(objective.prefix),
          samples(objective.reinforce > 0 ? config.samples : 0),
          has_reference(objective.reinforce < 1),
          sampled_weight(objective.reinforce),
          reference_weight(1 - objective.reinforce) {}

    Index rows_of_input() const { return samples + (has_reference ? 1 : 0); }
    bool is_reference(Index row) const { return row % rows_of_input() == samples; }

    Index prefix;
    Index samples;
    bool has_reference;
    double sampled_weight;
    double reference_weight;
  };

  static Config checked(Config config) {
    using detail::require;
    require(config.end >= 0, "Reinforce::Config.end = ", config.end, ", must be at least 0");
    require(config.start >= -1, "Reinforce::Config.start = ", config.start,
            ", must be a symbol, or -1 for the end symbol");
    require(config.max_length >= 1 && config.max_length <= 1'000'000,
            "Reinforce::Config.max_length = ", config.max_length, ", must be in [1, 1000000]");
    require(config.temperature > 0 && std::isnormal(static_cast<Scalar>(1 / config.temperature)) &&
                std::isnormal(static_cast<Scalar>(config.temperature)),
            "Reinforce::Config.temperature = ", config.temperature,
            ", must be above 0 and not beyond the policy's numbers");
    require(config.discount >= 0 && config.discount <= 1,
            "Reinforce::Config.discount = ", config.discount, ", must be in [0, 1]");
    require(config.samples >= 1, "Reinforce::Config.samples = ", config.samples,
            ", must be at least 1");
    require(config.baseline != Baseline::leave_one_out || config.samples >= 2,
            "Reinforce::Config.samples = ", config.samples,
            ", must be at least 2 for Baseline::leave_one_out");
    require(config.mean_rate > 0 && config.mean_rate <= 1,
            "Reinforce::Config.mean_rate = ", config.mean_rate, ", must be in (0, 1]");
    require(config.baseline != Baseline::linear || PolicyWithHidden<P>,
            std::string_view("Reinforce: Baseline::linear needs a policy with hidden(tape)"));
    require(config.baseline != Baseline::linear || config.hidden >= 1,
            "Reinforce::Config.hidden = ", config.hidden,
            ", must be at least 1 for Baseline::linear");
    require(config.entropy_bonus >= 0 && std::isfinite(config.entropy_bonus),
            "Reinforce::Config.entropy_bonus = ", config.entropy_bonus,
            ", must be finite and at least 0");
    if (config.start < 0) config.start = config.end;
    return config;
  }

  void check_batch(const P& policy, std::span<const Input> inputs) const {
    detail::require(!inputs.empty(), "Reinforce: the batch is empty");
    detail::require(config_.end < policy.symbols(), "Reinforce::Config.end = ", config_.end,
                    ", the policy has ", policy.symbols(), " symbols");
  }

  void check(const P& policy, std::span<const Input> inputs, std::span<const Reference> references,
             const Objective& objective) const {
    using detail::require;
    check_batch(policy, inputs);
    require(objective.reinforce >= 0 && objective.reinforce <= 1,
            "Objective.reinforce = ", objective.reinforce, ", must be in [0, 1]");
    require(objective.prefix >= 0, "Objective.prefix = ", objective.prefix, ", must be at least 0");
    const bool unused = objective.reinforce == 1 && objective.prefix == 0;
    require(references.size() == inputs.size() || (unused && references.empty()),
            "Reinforce: ", references.size(), " references for ", inputs.size(), " inputs");
    for (std::size_t i = 0; i < references.size(); ++i) {
      require(static_cast<Index>(references[i].size()) < config_.max_length,
              "Reinforce: reference ", i, " has ", references[i].size(),
              " symbols and an end, Config.max_length = ", config_.max_length);
      for (const Index symbol : references[i]) {
        require(symbol >= 0 && symbol < policy.symbols() && symbol != config_.end,
                "Reinforce: reference ", i, " has symbol ", symbol, "; there are ",
                policy.symbols(), " symbols, of which ", config_.end, " is the end");
      }
    }
  }

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

  /// Puts the first `count` symbols of a reference and its end in place.
  void force(const Reference& reference, Index count, Index row, Rollout& rollout) const {
    const auto length = static_cast<Index>(reference.size()) + 1;
    const Index forced = std::min(count, length);
    rollout.forced[detail::to_size(row)] = forced;
    for (Index t = 0; t < forced; ++t) {
      rollout.symbols[rollout.at(row, t)] =
          t + 1 < length ? reference[detail::to_size(t)] : config_.end;
    }
  }

  /// tape.rollout: the sequences that the objective trains.
  void write(const P& policy, std::span<const Input> inputs, std::span<const Reference> references,
             const Plan& plan, const NoiseKey& key, Tape& tape) const {
    Rollout& rollout = tape.rollout;
    const Index rows_of_input = plan.rows_of_input();
    const Index rows = static_cast<Index>(inputs.size()) * rows_of_input;
    detail::reset(rollout, rows, rows_of_input, config_.max_length);
    bool all_forced = true;
    for (Index row = 0; row < rows; ++row) {
      const Index count = plan.is_reference(row) ? config_.max_length : plan.prefix;
      if (count > 0) force(references[detail::to_size(row / rows_of_input)], count, row, rollout);
      all_forced = all_forced && plan.is_reference(row);
    }
    if (all_forced) {
      detail::read_all(rollout, sampling(key));
    } else {
      detail::write_all(policy, inputs, key, sampling(key), rollout, tape.state, tape.terms);
    }
  }

  static bool has_sampled(const Rollout& rollout, Index row) {
    return rollout.length[detail::to_size(row)] > rollout.forced[detail::to_size(row)];
  }

  /// Calls the reward after every symbol of the rows that have a sampled one, which a reference's
  /// has not.
  template <class Reward>
  static void call_reward(std::span<const Input> inputs, Reward& reward, const Rollout& rollout,
                          std::vector<double>& rewards) {
    detail::assign(rewards, rollout.rows() * rollout.max_length, 0.0);
    for (Index row = 0; row < rollout.rows(); ++row) {
      if (!has_sampled(rollout, row)) continue;
      const std::span<const Index> sequence = rollout.sequence(row);
      const Input& input = inputs[detail::to_size(row / rollout.samples)];
      for (std::size_t t = 0; t < sequence.size(); ++t) {
        const double value =
            static_cast<double>(reward(input, sequence.first(t + 1), t + 1 == sequence.size()));
        detail::require(std::isfinite(value), "Reinforce: the reward of row ", row, " at step ", t,
                        " is ", value);
        rewards[rollout.at(row, static_cast<Index>(t))] = value;
      }
    }
  }

  void make_returns(const Rollout& rollout, const std::vector<double>& rewards,
                    std::vector<double>& returns) const {
    const std::size_t length = detail::to_size(rollout.max_length);
    detail::resize(returns, static_cast<Index>(rewards.size()));
    for (Index row = 0; row < rollout.rows(); ++row) {
      const std::size_t first = rollout.at(row, 0);
      rewards_to_go(std::span<const double>(rewards).subspan(first, length), config_.discount,
                    std::span<double>(returns).subspan(first, length));
    }
  }

  /// tape.greedy and tape.greedy_returns; it starts from the same prefix.
  template <class Reward>
  void score_greedy(const P& policy, std::span<const Input> inputs,
                    std::span<const Reference> references, Reward& reward, const Plan& plan,
                    Tape& tape) const {
    Rollout& rollout = tape.greedy;
    detail::reset(rollout, static_cast<Index>(inputs.size()), 1, config_.max_length);
    for (Index row = 0; row < rollout.rows() && plan.prefix > 0; ++row) {
      force(references[detail::to_size(row)], plan.prefix, row, rollout);
    }
    detail::write_all(policy, inputs, std::nullopt, greedy(), rollout, tape.greedy_state,
                      tape.greedy_terms);
    call_reward(inputs, reward, rollout, tape.greedy_rewards);
    make_returns(rollout, tape.greedy_rewards, tape.greedy_returns);
  }

  /// tape.sampled: the steps that REINFORCE trains, in the order of the rows of the logits.
  static void list_sampled(Tape& tape) {
    const Rollout& rollout = tape.rollout;
    tape.sampled.rows.clear();
    for (Index t = 0; t < rollout.steps; ++t) {
      for (Index row = 0; row < rollout.rows(); ++row) {
        if (t >= rollout.forced[detail::to_size(row)] && t < rollout.length[detail::to_size(row)]) {
          tape.sampled.rows.push_back(t * rollout.rows() + row);
        }
      }
    }
  }

  /// R_t of the i-th sampled step.
  static double return_at(const Tape& tape, Index i) {
    const Index step = tape.sampled.rows[detail::to_size(i)];
    const Index rows = tape.rollout.rows();
    return tape.returns[tape.rollout.at(step % rows, step / rows)];
  }

  /// The sum of a row's rewards, without discount.
  static double reward_of(const Tape& tape, Index row) {
    double sum = 0;
    for (Index t = 0; t < tape.rollout.length[detail::to_size(row)]; ++t) {
      sum += tape.rewards[tape.rollout.at(row, t)];
    }
    return sum;
  }

  /// The return of a sequence: that of its first sampled step.
  static double return_of(const Tape& tape, Index row) {
    return tape.returns[tape.rollout.at(row, tape.rollout.forced[detail::to_size(row)])];
  }

  void make_baselines(const P& policy, const Plan& plan, Tape& tape) const {
    const Rollout& rollout = tape.rollout;
    const Index steps = tape.sampled.count();
    detail::assign(tape.baselines, steps, 0.0);
    if (steps == 0 || config_.baseline == Baseline::none) return;
    if (config_.baseline == Baseline::linear) {
      predict(policy, tape);
      return;
    }
    for (Index i = 0; i < steps; ++i) {
      const Index row = tape.sampled.rows[detail::to_size(i)] % rollout.rows();
      const Index input = row / rollout.samples;
      double& baseline = tape.baselines[detail::to_size(i)];
      if (config_.baseline == Baseline::running_mean) {
        baseline = running_mean_.mean();
      } else if (config_.baseline == Baseline::greedy) {
        baseline = tape.greedy_returns[tape.greedy.at(input, rollout.forced[detail::to_size(row)])];
      } else {
        const Index first = input * rollout.samples;
        for (Index other = first; other < first + plan.samples; ++other) {
          if (other != row) baseline += return_of(tape, other);
        }
        baseline /= static_cast<double>(plan.samples - 1);
      }
    }
  }

  /// The linear baseline's b_t, and the gradient by it of the mean over sampled steps of (R_t -
  /// b_t)². Its input is a copy, and no gradient goes back from it.
  void predict(const P& policy, Tape& tape) const {
    if constexpr (PolicyWithHidden<P>) {
      const Matrix<Scalar>& hidden = policy.hidden(tape.policy);
      detail::require(hidden.rows() == tape.rollout.steps * tape.rollout.rows() &&
                          hidden.cols() == config_.hidden,
                      "Reinforce: the policy's hidden state is ", hidden.rows(), " x ",
                      hidden.cols(), " for ", tape.rollout.steps * tape.rollout.rows(),
                      " rows of logits and Config.hidden = ", config_.hidden);
      tape.sampled.pack(hidden, tape.hidden);
      const Matrix<Scalar>& b = linear_.forward(tape.hidden, tape.linear);
      detail::resize(tape.dbaseline, b.rows(), 1);
      const auto steps = static_cast<double>(b.rows());
      for (Index i = 0; i < b.rows(); ++i) {
        const auto baseline = static_cast<double>(b(i, 0));
        tape.baselines[detail::to_size(i)] = baseline;
        tape.dbaseline(i, 0) = static_cast<Scalar>(2 * (baseline - return_at(tape, i)) / steps);
      }
    }
  }

  void make_advantages(Tape& tape) const {
    detail::resize(tape.advantages, static_cast<Index>(tape.baselines.size()));
    const Index rows = tape.rollout.rows();
    double scale = 0;
    for (Index i = 0; i < tape.sampled.count(); ++i) {
      const double baseline = tape.baselines[detail::to_size(i)];
      const double advantage = return_at(tape, i) - baseline;
      detail::require(std::isfinite(static_cast<Scalar>(advantage)), "Reinforce: row ",
                      tape.sampled.rows[detail::to_size(i)] % rows, " at step ",
                      tape.sampled.rows[detail::to_size(i)] / rows, " has the return ",
                      return_at(tape, i), " and the baseline ", baseline,
                      ", whose difference is not finite");
      tape.advantages[detail::to_size(i)] = advantage;
      scale = std::max({scale, std::abs(return_at(tape, i)), std::abs(baseline)});
    }
    if (config_.normalise) detail::normalise(tape.advantages, scale);
    if (config_.discount == 1) return;
    for (Index i = 0; i < tape.sampled.count(); ++i) {
      const Index step = tape.sampled.rows[detail::to_size(i)];
      const Index t = step / rows - tape.rollout.forced[detail::to_size(step % rows)];
      tape.advantages[detail::to_size(i)] *= std::pow(config_.discount, static_cast<double>(t));
    }
  }

  /// tape.dlogits, and what the statistics need of the softmax.
  void make_dlogits(const Matrix<Scalar>& logits, const Plan& plan, Index inputs,
                    Tape& tape) const {
    const Rollout& rollout = tape.rollout;
    const Index rows = rollout.rows();
    const Index symbols = logits.cols();
    detail::resize_to_zero(tape.dlogits, logits.rows(), symbols);
    detail::assign(tape.log_probability, static_cast<Index>(rollout.symbols.size()), 0.0);
    detail::assign(tape.entropy, static_cast<Index>(rollout.symbols.size()), 0.0);
    const auto references = static_cast<double>(inputs);
    const auto sequences = static_cast<double>(inputs * std::max<Index>(1, plan.samples));
    const Index block = std::max<Index>(1, (Index{1} << 13) / symbols);
    parallel_for_blocks(
        logits.rows(), block, function_work(logits.size()), [&](Index first, Index count) {
          // Advantages are listed in the order of the rows, sampled ones only.
          auto advantage = static_cast<std::size_t>(
              std::lower_bound(tape.sampled.rows.begin(), tape.sampled.rows.end(), first) -
              tape.sampled.rows.begin());
          for (Index i = first; i < first + count; ++i) {
            const Index row = i % rows;
            const Index t = i / rows;
            if (t >= rollout.length[detail::to_size(row)]) continue;
            const std::size_t at = rollout.at(row, t);
            const bool forced = t < rollout.forced[detail::to_size(row)];
            const double temperature = forced ? 1 : config_.temperature;
            const Scalar* x = detail::row_data(logits, i);
            Scalar* dx = detail::row_data(tape.dlogits, i);
            const auto softmax = detail::softmax_row_at(temperature, symbols, x, dx);
            detail::require(std::isfinite(softmax.sum) && std::isfinite(softmax.shift),
                            "Reinforce: the logits of row ", row, " at step ", t,
                            " are not finite");
            const Index symbol = rollout.symbols[at];
            tape.log_probability[at] = detail::log_probability_at(temperature, softmax, x[symbol]);
            detail::require(std::isfinite(tape.log_probability[at]), "Reinforce: symbol ", symbol,
                            " of row ", row, " at step ", t, " has probability 0");
            if (forced) {
              const bool whole = plan.is_reference(row);
              detail::softmax_row_backward(symbols, softmax, symbol,
                                           whole ? plan.reference_weight : plan.sampled_weight,
                                           whole ? references : sequences, dx);
            } else {
              sampled_row(symbols, softmax, x, symbol,
                          plan.sampled_weight * tape.advantages[advantage], plan.sampled_weight,
                          sequences, tape.entropy[at], dx);
              ++advantage;
            }
          }
        });
  }

  /// The gradient at a sampled step: that of REINFORCE, less that of the entropy,
  /// ∂H/∂z = -(1/τ)·p ⊙ (log p + H). dx holds the exponentials.
  void sampled_row(Index symbols, const detail::SoftmaxRow<Scalar>& softmax, const Scalar* x,
                   Index symbol, double advantage, double weight, double sequences, double& entropy,
                   Scalar* dx) const {
    const double count = sequences * config_.temperature;
    const double normaliser = static_cast<double>(softmax.shift) + std::log(softmax.sum);
    const auto for_each_probability = [&](auto&& f) {
      for (Index v = 0; v < symbols; ++v) {
        const double p = static_cast<double>(dx[v]) / softmax.sum;
        const double log_p = static_cast<double>(x[v]) / config_.temperature - normaliser;
        if (std::isfinite(log_p)) f(v, p, log_p);  // forbidden symbols have none
      }
    };
    for_each_probability([&](Index, double p, double log_p) { entropy -= p * log_p; });
    if (config_.entropy_bonus == 0) {
      detail::softmax_row_backward(symbols, softmax, symbol, advantage, count, dx);
      return;
    }
    const double bonus = config_.entropy_bonus * weight;
    for_each_probability([&](Index v, double p, double log_p) {
      const double d = advantage * p + bonus * p * (log_p + entropy);
      dx[v] = static_cast<Scalar>(d / count);
    });
    dx[symbol] -= static_cast<Scalar>(advantage / count);
  }

  static Statistics make_statistics(const Tape& tape) {
    const Rollout& rollout = tape.rollout;
    Statistics s;
    Index sequences = 0;
    double squared_errors = 0;
    for (Index row = 0; row < rollout.rows(); ++row) {
      const Index length = rollout.length[detail::to_size(row)];
      const Index forced = rollout.forced[detail::to_size(row)];
      for (Index t = 0; t < length; ++t) {
        const std::size_t at = rollout.at(row, t);
        if (t < forced) s.cross_entropy -= tape.log_probability[at];
        s.entropy += tape.entropy[at];
      }
      s.forced_steps += forced;
      if (!has_sampled(rollout, row)) continue;
      ++sequences;
      s.sampled_steps += length - forced;
      s.mean_reward += reward_of(tape, row);
      s.mean_return += return_of(tape, row);
      s.mean_length += static_cast<double>(length);
      s.truncated += rollout.truncated[detail::to_size(row)];
    }
    for (Index i = 0; i < tape.sampled.count(); ++i) {
      const double error = return_at(tape, i) - tape.baselines[detail::to_size(i)];
      squared_errors += error * error;
    }
    if (s.forced_steps > 0) s.cross_entropy /= static_cast<double>(s.forced_steps);
    if (sequences == 0) return s;
    const auto count = static_cast<double>(sequences);
    const auto steps = static_cast<double>(s.sampled_steps);
    s.mean_reward /= count;
    s.mean_return /= count;
    s.mean_length /= count;
    s.truncated /= count;
    for (Index row = 0; row < rollout.rows(); ++row) {
      if (!has_sampled(rollout, row)) continue;
      const double difference = reward_of(tape, row) - s.mean_reward;
      s.reward_stddev += difference * difference / count;
    }
    s.reward_stddev = std::sqrt(s.reward_stddev);
    detail::require(std::isfinite(s.mean_return), "Reinforce: the mean return is ", s.mean_return);
    s.entropy /= steps;
    s.baseline_error = std::sqrt(squared_errors / steps);
    return s;
  }

  Config config_;
  RunningMean running_mean_;
  Linear<Scalar> linear_;
};

}  // namespace moe
