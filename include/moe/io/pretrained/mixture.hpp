#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/io/pretrained/model_config.hpp"
#include "moe/kernels/activations.hpp"
#include "moe/routing/top_k_config.hpp"

/// \file
/// What a family of models says of its mixtures: their shape, their gate, and what their tensors are called.

namespace moe::io {

/// The tensors of an expert, as names after a mixture's prefix. A name with "{}" in it, which stands for the
/// number of the expert, is one tensor an expert, [out, in] as PyTorch's Linear has it; a name without
/// is one tensor for all, [E, out, in]. Where gate and up are one name, that tensor has the H rows of
/// gate and then those of up, and so has that of their biases. A name that ends in "_blocks" is one of
/// MXFP4, whose scales are beside it under "_scales".
struct ExpertTensors {
  std::string gate{};  ///< W_1 of a gated network; else empty
  std::string up{};
  std::string down{};
  /// The biases of a network that has some, [out] or [E, out].
  std::string gate_bias{};
  std::string up_bias{};
  std::string down_bias{};
  bool in_out = false;       ///< the maps are [in, out] instead
  bool interleaved = false;  ///< gate and up in one tensor take turns: g_0, u_0, g_1, u_1, ...
};

/// The tensors of a mixture, as names after the prefix. The ones that a model does not have are empty.
struct MixtureTensors {
  std::string prefix{};                ///< "model.layers.{}.mlp.", with "{}" for the layer
  std::string router = "gate.weight";  ///< [E, D]
  std::string router_bias{};           ///< [E]
  std::string selection_bias{};        ///< [E]
  ExpertTensors experts{};
  /// Of one network that is all shared experts side by side: gate and up are [shared·H, D], down is
  /// [D, shared·H].
  ExpertTensors shared{};
  std::string shared_gate{};  ///< [1, D]
};

/// One mixture of a model. The defaults are those of most families.
struct Mixture {
  Index layer = 0;   ///< which layer of the model it is in
  Index width = 0;   ///< D
  Index hidden = 0;  ///< H
  Activation activation = Activation::silu;
  bool gated = true;            ///< two maps before the activation, as SwiGLU; else one
  bool bias = false;            ///< of the maps
  double limit = 0;             ///< as in FeedForward::Config
  double linear_offset = 0;     ///< likewise
  bool weighted_input = false;  ///< likewise
  TopKConfig gate{};            ///< E, K and how experts are chosen; no losses, no noise
  Index shared = 0;             ///< experts of width H that every token uses
  bool shared_gated = false;    ///< they have the weight sigmoid(x·w), w one vector for all
  /// A tensor of type F8_E4M3 has a scale for each block of so many rows and columns.
  Index scale_rows = 128;
  Index scale_columns = 128;
  /// How files may name and lay out all this. The first one that a checkpoint has the router and the experts
  /// of is read; the first of all is written.
  std::vector<MixtureTensors> layouts{};
};

/// The names that most families have: a tensor for each map of each expert.
inline MixtureTensors projections(const std::string& prefix) {
  return {.prefix = prefix,
          .experts = {.gate = "experts.{}.gate_proj.weight",
                      .up = "experts.{}.up_proj.weight",
                      .down = "experts.{}.down_proj.weight"}};
}
/// And those that transformers gives any family since version 5, if it is told to: two tensors for all experts.
inline MixtureTensors joint_projections(const std::string& prefix) {
  return {.prefix = prefix,
          .experts = {.gate = "experts.gate_up_proj",
                      .up = "experts.gate_up_proj",
                      .down = "experts.down_proj"}};
}
/// Those of a network that stands for the shared experts.
inline ExpertTensors shared_projections(const std::string& prefix) {
  return {.gate = prefix + "gate_proj.weight",
          .up = prefix + "up_proj.weight",
          .down = prefix + "down_proj.weight"};
}

/// A family: the model_type of its config.json, and what its mixtures are, in the order of the layers.
struct Family {
  std::string model_type;
  std::function<std::vector<Mixture>(const ModelConfig&)> mixtures;
};

/// The same mixture in each layer from 0 up to `layers` for which is_mixture(layer).
template <class Predicate>
std::vector<Mixture> in_layers(Mixture mixture, Index layers, Predicate&& is_mixture) {
  std::vector<Mixture> mixtures;
  for (mixture.layer = 0; mixture.layer < layers; ++mixture.layer) {
    if (is_mixture(mixture.layer)) mixtures.push_back(mixture);
  }
  return mixtures;
}
inline std::vector<Mixture> in_all_layers(const Mixture& mixture, const ModelConfig& config) {
  return in_layers(mixture, config.count("num_hidden_layers"), [](Index) { return true; });
}

}  // namespace moe::io

namespace moe::detail {

/// A name with a number in the place of "{}".
inline std::string numbered(std::string name, Index number) {
  const std::size_t place = name.find("{}");
  if (place != std::string::npos) name.replace(place, 2, std::to_string(number));
  return name;
}

/// Throws std::invalid_argument if a family leaves out the name of a tensor that its mixture must have, or
/// describes one that has no place in a layer.
inline void check_family(const std::string& model_type, const io::Mixture& mixture) {
  const auto need = [&](bool condition, std::string_view what) {
    require(condition, "family ", model_type, ": ", what);
  };
  const auto need_experts = [&](const io::ExpertTensors& names, std::string_view what) {
    const bool has_maps = !names.up.empty() && !names.down.empty();
    const bool has_biases = !names.up_bias.empty() && !names.down_bias.empty();
    need(has_maps && (!mixture.gated || !names.gate.empty()), what);
    need(!mixture.bias || (has_biases && (!mixture.gated || !names.gate_bias.empty())),
         "the mixture has biases, MixtureTensors has no names for them");
  };
  need(!mixture.layouts.empty(), "Mixture.layouts is empty");
  need(mixture.scale_rows >= 1 && mixture.scale_columns >= 1,
       "Mixture.scale_rows and scale_columns must be at least 1");
  need(!mixture.bias || mixture.shared <= 1,
       "of several shared experts side by side there is one bias, which cannot be each one's");
  for (const io::MixtureTensors& names : mixture.layouts) {
    need(!names.router.empty(), "MixtureTensors.router is empty");
    need(!mixture.gate.bias || !names.router_bias.empty(), "MixtureTensors.router_bias is empty");
    need(!mixture.gate.selection_bias || !names.selection_bias.empty(),
         "MixtureTensors.selection_bias is empty");
    need_experts(names.experts, "MixtureTensors.experts has no name for a map");
    if (mixture.shared == 0) continue;
    need_experts(names.shared, "MixtureTensors.shared has no name for a map");
    need(!mixture.shared_gated || !names.shared_gate.empty(),
         "MixtureTensors.shared_gate is empty");
  }
}

}  // namespace moe::detail
