#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "moe/io/pretrained/mixture.hpp"

namespace moe::io {

/// Yang et al. 2025, "Qwen3 Technical Report" (arXiv 2505.09388).
inline std::vector<Mixture> qwen3_moe_mixtures(const ModelConfig& config) {
  Mixture mixture{.width = config.count("hidden_size"),
                  .hidden = config.count("moe_intermediate_size"),
                  .activation = config.activation("hidden_act")};
  mixture.gate.experts = config.experts();
  mixture.gate.top_k = config.count("num_experts_per_tok");
  mixture.gate.renormalise = config.flag("norm_topk_prob", false);
  mixture.layouts = {projections("model.layers.{}.mlp."),
                     joint_projections("model.layers.{}.mlp.")};
  const std::vector<Index> dense = config.counts("mlp_only_layers");
  const Index step = config.count("decoder_sparse_step", 1);
  if (step == 0) config.refuse("decoder_sparse_step", "at least 1");
  return in_layers(mixture, config.count("num_hidden_layers"), [&](Index layer) {
    return mixture.gate.experts > 0 && (layer + 1) % step == 0 &&
           std::find(dense.begin(), dense.end(), layer) == dense.end();
  });
}

/// Yang et al. 2024, "Qwen2 Technical Report" (arXiv 2407.10671): with a wide shared expert, whose weight is
/// a sigmoid.
inline std::vector<Mixture> qwen2_moe_mixtures(const ModelConfig& config) {
  std::vector<Mixture> mixtures = qwen3_moe_mixtures(config);
  for (Mixture& mixture : mixtures) {
    const Index shared_width = config.count("shared_expert_intermediate_size");
    if (shared_width == 0 || mixture.hidden == 0 || shared_width % mixture.hidden != 0) {
      config.refuse("shared_expert_intermediate_size",
                    "a multiple of moe_intermediate_size = " + std::to_string(mixture.hidden) +
                        ", the width of all experts of a layer here");
    }
    mixture.shared = shared_width / mixture.hidden;
    mixture.shared_gated = true;
    for (MixtureTensors& tensors : mixture.layouts) {
      tensors.shared = shared_projections("shared_expert.");
      tensors.shared_gate = "shared_expert_gate.weight";
    }
  }
  return mixtures;
}

}  // namespace moe::io
