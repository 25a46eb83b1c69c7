#pragma once

#include <vector>

#include "moe/io/pretrained/mixture.hpp"

namespace moe::io {

/// IBM 2024, Granite 3.0: all experts of a layer are in two tensors.
inline std::vector<Mixture> granite_moe_mixtures(const ModelConfig& config) {
  Mixture mixture{.width = config.count("hidden_size"),
                  .hidden = config.count("intermediate_size"),
                  .activation = config.activation("hidden_act")};
  mixture.gate.experts = config.count("num_local_experts");
  mixture.gate.top_k = config.count("num_experts_per_tok");
  mixture.gate.score = Score::softmax_of_chosen;
  MixtureTensors joint = joint_projections("model.layers.{}.block_sparse_moe.");
  joint.router = "router.weight";
  mixture.layouts = {{.prefix = "model.layers.{}.block_sparse_moe.",
                      .router = "router.layer.weight",
                      .experts = {.gate = "input_linear.weight",
                                  .up = "input_linear.weight",
                                  .down = "output_linear.weight"}},
                     joint};
  return in_all_layers(mixture, config);
}

}  // namespace moe::io
