#pragma once

#include <vector>

#include "moe/io/pretrained/mixture.hpp"

namespace moe::io {

/// Jiang et al. 2024, "Mixtral of Experts" (arXiv 2401.04088).
inline std::vector<Mixture> mixtral_mixtures(const ModelConfig& config) {
  Mixture mixture{.width = config.count("hidden_size"),
                  .hidden = config.count("intermediate_size"),
                  .activation = config.activation("hidden_act")};
  mixture.gate.experts = config.count("num_local_experts");
  mixture.gate.top_k = config.count("num_experts_per_tok");
  mixture.gate.renormalise = true;
  mixture.layouts = {{.prefix = "model.layers.{}.block_sparse_moe.",
                      .experts = {.gate = "experts.{}.w1.weight",
                                  .up = "experts.{}.w3.weight",
                                  .down = "experts.{}.w2.weight"}},
                     joint_projections("model.layers.{}.mlp.")};
  return in_all_layers(mixture, config);
}

}  // namespace moe::io
