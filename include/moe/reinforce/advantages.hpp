#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "moe/reinforce/sampled_steps.hpp"

/// \file
/// From returns and baselines to advantages.

namespace moe::detail {

/// Shifts values to mean 0 and scales them to standard deviation 1. The values are differences of
/// numbers of size `scale`; if they vary by no more than the rounding of such numbers, they all
/// become 0.
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

/// A_t = discount^t·(R_t - b_t) of every sampled step, R_t - b_t being normalised first if
/// `normalised`; t counts from the end of the row's forced prefix. Throws std::invalid_argument
/// where R_t - b_t is not finite as the policy's Scalar.
template <Policy P>
void make_advantages(const SampledSteps<P>& steps, const Rollout& rollout,
                     std::span<const double> baselines, double discount, bool normalised,
                     std::vector<double>& advantages) {
  resize(advantages, steps.count());
  double scale = 0;
  for (Index i = 0; i < steps.count(); ++i) {
    const double baseline = baselines[to_size(i)];
    const double advantage = steps.return_at(i) - baseline;
    require(std::isfinite(static_cast<typename P::Scalar>(advantage)), "Reinforce: row ",
            steps.row(i), " at step ", steps.t(i), " has the return ", steps.return_at(i),
            " and the baseline ", baseline, ", whose difference is not finite");
    advantages[to_size(i)] = advantage;
    scale = std::max({scale, std::abs(steps.return_at(i)), std::abs(baseline)});
  }
  if (normalised) normalise(advantages, scale);
  if (discount == 1) return;
  for (Index i = 0; i < steps.count(); ++i) {
    const Index t = steps.t(i) - rollout.forced[to_size(steps.row(i))];
    advantages[to_size(i)] *= std::pow(discount, static_cast<double>(t));
  }
}

}  // namespace moe::detail
