#pragma once

#include <cmath>
#include <string_view>

#include "moe/matrix.hpp"

/// \file
/// The configurations of low-rank adapters: their size, and the weights that get one.

namespace moe {

/// Adapters of the maps of an expert: W (inputs x outputs) becomes W + factor·A·B, and A (inputs x rank) and
/// B (rank x outputs) are trained instead of W [E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language
/// Models", 2021, eq. 3].
struct LoraConfig {
  Index rank = 8;  ///< r, at least 0; with 0 there are no adapters
  /// factor = alpha / rank. alpha must be finite, and so must the factor as a Scalar.
  double alpha = 16;
  /// factor = alpha / sqrt(rank) [D. Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning
  /// with LoRA", 2023].
  bool rank_stabilized = false;
  /// An adapter on W_1 of the gated form (gate.weight); ignored in the plain form. Unless rank is
  /// 0, at least one map of the network must have an adapter.
  bool gate = true;
  bool up = true;    ///< on W_1 of the plain form and W_3 of the gated one
  bool down = true;  ///< on W_2

  template <class Self, class Visitor>
  static constexpr void visit_fields(Self& self, Visitor visit) {
    visit("rank", self.rank);
    visit("alpha", self.alpha);
    visit("rank_stabilized", self.rank_stabilized);
    visit("gate", self.gate);
    visit("up", self.up);
    visit("down", self.down);
  }
};

/// Adapters on the parameters of a gate whose name is "weight" or ends in ".weight": W_g, but not
/// the weights of the noise.
struct LoraGateConfig {
  Index rank = 8;  ///< r, at least 0; with 0 there are no adapters
  /// factor = alpha / rank. alpha must be finite, and so must the factor as a Scalar.
  double alpha = 16;
  bool rank_stabilized = false;  ///< factor = alpha / sqrt(rank)

  template <class Self, class Visitor>
  static constexpr void visit_fields(Self& self, Visitor visit) {
    visit("rank", self.rank);
    visit("alpha", self.alpha);
    visit("rank_stabilized", self.rank_stabilized);
  }
};

namespace detail {

template <class Config>
double lora_factor(const Config& config) {
  const auto rank = static_cast<double>(config.rank);
  return config.rank == 0 ? 0 : config.alpha / (config.rank_stabilized ? std::sqrt(rank) : rank);
}

/// Throws std::invalid_argument for a field out of range of adapters of Scalars.
template <class Scalar, class Config>
const Config& checked_lora(std::string_view name, const Config& config) {
  require(config.rank >= 0, name, ".rank = ", config.rank, ", must be at least 0");
  require(std::isfinite(config.alpha), name, ".alpha = ", config.alpha, ", must be finite");
  const double factor = lora_factor(config);
  require(std::isfinite(static_cast<Scalar>(factor)), name, ".alpha = ", config.alpha,
          ", gives a factor of ", factor, ", must be finite as a Scalar");
  return config;
}

}  // namespace detail
}  // namespace moe
