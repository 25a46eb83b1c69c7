#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/experts/feed_forward.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/io/pretrained/mixture.hpp"
#include "moe/io/safetensors/messages.hpp"
#include "moe/layer/moe_layer.hpp"

/// \file
/// The configuration of a layer for a mixture.

namespace moe::io {

/// The type of layer for a mixture without shared experts.
template <class Scalar = float>
using RoutedLayer = MoELayer<Expert<FeedForward, Scalar>, TopKGate<Scalar>>;
/// The type of layer for any mixture, with shared experts or without.
template <class Scalar = float>
using SharedLayer = MoELayer<Expert<FeedForward, Scalar>, SharedExpertGate<TopKGate<Scalar>>>;

}  // namespace moe::io

namespace moe::detail {

template <class Layer>
inline constexpr bool has_shared_gate = requires(typename Layer::Config& config) {
  config.gate.routed;
};

/// Throws std::runtime_error, which names the type to use, if Layer cannot compute the mixture.
template <class Layer>
typename Layer::Config layer_config(const std::string& path, const io::Mixture& mixture) {
  typename Layer::Config config{.seed = 0};
  static_assert(std::is_same_v<std::remove_cvref_t<decltype(config.expert)>,
                               typename FeedForward<typename Layer::Scalar>::Config>,
                "a layer of a published model has FeedForward experts: use moe::io::RoutedLayer or "
                "moe::io::SharedLayer");
  config.width = mixture.width;
  config.expert.hidden = mixture.hidden;
  config.expert.activation = mixture.activation;
  config.expert.gated = mixture.gated;
  config.expert.bias = mixture.bias;
  config.expert.limit = mixture.limit;
  config.expert.linear_offset = mixture.linear_offset;
  config.expert.weighted_input = mixture.weighted_input;
  if constexpr (has_shared_gate<Layer>) {
    config.gate.shared = mixture.shared;
    config.gate.gated = mixture.shared_gated;
    config.gate.tied = mixture.shared_gated;
    config.gate.routed = mixture.gate;
  } else {
    static_assert(std::is_same_v<std::remove_cvref_t<decltype(config.gate)>, TopKConfig>,
                  "a layer of a published model has a TopKGate, or a SharedExpertGate around one: "
                  "use moe::io::RoutedLayer or moe::io::SharedLayer");
    if (mixture.shared > 0) {
      fail_file(path, "layer ", mixture.layer, " has shared experts, ", mixture.shared,
                " of them: use moe::io::SharedLayer, "
                "MoELayer<Expert<FeedForward>, SharedExpertGate<TopKGate<>>>");
    }
    config.gate = mixture.gate;
  }
  return config;
}

/// A layer whose experts' parameters are all 0, to be overwritten: drawing initial ones would take longer than
/// reading those of a file.
template <class Layer>
Layer layer_of_zeros(const typename Layer::Config& config) {
  const auto whole = Layer::completed(config);
  typename Layer::Gate gate(whole.gate, gate_seed(whole.seed));
  std::vector<typename Layer::Expert> experts;
  const Index networks = gate.experts() - whole.identity_experts;
  experts.reserve(to_size(networks));
  for (Index e = 0; e < networks; ++e) {
    experts.emplace_back(Layer::Expert::Network::zeros(whole.expert), whole.width);
  }
  return Layer(whole, std::move(gate), std::move(experts));
}

/// Calls make(), which uses a configuration from config.json. Turns its std::invalid_argument into
/// a std::runtime_error that names the file and the layer.
template <class F>
auto with_config(const std::string& path, Index layer, F&& make) {
  try {
    return make();
  } catch (const std::invalid_argument& error) {
    fail_file(path, "layer ", layer, ": ", error.what());
  }
}

}  // namespace moe::detail
