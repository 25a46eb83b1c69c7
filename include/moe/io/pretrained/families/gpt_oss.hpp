#pragma once

#include <vector>

#include "moe/io/pretrained/mixture.hpp"

namespace moe::io {

/// OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv 2508.10925). The experts are published as MXFP4,
/// [E, out, in]; in wider formats they are [E, in, out].
inline std::vector<Mixture> gpt_oss_mixtures(const ModelConfig& config) {
  Mixture mixture{.width = config.count("hidden_size"),
                  .hidden = config.count("intermediate_size"),
                  .activation = Activation::gelu_sigmoid,
                  .bias = true,
                  .limit = config.number("swiglu_limit", 7),
                  .linear_offset = 1};
  mixture.gate.experts = config.count("num_local_experts");
  mixture.gate.top_k = config.count("num_experts_per_tok");
  mixture.gate.score = Score::softmax_of_chosen;
  mixture.gate.bias = true;
  if (config.number("swiglu_alpha", 1.702) != 1.702) config.refuse("swiglu_alpha", "1.702");
  const MixtureTensors tensors{.prefix = "model.layers.{}.mlp.",
                               .router = "router.weight",
                               .router_bias = "router.bias",
                               .experts = {.gate = "experts.gate_up_proj",
                                           .up = "experts.gate_up_proj",
                                           .down = "experts.down_proj",
                                           .gate_bias = "experts.gate_up_proj_bias",
                                           .up_bias = "experts.gate_up_proj_bias",
                                           .down_bias = "experts.down_proj_bias",
                                           .in_out = true,
                                           .interleaved = true}};
  MixtureTensors narrow = tensors;
  narrow.experts.gate = narrow.experts.up = "experts.gate_up_proj_blocks";
  narrow.experts.down = "experts.down_proj_blocks";
  narrow.experts.in_out = false;
  mixture.layouts = {tensors, narrow};
  return in_all_layers(mixture, config);
}

}  // namespace moe::io
