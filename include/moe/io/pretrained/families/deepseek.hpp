#pragma once

#include <string>
#include <vector>

#include "moe/io/pretrained/mixture.hpp"

namespace moe::io {

/// What DeepSeek's families have in common: dense layers first, then mixtures of fine-grained experts with
/// shared experts (Dai et al. 2024, "DeepSeekMoE", arXiv 2401.06066).
inline std::vector<Mixture> deepseek_mixtures(const ModelConfig& config, const TopKConfig& gate) {
  Mixture mixture{.width = config.count("hidden_size"),
                  .hidden = config.count("moe_intermediate_size"),
                  .activation = config.activation("hidden_act"),
                  .gate = gate,
                  .shared = config.count("n_shared_experts", 0)};
  mixture.gate.experts = config.count("n_routed_experts");
  mixture.gate.top_k = config.count("num_experts_per_tok");
  mixture.gate.scale = config.number("routed_scaling_factor", 1);
  mixture.layouts = {projections("model.layers.{}.mlp."),
                     joint_projections("model.layers.{}.mlp.")};
  for (MixtureTensors& tensors : mixture.layouts) {
    if (gate.selection_bias) tensors.selection_bias = "gate.e_score_correction_bias";
    tensors.shared = shared_projections("shared_experts.");
  }
  const Index dense = config.count("first_k_dense_replace", 0);
  const Index step = config.count("moe_layer_freq", 1);
  if (step == 0) config.refuse("moe_layer_freq", "at least 1");
  return in_layers(mixture, config.count("num_hidden_layers"),
                   [&](Index layer) { return layer >= dense && layer % step == 0; });
}

/// DeepSeek-AI 2024, "DeepSeek-V2" (arXiv 2405.04434).
inline std::vector<Mixture> deepseek_v2_mixtures(const ModelConfig& config) {
  TopKConfig gate;
  const std::string method = config.text("topk_method", "greedy");
  if (method == "group_limited_greedy") {
    gate.groups = config.count("n_group");
    gate.top_k_groups = config.count("topk_group");
  } else if (method != "greedy") {
    config.refuse("topk_method", "greedy or group_limited_greedy");
  }
  if (config.text("scoring_func", "softmax") != "softmax") {
    config.refuse("scoring_func", "softmax");
  }
  // Where it is true, DeepSeek's own code leaves out the scale, and Hugging Face's does not
  // renormalise.
  if (config.flag("norm_topk_prob", false)) {
    config.refuse("norm_topk_prob", "false: the published definitions differ where it is true");
  }
  return deepseek_mixtures(config, gate);
}

/// DeepSeek-AI 2024, "DeepSeek-V3 Technical Report" (arXiv 2412.19437). GLM-4.5 has the same gate
/// (arXiv 2508.06471).
inline std::vector<Mixture> deepseek_v3_mixtures(const ModelConfig& config) {
  if (config.text("scoring_func", "sigmoid") != "sigmoid") {
    config.refuse("scoring_func", "sigmoid");
  }
  if (config.text("topk_method", "noaux_tc") != "noaux_tc") {
    config.refuse("topk_method", "noaux_tc");
  }
  return deepseek_mixtures(config, {.score = Score::sigmoid,
                                    .renormalise = config.flag("norm_topk_prob", true),
                                    .renormalise_epsilon = 1e-20,
                                    .groups = config.count("n_group", 1),
                                    .top_k_groups = config.count("topk_group", 1),
                                    .group_score = GroupScore::two_best,
                                    .selection_bias = true});
}

}  // namespace moe::io
