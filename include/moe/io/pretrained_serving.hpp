#pragma once

#include <string>
#include <utility>
#include <vector>

#include "moe/io/pretrained.hpp"
#include "moe/weights/serving_layer.hpp"

/// \file
/// A layer of a published model, rounded to narrow weights as it is read.

namespace moe::io {

/// The mixture of a layer of the model as a ServingLayer of RoutedLayer<> or SharedLayer<>:
///
///     using Served = moe::ServingLayer<moe::io::RoutedLayer<>, moe::Int8>;
///     const auto served = moe::io::load_serving<Served>(model, 0);
///
/// The experts are read and rounded one after the other, so that at most one with wide weights is
/// in memory. The result has the bits of ServingLayer(model.load_layer<Layer>(layer)). Throws
/// std::runtime_error like Pretrained::load_layer(), and std::invalid_argument, which names the
/// expert, the weight and the value, if a weight cannot be narrowed or the format does not support
/// the activations of `options`.
///
/// `config` is model.layer_config<Layer>(layer) with changes that leave the shapes as they are, such as a
/// larger capacity; std::invalid_argument is thrown for other shapes, and std::runtime_error for a
/// field out of range.
template <class Serving>
Serving load_serving(const Pretrained& model, Index layer,
                     const typename Serving::Layer::Config& config,
                     const NarrowOptions& options = {}) {
  using Layer = typename Serving::Layer;
  using Gate = typename Serving::Gate;
  using Expert = typename Serving::Expert;
  const detail::MixtureSource source(model.checkpoint(), model.mixture(layer),
                                     detail::has_shared_gate<Layer>);
  const auto whole =
      detail::with_config(model.config().path(), layer, [&] { return Layer::completed(config); });
  Gate gate =
      detail::with_config(model.config().path(), layer, [&] { return Gate(whole.gate, 0); });
  FeedForward<float> wide = detail::with_config(
      model.config().path(), layer, [&] { return FeedForward<float>::zeros(whole.expert); });
  source.read(gate, "gate.");
  std::vector<Expert> experts;
  for (Index e = 0; e < gate.experts(); ++e) {
    const std::string prefix = "experts." + std::to_string(e) + ".";
    source.read(wide, prefix);
    experts.emplace_back(typename Expert::Network(wide, options, prefix), whole.width);
  }
  return Serving(detail::config_with<Serving>(whole, whole.expert, whole.gate), std::move(gate),
                 std::move(experts), options);
}
/// The same with the model's own configuration.
template <class Serving>
Serving load_serving(const Pretrained& model, Index layer, const NarrowOptions& options = {}) {
  return load_serving<Serving>(
      model, layer, model.template layer_config<typename Serving::Layer>(layer), options);
}

}  // namespace moe::io
