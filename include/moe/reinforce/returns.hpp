#pragma once

#include <cmath>
#include <span>

#include "moe/matrix.hpp"

/// \file
/// From rewards to advantages.
///
/// R. Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
/// Learning", Machine Learning 8, 1992, cited as [W92].

namespace moe {

/// The reward to go: returns[t] = rewards[t] + discount·returns[t + 1]. A step gets credit for what
/// comes at it and after it, and none for what came before. Both have the same length, else
/// std::invalid_argument; they may be the same memory.
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

/// Moves values to mean 0 and scales them to standard deviation 1. They are differences of numbers
/// of size `scale`: those that differ by no more than its rounding become 0.
inline void normalise(std::span<double> values, double scale) {
  const auto count = static_cast<double>(values.size());
  double mean = 0;
  for (const double value : values) mean += value / count;
  double variance = 0;
  for (const double value : values) variance += (value - mean) * (value - mean) / count;
  const double stddev = std::sqrt(variance);
  const bool constant = stddev <= 1e-12 * scale;
  for (double& value : values) value = constant ? 0 : (value - mean) / stddev;
}

}  // namespace detail
}  // namespace moe
