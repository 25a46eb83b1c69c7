#pragma once

#include <cmath>
#include <concepts>
#include <span>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/reinforce/plan.hpp"
#include "moe/reinforce/rollout.hpp"

/// \file
/// From rewards to returns.
///
/// R. Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
/// Learning", Machine Learning 8, 1992, cited as [W92].

namespace moe {

/// The reward to go: returns[t] = rewards[t] + discount·returns[t + 1]. A step is credited with the
/// rewards at it and after it. Both have the same length, else std::invalid_argument; they may be the
/// same memory.
inline void rewards_to_go(std::span<const double> rewards, double discount,
                          std::span<double> returns) {
  detail::require(rewards.size() == returns.size(), "rewards_to_go: ", rewards.size(),
                  " rewards, room for ", returns.size(), " returns");
  double sum = 0;
  for (std::size_t t = rewards.size(); t-- > 0;) {
    sum = rewards[t] + discount * sum;
    returns[t] = sum;
  }
}

namespace detail {

/// A reward: a number for (input, symbols so far, whether these are all).
template <class Reward, class Input>
concept RewardOf = requires(Reward& reward, const Input& input, std::span<const Index> sequence) {
  { reward(input, sequence, true) } -> std::convertible_to<double>;
};

/// Calls the reward after every symbol of the rows that have a sampled symbol (a row of a reference has
/// none). rewards is R x max_length.
template <class Input, class Reward>
void call_reward(std::span<const Input> inputs, Reward& reward, const Rollout& rollout,
                 std::vector<double>& rewards) {
  assign(rewards, rollout.rows() * rollout.max_length, 0.0);
  for (Index row = 0; row < rollout.rows(); ++row) {
    if (!has_sampled(rollout, row)) continue;
    const std::span<const Index> sequence = rollout.sequence(row);
    const Input& input = inputs[to_size(row / rollout.samples)];
    for (std::size_t t = 0; t < sequence.size(); ++t) {
      const auto value =
          static_cast<double>(reward(input, sequence.first(t + 1), t + 1 == sequence.size()));
      require(std::isfinite(value), "Reinforce: the reward of row ", row, " at step ", t, " is ",
              value);
      rewards[rollout.at(row, static_cast<Index>(t))] = value;
    }
  }
}

/// returns, like rewards, is R x max_length.
inline void make_returns(const Rollout& rollout, const std::vector<double>& rewards,
                         double discount, std::vector<double>& returns) {
  const std::size_t length = to_size(rollout.max_length);
  resize(returns, static_cast<Index>(rewards.size()));
  for (Index row = 0; row < rollout.rows(); ++row) {
    const std::size_t first = rollout.at(row, 0);
    rewards_to_go(std::span<const double>(rewards).subspan(first, length), discount,
                  std::span<double>(returns).subspan(first, length));
  }
}

/// The return of a sequence: that of its first sampled step.
inline double return_of(const Rollout& rollout, const std::vector<double>& returns, Index row) {
  return returns[rollout.at(row, rollout.forced[to_size(row)])];
}

}  // namespace detail
}  // namespace moe
