#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "moe/reinforce/sampled_steps.hpp"

/// \file
/// The statistics of an update of Reinforce.

namespace moe {

/// Figures of one update. Those of sampled sequences are 0 if sampled_steps is 0.
struct ReinforceStatistics {
  Index sampled_steps = 0;    ///< symbols trained by REINFORCE
  Index forced_steps = 0;     ///< symbols trained by cross-entropy
  double cross_entropy = 0;   ///< nats per forced symbol
  double mean_reward = 0;     ///< mean over sampled sequences of the sum of rewards
  double reward_stddev = 0;   ///< standard deviation of that sum over sampled sequences
  double mean_return = 0;     ///< mean over sampled sequences of R at the first sampled step
  double entropy = 0;         ///< nats per sampled step, of π_τ
  double mean_length = 0;     ///< of sampled sequences, the end symbol included
  double truncated = 0;       ///< share of sampled sequences that were cut at the length limit
  double baseline_error = 0;  ///< root of the mean squared R_t - b_t over sampled steps
  double gradient_norm = 0;   ///< of all gradients of the policy, after this update's were added
};

namespace detail {

/// The sum of a row's rewards, without discount.
inline double reward_of(const Rollout& rollout, const std::vector<double>& rewards, Index row) {
  double sum = 0;
  for (Index t = 0; t < rollout.length[to_size(row)]; ++t) sum += rewards[rollout.at(row, t)];
  return sum;
}

/// All but gradient_norm. rewards, log_probability and entropy are R x max_length, baselines has
/// one entry per sampled step. Throws std::invalid_argument if the mean return is not finite.
template <Policy P>
ReinforceStatistics make_statistics(const SampledSteps<P>& steps, const Rollout& rollout,
                                    const std::vector<double>& rewards,
                                    const std::vector<double>& log_probability,
                                    const std::vector<double>& entropy,
                                    std::span<const double> baselines) {
  ReinforceStatistics s;
  Index sequences = 0;
  for (Index row = 0; row < rollout.rows(); ++row) {
    const Index length = rollout.length[to_size(row)];
    const Index forced = rollout.forced[to_size(row)];
    for (Index t = 0; t < length; ++t) {
      const std::size_t at = rollout.at(row, t);
      if (t < forced) s.cross_entropy -= log_probability[at];
      s.entropy += entropy[at];
    }
    s.forced_steps += forced;
    if (!has_sampled(rollout, row)) continue;
    ++sequences;
    s.sampled_steps += length - forced;
    s.mean_reward += reward_of(rollout, rewards, row);
    s.mean_length += static_cast<double>(length);
    s.truncated += rollout.truncated[to_size(row)];
  }
  if (s.forced_steps > 0) s.cross_entropy /= static_cast<double>(s.forced_steps);
  if (sequences == 0) return s;
  const auto count = static_cast<double>(sequences);
  s.mean_reward /= count;
  s.mean_return = steps.mean_return();
  s.mean_length /= count;
  s.truncated /= count;
  for (Index row = 0; row < rollout.rows(); ++row) {
    if (!has_sampled(rollout, row)) continue;
    const double difference = reward_of(rollout, rewards, row) - s.mean_reward;
    s.reward_stddev += difference * difference / count;
  }
  s.reward_stddev = std::sqrt(s.reward_stddev);
  require(std::isfinite(s.mean_return), "Reinforce: the mean return is ", s.mean_return);
  double squared_errors = 0;
  for (Index i = 0; i < steps.count(); ++i) {
    const double error = steps.return_at(i) - baselines[to_size(i)];
    squared_errors += error * error;
  }
  s.entropy /= static_cast<double>(s.sampled_steps);
  s.baseline_error = std::sqrt(squared_errors / static_cast<double>(s.sampled_steps));
  return s;
}

}  // namespace detail
}  // namespace moe
