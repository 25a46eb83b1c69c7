#include "moe/io/pretrained/families.hpp"

#include <fstream>
#include <string>
#include <vector>

#include "../../support.hpp"
#include "../../temporary_folder.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;

// What families make of the settings of published models.

namespace {

std::vector<io::Mixture> mixtures_of(const std::string& model_type, const std::string& settings) {
  const TemporaryFolder folder;
  std::ofstream(folder.file("config.json")) << settings;
  for (const io::Family& family : io::known_families()) {
    if (family.model_type == model_type) {
      return detail::mixtures_of(family, io::ModelConfig(folder.file("config.json")));
    }
  }
  FAIL(model_type);
  return {};
}

std::vector<Index> layers_of(const std::vector<io::Mixture>& mixtures) {
  std::vector<Index> layers;
  for (const io::Mixture& mixture : mixtures) layers.push_back(mixture.layer);
  return layers;
}

void fails(const std::string& model_type, const std::string& settings, const std::string& message) {
  CHECK_THROWS_WITH(mixtures_of(model_type, settings), Contains(message));
}

/// Settings with more behind them: of a key that is there twice the last one counts.
std::string with(const std::string& settings, const std::string& more) {
  return settings.substr(0, settings.rfind('}')) + ", " + more + "}";
}

const std::string mixtral = R"({"hidden_size": 4096, "intermediate_size": 14336,
  "hidden_act": "silu", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 32})";
const std::string olmoe = R"({"hidden_size": 2048, "intermediate_size": 1024, "hidden_act": "silu",
  "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": false, "num_hidden_layers": 16})";
const std::string qwen3 = R"({"hidden_size": 2048, "moe_intermediate_size": 768,
  "hidden_act": "silu", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true,
  "mlp_only_layers": [], "decoder_sparse_step": 1, "num_hidden_layers": 48})";
const std::string deepseek_v2 = R"({"hidden_size": 5120, "moe_intermediate_size": 1536,
  "hidden_act": "silu", "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6,
  "topk_method": "group_limited_greedy", "scoring_func": "softmax", "n_group": 8, "topk_group": 3,
  "routed_scaling_factor": 16.0, "norm_topk_prob": false, "first_k_dense_replace": 1,
  "moe_layer_freq": 1, "num_hidden_layers": 60})";
const std::string deepseek_v3 = R"({"hidden_size": 7168, "moe_intermediate_size": 2048,
  "hidden_act": "silu", "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
  "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 8, "topk_group": 4,
  "routed_scaling_factor": 2.5, "norm_topk_prob": true, "first_k_dense_replace": 3,
  "moe_layer_freq": 1, "num_hidden_layers": 61,
  "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}})";
const std::string gpt_oss = R"({"hidden_size": 2880, "intermediate_size": 2880,
  "hidden_act": "silu", "num_local_experts": 32, "num_experts_per_tok": 4, "swiglu_limit": 7.0,
  "num_hidden_layers": 24})";
const std::string granite = R"({"hidden_size": 1024, "intermediate_size": 512,
  "hidden_act": "silu", "num_local_experts": 32, "num_experts_per_tok": 8, "num_hidden_layers": 24})";
const std::string switch_base = R"({"d_model": 768, "d_ff": 3072, "dense_act_fn": "relu",
  "num_experts": 8, "num_layers": 12, "num_sparse_encoder_layers": 6, "num_decoder_layers": 12,
  "num_sparse_decoder_layers": 3})";

}  // namespace

TEST_CASE("families: Mixtral 8x7B, OLMoE and Granite 3.0", "[io][pretrained]") {
  const auto mixtures = mixtures_of("mixtral", mixtral);
  REQUIRE(mixtures.size() == 32);
  CHECK(mixtures[31].layer == 31);
  CHECK(mixtures[0].width == 4096);
  CHECK(mixtures[0].hidden == 14336);
  CHECK(mixtures[0].activation == Activation::silu);
  CHECK(mixtures[0].gated);
  CHECK(mixtures[0].gate.renormalise);
  CHECK(mixtures[0].gate.score == Score::softmax);
  CHECK(detail::numbered(mixtures[3].layouts[0].prefix, 3) == "model.layers.3.block_sparse_moe.");

  CHECK(!mixtures_of("olmoe", olmoe)[0].gate.renormalise);
  CHECK(mixtures_of("olmoe", with(olmoe, R"("norm_topk_prob": true)"))[0].gate.renormalise);
  CHECK(mixtures_of("granitemoe", granite)[0].gate.score == Score::softmax_of_chosen);
}

