#pragma once

#include <string>
#include <vector>

#include "moe/io/pretrained/mixture.hpp"

namespace moe::io {

/// Fedus, Zoph, Shazeer 2022, "Switch Transformers" (arXiv 2101.03961). The numbers of the decoder's blocks
/// follow those of the encoder's. expert_capacity is the number of places of an expert in each
/// sequence, in training and in evaluation. Pass::sequences is the number of sequences in the
/// batch, 1 if it is not set; the rows of a sequence are consecutive, as in transformers.
inline std::vector<Mixture> switch_transformers_mixtures(const ModelConfig& config) {
  Mixture mixture{.width = config.count("d_model"),
                  .hidden = config.count("d_ff"),
                  .activation = config.activation("dense_act_fn"),
                  .gated = false};
  mixture.gate.experts = config.count("num_experts");
  mixture.gate.top_k = 1;
  mixture.gate.bias = config.flag("router_bias", false);
  mixture.gate.capacity = config.count("expert_capacity", 64);
  if (mixture.gate.capacity == 0) config.refuse("expert_capacity", "at least 1");
  mixture.gate.evaluation_capacity = mixture.gate.capacity;
  mixture.gate.row_order = RowOrder::sequence_major;
  std::vector<Mixture> mixtures;
  const auto add_stack = [&](const std::string& stack, Index blocks, Index sparse,
                             const std::string& part) {
    const Index step = sparse > 0 ? blocks / sparse : 0;
    const Index before = static_cast<Index>(stack == "decoder") * config.count("num_layers");
    mixture.layouts = {
        {.prefix = stack + ".block.{}.layer." + part + ".mlp.",
         .router = "router.classifier.weight",
         .router_bias = "router.classifier.bias",
         .experts = {.up = "experts.expert_{}.wi.weight", .down = "experts.expert_{}.wo.weight"}}};
    for (Mixture& found : in_layers(mixture, blocks, [&](Index block) {
           return step == 1 || (step > 1 && block % step == 1);
         })) {
      found.layouts[0].prefix = detail::numbered(found.layouts[0].prefix, found.layer);
      found.layer += before;
      mixtures.push_back(found);
    }
  };
  add_stack("encoder", config.count("num_layers"), config.count("num_sparse_encoder_layers"), "1");
  add_stack("decoder", config.count("num_decoder_layers", config.count("num_layers")),
            config.count("num_sparse_decoder_layers"), "2");
  return mixtures;
}

}  // namespace moe::io
