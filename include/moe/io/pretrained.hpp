#pragma once

#include <algorithm>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "moe/io/pretrained/checkpoint.hpp"
#include "moe/io/pretrained/families.hpp"
#include "moe/io/pretrained/layer_config.hpp"
#include "moe/io/pretrained/layer_tensors.hpp"
#include "moe/io/pretrained/mixture.hpp"
#include "moe/io/pretrained/model_config.hpp"
#include "moe/io/safetensors.hpp"

/// \file
/// Reads the mixtures of published models from a folder in which Hugging Face's transformers saved a model,
/// and writes them with the same names. docs/pretrained.md lists the families.
///
/// Needs nlohmann-json, as moe/io/safetensors.hpp does; CMake: link moe::io.

namespace moe::io {

/// A published model: the config.json and the (sharded) safetensors files of a folder.
///
///     const auto model = moe::io::open_pretrained("Mixtral-8x7B-v0.1");
///     for (const moe::io::Mixture& mixture : model.mixtures()) ...   // layer, width, hidden, gate, shared
///     auto layer = model.load_layer<moe::io::RoutedLayer<>>(0);
///
/// const members may be called by several threads at once.
class Pretrained {
 public:
  /// See open_pretrained().
  Pretrained(const std::string& folder, std::span<const Family> more)
      : config_((std::filesystem::path(folder) / "config.json").string()),
        checkpoint_(folder),
        model_type_(config_.text("model_type")) {
    std::vector<Family> families(more.begin(), more.end());
    for (Family& family : known_families()) families.push_back(std::move(family));
    const auto family = std::find_if(families.begin(), families.end(),
                                     [&](const Family& f) { return f.model_type == model_type_; });
    if (family == families.end()) {
      std::string known;
      for (const Family& f : families) known += (known.empty() ? "" : ", ") + f.model_type;
      config_.refuse("model_type", "one of " + known);
    }
    mixtures_ = detail::mixtures_of(*family, config_);
  }

  /// The model_type in config.json.
  const std::string& model_type() const { return model_type_; }
  /// The settings in config.json.
  const ModelConfig& config() const { return config_; }
  /// The tensors.
  const Checkpoint& checkpoint() const { return checkpoint_; }

  /// All mixtures of the model, in the order of the layers.
  std::span<const Mixture> mixtures() const { return mixtures_; }
  /// The mixture of a layer of the model. Throws std::runtime_error if the layer has none.
  const Mixture& mixture(Index layer) const {
    std::string layers;
    for (const Mixture& mixture : mixtures_) {
      if (mixture.layer == layer) return mixture;
      layers += (layers.empty() ? "" : ", ") + std::to_string(mixture.layer);
    }
    detail::fail_file(config_.path(), "layer ", layer, " is not a mixture, the mixtures are ",
                      layers.empty() ? "none" : layers);
  }

  /// The configuration of a layer that computes the same as that of the model. The gate's losses and noise are
  /// left out: set them as needed. Throws std::runtime_error if there is no such mixture, or if Layer cannot
  /// compute it; then it names the type that can.
  template <class Layer>
  typename Layer::Config layer_config(Index layer) const {
    return detail::layer_config<Layer>(config_.path(), mixture(layer));
  }

  /// Reads a layer's parameters, converted to its Scalar. If the layer is spread over several processes, each
  /// reads its own experts. Besides the layer, reading takes memory for the scales of the
  /// mixture's tensors, and for 2^16 numbers, or for a row of a tensor if a row has more.
  ///
  /// Throws std::runtime_error, with nothing changed, unless every parameter has a tensor of a known type and
  /// of the shape that follows from config.json, and the mixture has no other tensors; the message names the
  /// file, the tensor and the shapes. Throws std::invalid_argument, with nothing changed, if the layer has
  /// other shapes. If reading fails, some of the parameters may have been overwritten.
  template <class Layer>
  void read_layer(Index layer, Layer& into) const {
    detail::MixtureSource(checkpoint_, mixture(layer), detail::has_shared_gate<Layer>).read(into);
  }

  /// A new layer with the parameters of a layer of the model. Throws std::runtime_error, which
  /// names the file, as layer_config() and read_layer() do, and if a number in config.json is out
  /// of range for a layer.
  template <class Layer>
  Layer load_layer(Index layer) const {
    const auto config = layer_config<Layer>(layer);
    // Checked before a layer of the size in config.json is allocated.
    const detail::MixtureSource source(checkpoint_, mixture(layer), detail::has_shared_gate<Layer>);
    Layer loaded = detail::with_config(config_.path(), layer,
                                       [&] { return detail::layer_of_zeros<Layer>(config); });
    source.read(loaded);
    return loaded;
  }

 private:
  ModelConfig config_;
  Checkpoint checkpoint_;
  std::string model_type_;
  std::vector<Mixture> mixtures_;
};

/// Opens a folder with config.json and model.safetensors, or the shards in model.safetensors.index.json.
/// `more` are families in addition to known_families(), searched first. Throws std::runtime_error, which
/// names the file and what is wrong with it, if a file is missing or damaged, a setting is missing or out of
/// range, or the family is not known; and std::invalid_argument if a mixture of a family in `more`
/// lacks the name of a tensor or has a field out of range.
inline Pretrained open_pretrained(const std::string& folder, std::span<const Family> more = {}) {
  return {folder, more};
}

/// Adds the parameters of a layer to a file, with the names and in the layout of a mixture's family, so that
/// transformers can read them; the configuration is not stored. All experts must be in this
/// process. Throws std::invalid_argument, with nothing added, if Mixture.layouts is empty or the
/// layer has other shapes than the mixture, and as SafetensorsWriter::add() does.
///
///     moe::SafetensorsWriter writer;
///     moe::io::add_layer(writer, model.mixture(0), layer);
///     writer.write("layer.safetensors");
///
/// The layer must live and stay unchanged until write(), which takes memory for the largest tensor.
template <class Layer>
void add_layer(SafetensorsWriter& writer, const Mixture& mixture, const Layer& layer) {
  detail::add_mixture(writer, mixture, layer, detail::has_shared_gate<Layer>);
}
template <class Layer>
void add_layer(SafetensorsWriter& writer, const Mixture& mixture, const Layer&& layer) = delete;

}  // namespace moe::io
