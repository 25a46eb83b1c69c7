#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "moe/adapt/lora_feed_forward.hpp"
#include "moe/adapt/lora_gate.hpp"
#include "moe/layer/moe_layer.hpp"

/// \file
/// Adds low-rank adapters to a trained layer, and merges them into it.

namespace moe {

namespace detail {

/// Experts `first`, first + 1, ... with adapters. The adapters of an expert are drawn from the seed
/// and its number; base(network) is the network that gets them.
template <class Adapted, class Expert, class Base>
std::vector<Adapted> adapted_experts(std::span<const Expert> from, Index first,
                                     const LoraConfig& lora, Seed seed, Base&& base) {
  std::vector<Adapted> experts;
  experts.reserve(from.size());
  for (const Expert& expert : from) {
    check_shapes(expert, "adapt: an expert");
    const auto number = static_cast<std::uint64_t>(first) + experts.size();
    experts.emplace_back(
        typename Adapted::Network(base(expert.network()), lora, derive_seed(seed, number + 1)),
        expert.width());
  }
  return experts;
}
/// The same for the experts of a layer that are on this rank.
template <class Adapted, class Layer>
std::vector<Adapted> adapted_experts(const Layer& layer, const LoraConfig& lora, Seed seed) {
  const auto& policy = layer.dispatch_policy();
  return policy.together("adapt: the experts", [&] {
    const Index networks = layer.gate().experts() - layer.config().identity_experts;
    return adapted_experts<Adapted>(
        layer.experts(), policy.experts_here(networks).first, lora, seed,
        [](const auto& network) -> const auto& { return network; });
  });
}

/// A module with all parameters frozen, and without the memory of their gradients.
template <class Module>
Module frozen(Module module) {
  walk_parameters(module, [](const ParameterName&, auto& p) {
    p.trained = false;
    p.stored.memory.resize(0, 0);
    if (p.stored.state != GradientState::untracked) p.stored.state = GradientState::zero;
  });
  return module;
}

/// A module that trains the parameters that a fresh module of this configuration trains.
template <class Module>
Module unfrozen(Module module, const typename Module::Config& config) {
  const Module fresh(config, 0);
  std::vector<const Parameter<typename Module::Scalar>*> of_fresh;
  walk_together(module, fresh, of_fresh,
                [](auto& p, const auto& as_made) { p.trained = as_made.trained; });
  return module;
}

}  // namespace detail

/// A copy of a layer with adapters on its experts. All other parameters are frozen, the gate's too
/// (set their `trained` to train them). Before training, y is that of `layer`.
///
///     auto adapted = moe::adapt(layer, moe::LoraConfig{.rank = 8}, moe::Seed{1});
///     // train `adapted` as any layer, then
///     auto plain = moe::merged(adapted);
///
/// A layer whose experts are spread over ranks needs a dispatch policy for the new layer, `policy`.
/// Equal seeds draw equal adapters. Throws std::invalid_argument for a configuration out of range, or if
/// a parameter of an expert has another shape than its Config says.
template <class Scalar, class Gate, class Dispatch>
MoELayer<Lora<FeedForward, Scalar>, Gate, Dispatch> adapt(
    const MoELayer<Expert<FeedForward, Scalar>, Gate, Dispatch>& layer, const LoraConfig& lora,
    Seed seed, Dispatch policy = Dispatch()) {
  using Adapted = Lora<FeedForward, Scalar>;
  using Layer = MoELayer<Adapted, Gate, Dispatch>;
  return Layer(
      detail::config_with<Layer>(
          layer.config(), LoraFeedForwardConfig{layer.config().width, layer.config().expert, lora},
          layer.config().gate),
      detail::frozen(layer.gate()), detail::adapted_experts<Adapted>(layer, lora, seed),
      std::move(policy));
}

/// The same with adapters on the gate's weights too. It also throws std::invalid_argument if
/// gate.rank > 0 and the gate has no parameter to adapt.
template <class Scalar, class Gate, class Dispatch>
MoELayer<Lora<FeedForward, Scalar>, LoraGate<Gate>, Dispatch> adapt(
    const MoELayer<Expert<FeedForward, Scalar>, Gate, Dispatch>& layer, const LoraConfig& lora,
    const LoraGateConfig& gate, Seed seed, Dispatch policy = Dispatch()) {
  using Adapted = Lora<FeedForward, Scalar>;
  using Layer = MoELayer<Adapted, LoraGate<Gate>, Dispatch>;
  auto adapted = layer.dispatch_policy().together("adapt: the gate", [&] {
    return LoraGate<Gate>(detail::frozen(layer.gate()), gate, derive_seed(seed, 0));
  });
  return Layer(
      detail::config_with<Layer>(
          layer.config(), LoraFeedForwardConfig{layer.config().width, layer.config().expert, lora},
          adapted.config()),
      std::move(adapted), detail::adapted_experts<Adapted>(layer, lora, seed), std::move(policy));
}

namespace detail {

// A gate without its adapters, and its part of a layer's configuration.

template <class Gate>
const Gate& merged_gate(const Gate& gate) {
  return gate;
}
template <class Gate>
Gate merged_gate(const LoraGate<Gate>& gate) {
  return gate.merged();
}
template <class Gate>
const auto& merged_gate_config(const Gate&, const typename Gate::Config& config) {
  return config;
}
template <class Gate>
const auto& merged_gate_config(const LoraGate<Gate>&,
                               const typename LoraGate<Gate>::Config& config) {
  return config.gate;
}

}  // namespace detail

/// The layer without adapters that computes the same up to rounding. Its weights are W +
/// factor·A·B, where W are the decoded weights if they are narrow, and its parameters are trained
/// as in a fresh layer. `policy` is the new layer's dispatch policy, as in adapt(). Throws
/// std::invalid_argument if a parameter of an expert or of an adapted gate no longer has its
/// original shape.
template <class Stored, class Gate, class Dispatch>
auto merged(const MoELayer<Lora<FeedForward, Stored>, Gate, Dispatch>& layer,
            Dispatch policy = Dispatch()) {
  using Scalar = typename Lora<FeedForward, Stored>::Scalar;
  using Plain = Expert<FeedForward, Scalar>;
  const auto& gate_config = detail::merged_gate_config(layer.gate(), layer.config().gate);
  const auto& before = layer.dispatch_policy();
  auto gate = before.together("merged: the gate", [&] {
    return detail::unfrozen(detail::merged_gate(layer.gate()), gate_config);
  });
  using Layer = MoELayer<Plain, decltype(gate), Dispatch>;
  auto experts = before.together("merged: the experts", [&] {
    std::vector<Plain> plain;
    plain.reserve(layer.experts().size());
    for (const auto& expert : layer.experts()) {
      plain.emplace_back(expert.network().merged(), layer.config().width);
    }
    return plain;
  });
  const auto config =
      detail::config_with<Layer>(layer.config(), layer.config().expert.network, gate_config);
  return Layer(config, std::move(gate), std::move(experts), std::move(policy));
}

}  // namespace moe
