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
/// The description of the mixtures of a family of models: their shapes, their gate, and the names of their
/// tensors.

namespace moe::io {

/// The names of an expert's tensors, which follow the mixture's prefix. "{}" in a name stands for the number
/// of the expert: there is one tensor for each expert, [out, in] as in PyTorch's Linear. A name without "{}"
/// is one tensor for all experts, [E, out, in]. If gate and up have the same name, the tensor has the H rows
/// of gate and then those of up, and likewise their biases. A name that ends in "_blocks" is a tensor of
/// MXFP4, whose scales have the same name with "_scales".
struct ExpertTensors {
  std::string gate{};  ///< W_1 of a gated network; else empty
  std::string up{};    ///< W_3 of a gated network, else W_1
  std::string down{};  ///< W_2
  /// b_1 of a gated network with biases, [out] or [E, out], as the other biases; else empty.
  std::string gate_bias{};
  std::string up_bias{};    ///< b_3 of a gated network, else b_1
  std::string down_bias{};  ///< b_2
  bool in_out = false;      ///< whether the maps are [in, out] instead
  bool interleaved =
      false;  ///< whether gate and up in one tensor alternate: g_0, u_0, g_1, u_1, ...
};

/// The names of a mixture's tensors, which follow the prefix; empty for tensors that a model does not have.
struct MixtureTensors {
  std::string prefix{};                ///< "model.layers.{}.mlp.", with "{}" for the layer
  std::string router = "gate.weight";  ///< [E, D]
  std::string router_bias{};           ///< [E]
  std::string selection_bias{};        ///< [E]
  ExpertTensors experts{};             ///< those that the gate chooses
  /// The tensors of one network that has the hidden units of all shared experts: gate and up are
  /// [shared·H, D], down is [D, shared·H].
  ExpertTensors shared{};
  std::string shared_gate{};  ///< [1, D]
};

/// One mixture of a model. The defaults are those of most families.
struct Mixture {
  Index layer = 0;                           ///< the layer of the model that it is in
  Index width = 0;                           ///< D
  Index hidden = 0;                          ///< H
  Activation activation = Activation::silu;  ///< of the experts
  bool gated = true;            ///< the gated form of FeedForward, as SwiGLU; else the plain one
  bool bias = false;            ///< of the maps
  double limit = 0;             ///< as in FeedForward::Config
  double linear_offset = 0;     ///< likewise
  bool weighted_input = false;  ///< likewise
  TopKConfig gate{};            ///< E, K and how experts are chosen; no losses, no noise
  /// The number of experts of width H that get every token; at most 1 with `bias`.
  Index shared = 0;
  /// Whether their weight is sigmoid(x·w), with one vector w for all; must be false if `shared` is 0.
  bool shared_gated = false;
  /// Rows of a block that shares one scale, in tensors of type F8_E4M3; at least 1.
  Index scale_rows = 128;
  /// The same for columns.
  Index scale_columns = 128;
  /// The layouts that files may have, at least one. Reading uses the first whose router and experts a
  /// checkpoint has; writing uses the first.
  std::vector<MixtureTensors> layouts{};
};

/// The names that most families have: a tensor for each map of each expert.
inline MixtureTensors projections(const std::string& prefix) {
  return {.prefix = prefix,
          .experts = {.gate = "experts.{}.gate_proj.weight",
                      .up = "experts.{}.up_proj.weight",
                      .down = "experts.{}.down_proj.weight"}};
}
/// The names that transformers 5 can use for any family: two tensors for all experts.
inline MixtureTensors joint_projections(const std::string& prefix) {
  return {.prefix = prefix,
          .experts = {.gate = "experts.gate_up_proj",
                      .up = "experts.gate_up_proj",
                      .down = "experts.down_proj"}};
}
/// The names of the network of the shared experts in most families.
inline ExpertTensors shared_projections(const std::string& prefix) {
  return {.gate = prefix + "gate_proj.weight",
          .up = prefix + "up_proj.weight",
          .down = prefix + "down_proj.weight"};
}

/// A family of models: the model_type in its config.json, and a function for the mixtures of a model, in the
/// order of the layers.
struct Family {
  std::string model_type;  ///< in config.json
  std::function<std::vector<Mixture>(const ModelConfig&)>
      mixtures;  ///< makes the mixtures of a model
};

/// The same mixture in each of the layers 0, ..., layers − 1 for which is_mixture(layer).
template <class Predicate>
std::vector<Mixture> in_layers(Mixture mixture, Index layers, Predicate&& is_mixture) {
  std::vector<Mixture> mixtures;
  for (mixture.layer = 0; mixture.layer < layers; ++mixture.layer) {
    if (is_mixture(mixture.layer)) mixtures.push_back(mixture);
  }
  return mixtures;
}
/// The same mixture in each layer from 0 up to config's "num_hidden_layers".
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

/// Throws std::invalid_argument if a mixture lacks the name of a tensor that it must have, or has a
/// field out of range.
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
       "Mixture.shared must be at most 1 with biases, since a tensor has one bias for all shared "
       "experts");
  need(!mixture.shared_gated || mixture.shared > 0,
       "Mixture.shared_gated is true, but there are no shared experts");
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

/// The mixtures of a model, as its family lists them, with scale_rows and scale_columns from
/// weight_block_size in config.json, if it is there.
inline std::vector<io::Mixture> mixtures_of(const io::Family& family,
                                            const io::ModelConfig& config) {
  std::vector<io::Mixture> mixtures = family.mixtures(config);
  for (const io::Mixture& mixture : mixtures) check_family(family.model_type, mixture);
  if (!config.has("quantization_config")) return mixtures;
  const io::ModelConfig quantization = config.part("quantization_config");
  const std::vector<Index> block = quantization.counts("weight_block_size");
  if (block.empty()) return mixtures;
  if (block.size() != 2 || block[0] < 1 || block[1] < 1) {
    quantization.refuse("weight_block_size", "two numbers above 0");
  }
  for (io::Mixture& mixture : mixtures) {
    mixture.scale_rows = block[0];
    mixture.scale_columns = block[1];
  }
  return mixtures;
}

}  // namespace moe::detail
