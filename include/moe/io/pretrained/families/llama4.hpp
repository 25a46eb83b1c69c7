#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "moe/io/pretrained/mixture.hpp"

namespace moe::io {

/// Meta 2025, "The Llama 4 herd"; `config` has the settings of the text model.
inline std::vector<Mixture> llama4_text_mixtures(const ModelConfig& config) {
  Mixture mixture{.width = config.count("hidden_size"),
                  .hidden = config.count("intermediate_size"),
                  .activation = config.activation("hidden_act"),
                  .weighted_input = true,
                  .shared = 1};
  mixture.gate.experts = config.count("num_local_experts");
  mixture.gate.top_k = config.count("num_experts_per_tok");
  mixture.gate.score = Score::sigmoid;
  for (const std::string model : {"language_model.model", "model"}) {
    mixture.layouts.push_back({.prefix = model + ".layers.{}.feed_forward.",
                               .router = "router.weight",
                               .experts = {.gate = "experts.gate_up_proj",
                                           .up = "experts.gate_up_proj",
                                           .down = "experts.down_proj",
                                           .in_out = true},
                               .shared = shared_projections("shared_expert.")});
  }
  // Files of FP8 have a tensor for each map of each expert.
  for (const std::string model : {"language_model.model", "model"}) {
    MixtureTensors tensors = projections(model + ".layers.{}.feed_forward.");
    tensors.router = "router.weight";
    tensors.shared = shared_projections("shared_expert.");
    mixture.layouts.push_back(tensors);
  }
  const std::vector<Index> layers = config.counts("moe_layers");
  const Index step = config.count("interleave_moe_layer_step", 1);
  if (step == 0) config.refuse("interleave_moe_layer_step", "at least 1");
  return in_layers(mixture, config.count("num_hidden_layers"), [&](Index layer) {
    if (!config.has("moe_layers")) return (layer + 1) % step == 0;
    return std::find(layers.begin(), layers.end(), layer) != layers.end();
  });
}

/// The same for a multimodal model: its config.json has the settings of the text model in
/// "text_config".
inline std::vector<Mixture> llama4_mixtures(const ModelConfig& config) {
  return llama4_text_mixtures(config.part("text_config"));
}

}  // namespace moe::io
