#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "moe/adapt/lora.hpp"
#include "moe/weights/serving_layer.hpp"

/// \file
/// Adapters on narrow weights, `Lora<FeedForward, Int8>`: to adapt a layer in a quarter of the
/// memory, or a model that exists only as a file of narrow weights.

namespace moe {

namespace detail {

/// Narrow weights are never trained; the copy shares their memory.
template <NarrowFormat Format>
NarrowWeight<Format> frozen_copy(const NarrowWeight<Format>& from) {
  return from;
}

template <NarrowFormat Format>
struct LoraBase<Format> {
  using Scalar = float;
  using Weight = NarrowWeight<Format>;
  using Network = NarrowFeedForward<Format>;

  template <class F>
  static void visit_parts(const Network& network, F&& f) {
    Network::visit_weights(network, f);
    Network::visit_parameters(network, f);
  }
  static Network make(const FeedForwardConfig& config, std::uint64_t seed) {
    return Network(FeedForward<float>(config, seed));
  }
  static Matrix<float> numbers(const Weight& weight) { return weight.matrix.decoded(); }
};

}  // namespace detail

/// A layer with narrow weights and with adapters on its experts; gate, biases and narrow weights are frozen.
/// Before training, y is that of `layer`; gradients are those of a layer with the decoded weights, as if
/// activations were not rounded. The narrow weights share their memory with those of `layer`,
/// unless those are in a mapped file, which could change: then they are copied.
///
/// The narrow weights are not parameters, so save_module() could not store them and refuses such a layer: keep
/// the file of the served layer, and save the adapters with save_adapters().
///
/// Throws std::invalid_argument for a configuration out of range, and std::runtime_error if a mapped file has
/// changed.
template <class Layer, detail::NarrowFormat Format>
MoELayer<Lora<FeedForward, Format>, typename Layer::Gate> adapt(
    const ServingLayer<Layer, Format>& layer, const LoraConfig& lora, Seed seed) {
  using Adapted = Lora<FeedForward, Format>;
  using To = MoELayer<Adapted, typename Layer::Gate>;
  layer.check_weights();
  To adapted(
      detail::config_with<To>(
          layer.config(), LoraFeedForwardConfig{layer.config().width, layer.config().expert, lora},
          layer.config().gate),
      detail::frozen(layer.gate()),
      detail::adapted_experts<Adapted>(layer.experts(), 0, lora, seed, [&](const auto& network) {
        auto copy = network;
        if (layer.is_mapped()) copy.own_weights();
        return copy;
      }));
  layer.check_weights();
  return adapted;
}

}  // namespace moe
