#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "moe/adapt/lora.hpp"
#include "moe/weights/serving_layer.hpp"

/// \file
/// Adapters on narrow weights: `Lora<FeedForward, Int8>`, a layer that takes a quarter of the memory while
/// it is adapted, and a model of which only the narrow file is there.

namespace moe {

namespace detail {

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
  static void freeze(Weight&) {}
  static Matrix<float> numbers(const Weight& weight) { return weight.matrix.decoded(); }
};

}  // namespace detail

/// A served layer with adapters on its experts; gate, biases and narrow weights are frozen. y is that of
/// `layer` at the start, and gradients are those of the layer whose weights are what the narrow ones stand
/// for. Copies of narrow weights share their memory; where it is a mapped file's, which could change while
/// it is used, they are read from the file into memory here.
///
/// Throws std::invalid_argument for a configuration out of range.
template <class Layer, detail::NarrowFormat Format>
MoELayer<Lora<FeedForward, Format>, typename Layer::Gate> adapt(
    const ServingLayer<Layer, Format>& layer, const LoraConfig& lora, Seed seed) {
  using Adapted = Lora<FeedForward, Format>;
  using To = MoELayer<Adapted, typename Layer::Gate>;
  return To(
      detail::config_with<To>(
          layer, LoraFeedForwardConfig{layer.config().width, layer.config().expert, lora},
          layer.config().gate),
      detail::frozen(layer.gate()),
      detail::adapted_experts<Adapted>(layer.experts(), 0, lora, seed, [&](const auto& network) {
        auto copy = network;
        if (layer.is_mapped()) copy.hold_weights();
        return copy;
      }));
}

}  // namespace moe