TEST_CASE("families: Qwen's layers by step and by list", "[io][pretrained]") {
  const auto mixtures = mixtures_of("qwen3_moe", qwen3);
  CHECK(mixtures.size() == 48);
  CHECK(mixtures[0].gate.experts == 128);
  CHECK(mixtures[0].gate.renormalise);
  const std::string few = with(qwen3, R"("num_hidden_layers": 8, "decoder_sparse_step": 2)");
  CHECK(layers_of(mixtures_of("qwen3_moe", few)) == std::vector<Index>{1, 3, 5, 7});
  CHECK(layers_of(mixtures_of("qwen3_moe", with(few, R"("mlp_only_layers": [2, 3, 7])"))) ==
        std::vector<Index>{1, 5});
  CHECK(mixtures_of("qwen3_moe", with(qwen3, R"("num_experts": 0)")).empty());
  // transformers 5 has another name for it.
  CHECK(mixtures_of("qwen3_moe", with(qwen3, R"("num_experts": null, "num_local_experts": 5)"))[0]
            .gate.experts == 5);
  fails("qwen3_moe", with(qwen3, R"("decoder_sparse_step": 0)"),
        "\"decoder_sparse_step\" is 0, must be at least 1");

  const auto shared =
      mixtures_of("qwen2_moe", with(qwen3, R"("shared_expert_intermediate_size": 3072)"));
  CHECK(shared[0].shared == 4);
  CHECK(shared[0].shared_gated);
}

TEST_CASE("families: DeepSeek-V2 and V2-Lite", "[io][pretrained]") {
  const auto mixtures = mixtures_of("deepseek_v2", deepseek_v2);
  REQUIRE(mixtures.size() == 59);
  CHECK(mixtures[0].layer == 1);
  CHECK(mixtures[0].shared == 2);
  CHECK(!mixtures[0].shared_gated);
  CHECK(mixtures[0].gate.groups == 8);
  CHECK(mixtures[0].gate.top_k_groups == 3);
  CHECK(mixtures[0].gate.group_score == GroupScore::best);
  CHECK(mixtures[0].gate.scale == 16);
  CHECK(!mixtures[0].gate.selection_bias);
  const auto lite =
      mixtures_of("deepseek_v2", with(deepseek_v2, R"("topk_method": "greedy", "n_group": null)"));
  CHECK(lite[0].gate.groups == 1);
  CHECK(layers_of(mixtures_of("deepseek_v2", with(deepseek_v2, R"("moe_layer_freq": 20)"))) ==
        std::vector<Index>{20, 40});
  fails("deepseek_v2", with(deepseek_v2, R"("moe_layer_freq": 0)"), "must be at least 1");
  fails("deepseek_v2", with(deepseek_v2, R"("topk_method": "noaux_tc")"),
        "\"topk_method\" is \"noaux_tc\", must be greedy or group_limited_greedy");
  fails("deepseek_v2", with(deepseek_v2, R"("norm_topk_prob": true)"),
        "\"norm_topk_prob\" is true, must be false");
  fails("deepseek_v2", with(deepseek_v2, R"("scoring_func": "sigmoid")"), "must be softmax");
  fails("deepseek_v2", with(deepseek_v2, R"("n_group": null)"), "has no \"n_group\"");
}

TEST_CASE("families: DeepSeek-V3 and GLM-4.5", "[io][pretrained]") {
  const auto mixtures = mixtures_of("deepseek_v3", deepseek_v3);
  REQUIRE(mixtures.size() == 58);
  CHECK(mixtures[0].layer == 3);
  CHECK(mixtures[0].shared == 1);
  CHECK(mixtures[0].scale_rows == 128);
  CHECK(mixtures[0].scale_columns == 64);
  const TopKConfig& gate = mixtures[0].gate;
  CHECK(gate.score == Score::sigmoid);
  CHECK(gate.renormalise);
  CHECK(gate.renormalise_epsilon == 1e-20);
  CHECK(gate.scale == 2.5);
  CHECK(gate.group_score == GroupScore::two_best);
  CHECK(gate.selection_bias);
  CHECK(mixtures_of("glm4_moe", with(deepseek_v3, R"("n_group": 1, "topk_group": 1)"))[0]
            .gate.groups == 1);
  CHECK(mixtures_of("deepseek_v3", with(deepseek_v3, R"("quantization_config": {})"))[0]
            .scale_columns == 128);
  const auto small = mixtures_of(
      "mixtral", with(mixtral, R"("quantization_config": {"weight_block_size": [96, 32]})"));
  CHECK(small[31].scale_rows == 96);
  CHECK(small[31].scale_columns == 32);
  fails("deepseek_v3", with(deepseek_v3, R"("quantization_config": {"weight_block_size": [1]})"),
        "\"quantization_config.weight_block_size\" is [1], must be two numbers above 0");
  fails("deepseek_v3", with(deepseek_v3, R"("quantization_config": {"weight_block_size": [1, 0]})"),
        "must be two numbers above 0");
  fails("deepseek_v3", with(deepseek_v3, R"("scoring_func": "softmax")"), "must be sigmoid");
  fails("deepseek_v3", with(deepseek_v3, R"("topk_method": "greedy")"), "must be noaux_tc");
}

