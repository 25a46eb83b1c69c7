#pragma once

#include <cmath>
#include <cstdint>
#include <variant>

#include "moe/matrix.hpp"

/// \file
/// The configuration of Reinforce, and its checks.

namespace moe {

/// Reinforce::Config. `Baseline` is a std::variant of baselines, see baseline.hpp.
template <class Baseline>
struct ReinforceConfig {
  Index end = 0;         ///< the symbol that ends a sequence, in [0, V)
  Index start = -1;      ///< the number that the policy reads at the first step, at least 0, not
                         ///< necessarily one of the V symbols; -1 stands for the end symbol
  Index max_length = 0;  ///< the length limit, the end symbol included, in [1, 1,000,000]; a
                         ///< rollout takes memory for R·max_length symbols
  /// τ of sampling and of REINFORCE's gradient, above 0; τ and 1/τ must be normal numbers of the policy's
  /// Scalar.
  double temperature = 1;
  double discount = 1;  ///< in [0, 1]
  Baseline baseline{};  ///< initially the first one, RunningMeanBaseline by default
  /// Sequences sampled for an input, at least 1; at least 2 for LeaveOneOutBaseline.
  Index samples = 1;

  /// Whether R_t - b_t is shifted to mean 0 and scaled to standard deviation 1 over the sampled steps of a
  /// batch. This changes the scale of the gradient and, since the mean is that of the batch itself,
  /// slightly its expectation.
  bool normalise = false;

  /// β >= 0: subtracts (β/N)·Σ_t (entropy of π_τ at sampled step t) from the REINFORCE objective,
  /// which is minimised. Each step counts by itself: a symbol is not credited with the entropy of
  /// later steps.
  double entropy_bonus = 0;
  std::uint64_t seed = 0;  ///< of the sampling
};

namespace detail {

/// The configuration with the start symbol resolved. Throws std::invalid_argument for a field out
/// of range. `Scalar` is the policy's.
template <class Scalar, class Baseline>
ReinforceConfig<Baseline> checked(ReinforceConfig<Baseline> config) {
  require(config.end >= 0, "Reinforce::Config.end = ", config.end, ", must be at least 0");
  require(config.start >= -1, "Reinforce::Config.start = ", config.start,
          ", must be at least 0, or -1 for the end symbol");
  require(config.max_length >= 1 && config.max_length <= 1'000'000,
          "Reinforce::Config.max_length = ", config.max_length, ", must be in [1, 1000000]");
  require(config.temperature > 0 && std::isnormal(static_cast<Scalar>(1 / config.temperature)) &&
              std::isnormal(static_cast<Scalar>(config.temperature)),
          "Reinforce::Config.temperature = ", config.temperature,
          ", must be above 0, and both it and 1 / temperature must be normal numbers of the "
          "policy's Scalar");
  require(config.discount >= 0 && config.discount <= 1,
          "Reinforce::Config.discount = ", config.discount, ", must be in [0, 1]");
  require(config.samples >= 1, "Reinforce::Config.samples = ", config.samples,
          ", must be at least 1");
  require(config.entropy_bonus >= 0 && std::isfinite(config.entropy_bonus),
          "Reinforce::Config.entropy_bonus = ", config.entropy_bonus,
          ", must be finite and at least 0");
  std::visit([&](const auto& baseline) { baseline.check(config.samples); }, config.baseline);
  if (config.start < 0) config.start = config.end;
  return config;
}

}  // namespace detail
}  // namespace moe
