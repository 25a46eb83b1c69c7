#pragma once

#include <vector>

#include "moe/io/pretrained/mixture.hpp"

namespace moe::io {

/// Muennighoff et al. 2024, "OLMoE" (arXiv 2409.02060).
inline std::vector<Mixture> olmoe_mixtures(const ModelConfig& config) {
  Mixture mixture{.width = config.count("hidden_size"),
                  .hidden = config.count("intermediate_size"),
                  .activation = config.activation("hidden_act")};
  mixture.gate.experts = config.experts();
  mixture.gate.top_k = config.count("num_experts_per_tok");
  mixture.gate.renormalise = config.flag("norm_topk_prob", false);
  mixture.layouts = {projections("model.layers.{}.mlp."),
                     joint_projections("model.layers.{}.mlp.")};
  return in_all_layers(mixture, config);
}

}  // namespace moe::io
