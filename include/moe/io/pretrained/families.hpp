#pragma once

#include <vector>

#include "moe/io/pretrained/families/deepseek.hpp"
#include "moe/io/pretrained/families/gpt_oss.hpp"
#include "moe/io/pretrained/families/granite_moe.hpp"
#include "moe/io/pretrained/families/llama4.hpp"
#include "moe/io/pretrained/families/mixtral.hpp"
#include "moe/io/pretrained/families/olmoe.hpp"
#include "moe/io/pretrained/families/qwen_moe.hpp"
#include "moe/io/pretrained/families/switch_transformers.hpp"

namespace moe::io {

/// The families of the library, by the model_type in config.json.
inline std::vector<Family> known_families() {
  return {
      {"mixtral", mixtral_mixtures},         {"olmoe", olmoe_mixtures},
      {"qwen2_moe", qwen2_moe_mixtures},     {"qwen3_moe", qwen3_moe_mixtures},
      {"deepseek_v2", deepseek_v2_mixtures}, {"deepseek_v3", deepseek_v3_mixtures},
      {"glm4_moe", deepseek_v3_mixtures},    {"gpt_oss", gpt_oss_mixtures},
      {"llama4", llama4_mixtures},           {"llama4_text", llama4_text_mixtures},
      {"granitemoe", granite_moe_mixtures},  {"switch_transformers", switch_transformers_mixtures}};
}

}  // namespace moe::io