TEST_CASE("families: gpt-oss", "[io][pretrained]") {
  const auto mixtures = mixtures_of("gpt_oss", gpt_oss);
  REQUIRE(mixtures.size() == 24);
  CHECK(mixtures[0].bias);
  CHECK(mixtures[0].gate.bias);
  CHECK(mixtures[0].limit == 7);
  CHECK(mixtures[0].linear_offset == 1);
  CHECK(mixtures[0].activation == Activation::gelu_sigmoid);
  fails("gpt_oss", with(gpt_oss, R"("swiglu_alpha": 2)"), "\"swiglu_alpha\" is 2, must be 1.702");
}

TEST_CASE("families: Llama 4 Scout and Maverick", "[io][pretrained]") {
  const std::string text = R"({"hidden_size": 5120, "intermediate_size": 8192,
    "hidden_act": "silu", "num_local_experts": 16, "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1, "num_hidden_layers": 48})";
  const auto mixtures = mixtures_of("llama4", R"({"text_config": )" + text + "}");
  REQUIRE(mixtures.size() == 48);
  CHECK(mixtures[0].weighted_input);
  CHECK(mixtures[0].gate.score == Score::sigmoid);
  CHECK(!mixtures[0].gate.renormalise);
  CHECK(mixtures[0].shared == 1);
  CHECK(!mixtures[0].shared_gated);
  const std::string every_second = with(text, R"("interleave_moe_layer_step": 2)");
  const auto maverick = mixtures_of("llama4_text", every_second);
  CHECK(maverick.size() == 24);
  CHECK(maverick[0].layer == 1);
  CHECK(layers_of(mixtures_of("llama4_text", with(every_second, R"("moe_layers": [0, 5])"))) ==
        std::vector<Index>{0, 5});
  fails("llama4_text", with(text, R"("interleave_moe_layer_step": 0)"), "must be at least 1");
  fails("llama4", text, "has no \"text_config\"");
  fails("llama4", R"({"text_config": {}})", "has no \"text_config.hidden_size\"");
}

TEST_CASE("families: Switch Transformer's two stacks", "[io][pretrained]") {
  const auto mixtures = mixtures_of("switch_transformers", switch_base);
  CHECK(layers_of(mixtures) == std::vector<Index>{1, 3, 5, 7, 9, 11, 13, 17, 21});
  CHECK(mixtures[1].layouts[0].prefix == "encoder.block.3.layer.1.mlp.");
  CHECK(mixtures[7].layouts[0].prefix == "decoder.block.5.layer.2.mlp.");
  CHECK(!mixtures[0].gated);
  CHECK(mixtures[0].activation == Activation::relu);
  CHECK(mixtures[0].gate.top_k == 1);
  // Steps of 1: all; no sparse layers: none.
  CHECK(mixtures_of("switch_transformers", with(switch_base, R"("num_sparse_encoder_layers": 12,
                                         "num_sparse_decoder_layers": 0)"))
            .size() == 12);
  CHECK(mixtures[0].gate.capacity == 64);
  CHECK(mixtures[0].gate.evaluation_capacity == 64);
  const std::string small = with(switch_base, R"("expert_capacity": 8)");
  CHECK(mixtures_of("switch_transformers", small)[8].gate.capacity == 8);
  CHECK(mixtures_of("switch_transformers", small)[8].gate.evaluation_capacity == 8);
  fails("switch_transformers", with(switch_base, R"("expert_capacity": 0)"),
        "\"expert_capacity\" is 0, must be at least 1");
  CHECK(!mixtures[0].gate.bias);
  CHECK(
      mixtures_of("switch_transformers", with(switch_base, R"("router_bias": true)"))[0].gate.bias);
}

TEST_CASE("families: settings that are missing are named", "[io][pretrained]") {
  fails("mixtral", "{}", "has no \"hidden_size\"");
  fails("olmoe", R"({"hidden_size": 2, "intermediate_size": 2, "hidden_act": "silu"})",
        "has no \"num_experts\"");
  fails("qwen2_moe", qwen3, "has no \"shared_expert_intermediate_size\"");
  fails("qwen2_moe", with(qwen3, R"("shared_expert_intermediate_size": 800)"),
        "\"shared_expert_intermediate_size\" is 800, must be a multiple of moe_intermediate_size = "
        "768");
  fails("qwen2_moe", with(qwen3, R"("shared_expert_intermediate_size": 0)"), "is 0, must be a");
  fails("mixtral", with(mixtral, R"("hidden_act": "mish")"), "\"hidden_act\" is \"mish\"");
}
