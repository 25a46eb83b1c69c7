#pragma once

#include <cstdint>
#include <utility>

#include "moe/kernels/activations.hpp"
#include "moe/matrix.hpp"
#include "moe/random.hpp"

/// \file
/// The configuration of a layer, and arguments of its functions.

namespace moe {

/// The configuration of MoELayer, whatever its dispatch policy.
template <class Expert, class Gate>
struct MoELayerConfig {
  Index width = 0;                   ///< D, at least 1
  typename Expert::Config expert{};  ///< of every expert
  typename Gate::Config gate{};      ///< has the number of experts
  /// The number of the gate's experts, the last ones, that are the identity instead of a network:
  /// at least 0, and fewer than all.
  Index identity_experts = 0;
  /// Of the weighted sum of the experts' outputs, which gives y; [S17 App. C.1] has a sigmoid.
  Activation output = Activation::identity;
  Seed seed;  ///< of the initial weights and of the gate's noise

  template <class Self, class Visitor>
  static constexpr void visit_fields(Self& self, Visitor visit) {
    visit("width", self.width);
    visit("expert", self.expert);
    visit("gate", self.gate);
    visit("identity_experts", self.identity_experts);
    visit("output", self.output);
    visit("seed", self.seed);
  }
};

namespace detail {

/// The seed of a layer's gate.
inline std::uint64_t gate_seed(std::uint64_t of_layer) { return derive_seed(of_layer, 0); }

/// The configuration of a layer with other experts or another gate.
template <class To, class Config, class ExpertConfig, class GateConfig>
typename To::Config config_with(const Config& config, ExpertConfig expert, GateConfig gate) {
  return {.width = config.width,
          .expert = std::move(expert),
          .gate = std::move(gate),
          .identity_experts = config.identity_experts,
          .output = config.output,
          .seed = config.seed};
}

}  // namespace detail

/// How MoELayer::copy_experts() makes copies differ from their originals.
struct CopyNoise {
  double noise_stddev = 0;  ///< of the normal noise on what is copied, finite and at least 0
  Seed seed;                ///< of the noise
};

}  // namespace moe
