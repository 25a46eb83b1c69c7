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
/// The mixtures of published models, from the folder in which Hugging Face's transformers saves a model, and
/// back under the same names. docs/pretrained.md lists the families.
///
/// Needs nlohmann-json, as moe/io/safetensors.hpp does; CMake: link moe::io.

namespace moe::io {

/// What config.json and the (sharded) safetensors files of a folder have.
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
    mixtures_ = family->mixtures(config_);
    for (const Mixture& mixture : mixtures_) detail::check_family(model_type_, mixture);
  }

  const std::string& model_type() const { return model_type_; }
  const ModelConfig& config() const { return config_; }
  const Checkpoint& checkpoint() const { return checkpoint_; }

  /// In the order of the layers.
  std::span<const Mixture> mixtures() const { return mixtures_; }
  /// That of a layer of the model. Throws std::runtime_error if there is none.
  const Mixture& mixture(Index layer) const {
    std::string layers;
    for (const Mixture& mixture : mixtures_) {
      if (mixture.layer == layer) return mixture;
      layers += (layers.empty() ? "" : ", ") + std::to_string(mixture.layer);
    }
    detail::fail_file(config_.path(), "layer ", layer, " is no mixture, those are ",
                      layers.empty() ? "none" : layers);
  }

  /// The configuration of a layer that computes what that of the model does. The losses that a gate adds in
  /// training, its noise and limits on the tokens of an expert are left out: set them as needed. Throws
  /// std::runtime_error if there is no such mixture or Layer cannot compute it, and names the type that can.
  template <class Layer>
  typename Layer::Config layer_config(Index layer) const {
    return detail::layer_config<Layer>(config_.path(), mixture(layer));
  }

  /// Reads a layer's parameters, widened or rounded to its Scalar. Throws, with nothing changed,
  /// std::runtime_error, which names the file, the tensor and the shapes, unless every parameter has its
  /// tensor, of the shape that config.json says and of a type that is known, and none is left over under the
  /// mixture's names; and std::invalid_argument if the layer has other shapes. If reading itself fails, the layer may be new in part. Of a layer over
  /// several processes each reads its own experts. Beside the layer it takes memory for 2^16 numbers, or a
  /// row of a tensor if that has more.
  template <class Layer>
  void read_layer(Index layer, Layer& into) const {
    detail::MixtureSource(checkpoint_, mixture(layer), detail::has_shared_gate<Layer>).read(into);
  }

  /// A new layer with these parameters. Throws std::runtime_error, which names the file, like layer_config()
  /// and read_layer(), and where config.json has numbers that a layer cannot have.
  template <class Layer>
  Layer load_layer(Index layer) const {
    const auto config = layer_config<Layer>(layer);
    // Before the memory is taken that config.json asks for.
    const detail::MixtureSource source(checkpoint_, mixture(layer), detail::has_shared_gate<Layer>);
    Layer loaded = made<Layer>(config, layer);
    source.read(loaded);
    return loaded;
  }

 private:
  /// What is out of range here was so in config.json.
  template <class Layer>
  Layer made(const typename Layer::Config& config, Index layer) const {
    try {
      return Layer(config);
    } catch (const std::invalid_argument& error) {
      detail::fail_file(config_.path(), "layer ", layer, ": ", error.what());
    }
  }

  ModelConfig config_;
  Checkpoint checkpoint_;
  std::string model_type_;
  std::vector<Mixture> mixtures_;
};

/// Opens a folder with config.json and model.safetensors, or the shards that model.safetensors.index.json
/// lists. `more` are families beside those in known_families(), looked at first. Throws std::runtime_error,
/// which names the file and what is wrong with it, if a file is missing or not in order, a setting is
/// missing or out of range, or the family is not known; and std::invalid_argument if a family in `more` does
/// not name what it must.
inline Pretrained open_pretrained(const std::string& folder, std::span<const Family> more = {}) {
  return {folder, more};
}

/// Adds the parameters of a layer to a file under the names and in the layout of a mixture's family, so that
/// transformers reads them; the configuration is not stored. Only with all its experts, not over several
/// processes. Throws std::invalid_argument, with nothing added, if the layer has other shapes than the
/// mixture, and like SafetensorsWriter::add().
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
