#include "moe/io/pretrained.hpp"

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../../naive_layer.hpp"
#include "changed_model.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;

namespace {

using Routed = io::RoutedLayer<double>;
using Shared = io::SharedLayer<double>;

/// Loading a layer of a changed model fails with a message.
template <class Layer>
void fails(const ChangedModel& model, Index layer, const std::string& message) {
  CHECK_THROWS_WITH(io::open_pretrained(model.folder()).load_layer<Layer>(layer),
                    Contains(message));
}

const std::string mixtral_expert = "model.layers.1.block_sparse_moe.experts.2.";
const std::string whole = "model.safetensors";

}  // namespace

TEST_CASE("pretrained: which layers are mixtures, and of what shape", "[io][pretrained]") {
  const io::Pretrained mixtral = io::open_pretrained(golden("mixtral"));
  CHECK(mixtral.model_type() == "mixtral");
  CHECK(mixtral.config().count("vocab_size") == 3);
  REQUIRE(mixtral.mixtures().size() == 2);
  const io::Mixture& first = mixtral.mixtures()[0];
  CHECK(first.layer == 0);
  CHECK(first.width == 6);
  CHECK(first.hidden == 5);
  CHECK(first.gate.experts == 4);
  CHECK(first.gate.top_k == 2);
  CHECK(first.shared == 0);
  CHECK(mixtral.mixture(1).layer == 1);
  CHECK_THROWS_WITH(mixtral.mixture(2),
                    Contains("config.json: layer 2 is not a mixture, the mixtures are 0, 1"));

  const io::Pretrained deepseek = io::open_pretrained(golden("deepseek_v2"));
  REQUIRE(deepseek.mixtures().size() == 1);
  CHECK(deepseek.mixtures()[0].layer == 1);
  CHECK(deepseek.mixtures()[0].shared == 2);
  CHECK(io::open_pretrained(golden("qwen3_moe")).mixtures().size() == 1);
  CHECK(io::open_pretrained(golden("qwen2_moe")).mixtures()[0].layer == 1);

  // Every second block of the encoder, and all of the decoder.
  std::vector<Index> layers;
  const io::Pretrained both = io::open_pretrained(golden("switch_transformers"));
  for (const io::Mixture& mixture : both.mixtures()) layers.push_back(mixture.layer);
  CHECK(layers == std::vector<Index>{1, 2, 3});
}

TEST_CASE("pretrained: the weights of narrow files are exactly what was rounded",
          "[io][pretrained]") {
  const auto check = [](const std::string& model, const std::string& tensor, Index first_row,
                        const Matrix<double>& weight) {
    const Matrix<double> stored =
        SafetensorsFile(golden(model) + "/" + whole).matrix<double>(tensor);
    CHECK(weight == stored.middleRows(first_row, weight.cols()).transpose());
  };
  const Named olmoe =
      values_of(io::open_pretrained(golden("olmoe")).load_layer<io::RoutedLayer<float>>(0));
  check("olmoe", "model.layers.0.mlp.gate.weight", 0, olmoe.at("gate.weight"));
  check("olmoe", "model.layers.0.mlp.experts.3.up_proj.weight", 0, olmoe.at("experts.3.up.weight"));
  // [E, 2H, D]: 5 rows of gate and 5 of up for each expert.
  const Named granite =
      values_of(io::open_pretrained(golden("granitemoe")).load_layer<io::RoutedLayer<float>>(1));
  const std::string input = "model.layers.1.block_sparse_moe.input_linear.weight";
  check("granitemoe", input, 20, granite.at("experts.2.gate.weight"));
  check("granitemoe", input, 25, granite.at("experts.2.up.weight"));
  check("granitemoe", "model.layers.1.block_sparse_moe.output_linear.weight", 12,
        granite.at("experts.2.down.weight"));
}

TEST_CASE(
    "pretrained: Llama 4 in FP8 has a tensor for each map of each expert, with scales of rows or "
    "one",
    "[io][pretrained]") {
  const ChangedModel model("llama4");
  const std::string prefix = "language_model.model.layers.1.feed_forward.";
  std::map<std::string, Matrix<float>> scale_of;
  SafetensorsWriter writer;
  const auto add = [&](const std::string& map, std::uint64_t out, std::uint64_t in, bool rows) {
    Matrix<float>& scale = scale_of[map];
    scale = random_matrix<float>(rows ? static_cast<Index>(out) : 1, 1, scale_of.size());
    writer.add_made_bytes(prefix + map + ".weight", "F8_E4M3", {out, in}, [=] {
      std::vector<std::byte> codes(out * in);
      for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = std::byte(i * 7 % 127);
      return codes;
    });
    writer.add_made<float>(prefix + map + ".weight_scale",
                           rows ? std::vector<std::uint64_t>{out, 1} : std::vector<std::uint64_t>{},
                           [scale] { return scale; });
    if (!rows)
      writer.add_made<float>(prefix + map + ".input_scale", {1}, [scale] { return scale; });
  };
  const Matrix<float> router = random_matrix<float>(3, 6, 1);
  writer.add(prefix + "router.weight", router);
  for (const std::string expert : {"experts.0.", "experts.1.", "experts.2.", "shared_expert."}) {
    for (const std::string map : {"gate_proj", "up_proj", "down_proj"}) {
      const bool is_down = map == "down_proj";
      add(expert + map, is_down ? 6 : 5, is_down ? 5 : 6, expert != "shared_expert.");
    }
  }
  writer.write(model.file(whole));
  const SafetensorsFile file(model.file(whole));
  const Named layer = values_of(io::open_pretrained(model.folder()).load_layer<Shared>(1));
  CHECK(layer.at("gate.routed.weight") == router.transpose().cast<double>());
  for (const auto& [map, scale] : scale_of) {
    Matrix<double> expected = file.matrix<double>(prefix + map + ".weight");
    for (Index row = 0; row < expected.rows(); ++row) {
      expected.row(row) *= static_cast<double>(scale(scale.rows() == 1 ? 0 : row, 0));
    }
    // The shared expert is the first of the layer.
    const std::string expert = map.starts_with("shared")
                                   ? "experts.0."
                                   : "experts." + std::to_string(map[8] - '0' + 1) + ".";
    const std::string part = map.substr(map.rfind('.') + 1);
    CHECK(layer.at(expert + part.substr(0, part.find('_')) + ".weight") == expected.transpose());
  }
}

TEST_CASE("pretrained: a double is rounded to a float", "[io][pretrained]") {
  const io::Pretrained model = io::open_pretrained(golden("mixtral"));
  const auto narrow = model.load_layer<io::RoutedLayer<float>>(0);
  const Named wide = values_of(model.load_layer<Routed>(0));
  for (const auto& [name, value] : values_of(narrow)) {
    CHECK(value == wide.at(name).cast<float>().cast<double>());
  }
}

TEST_CASE("pretrained: a layer of another configuration keeps its options", "[io][pretrained]") {
  const io::Pretrained model = io::open_pretrained(golden("mixtral"));
  auto config = model.layer_config<Routed>(0);
  config.gate.switch_loss_weight = 0.02;
  config.expert.recompute = true;
  Routed layer(config);
  model.read_layer(0, layer);
  CHECK(layer.config().gate.switch_loss_weight == 0.02);
  const Matrix<double> x = random_matrix(5, 6, 1);
  CHECK(same_bits(layer.evaluate(x), model.load_layer<Routed>(0).evaluate(x)));
}

TEST_CASE("pretrained: the type to ask for is named", "[io][pretrained]") {
  CHECK_THROWS_WITH(io::open_pretrained(golden("deepseek_v2")).load_layer<Routed>(1),
                    Contains("config.json: layer 1 has shared experts, 2 of them: use "
                             "moe::io::SharedLayer"));
  CHECK_THROWS_WITH(io::open_pretrained(golden("deepseek_v2")).load_layer<Shared>(0),
                    Contains("layer 0 is not a mixture, the mixtures are 1"));
}

TEST_CASE("pretrained: a layer of another shape is refused and stays what it was",
          "[io][pretrained]") {
  const io::Pretrained model = io::open_pretrained(golden("mixtral"));
  auto config = model.layer_config<Routed>(0);
  config.seed = 7;
  config.expert.hidden = 4;
  Routed layer(config);
  const Named before = values_of(layer);
  CHECK_THROWS_WITH(model.read_layer(0, layer),
                    Contains("parameter experts.0.gate.weight of the layer is 6 x 4, in the "
                             "mixture it is 6 x 5"));
  CHECK(values_of(layer) == before);
  config.expert.hidden = 5;
  config.expert.bias = true;
  Routed biased(config);
  CHECK_THROWS_WITH(
      model.read_layer(0, biased),
      Contains("parameter experts.0.gate.bias of the layer is not one of the mixture's"));
}

TEST_CASE("pretrained: a configuration that contradicts the tensors", "[io][pretrained]") {
  const auto with = [](const std::string& key, Index value, const std::string& message) {
    const ChangedModel model("mixtral");
    model.set(key, value);
    fails<Routed>(model, 1, message);
  };
  with("num_local_experts", 3,
       "model.safetensors: tensor \"model.layers.1.block_sparse_moe.gate.weight\" has shape [4,6], "
       "must be [3,6]");
  with("num_local_experts", 1000000, "has shape [4,6], must be [1000000,6]");
  with("hidden_size", 8, "has shape [4,6], must be [4,8]");
  with("intermediate_size", 7,
       "tensor \"model.layers.1.block_sparse_moe.experts.0.w1.weight\" has shape [5,6], must be "
       "[7,6]");
  with("num_hidden_layers", 1, "layer 1 is not a mixture, the mixtures are 0");
  with("num_experts_per_tok", 5,
       "config.json: layer 1: moe: TopKGate::Config.top_k = 5, must be from 1 to experts = 4");
  with("num_experts_per_tok", 0, "config.json: layer 1: moe: TopKGate::Config.top_k = 0, must be");
  with("hidden_size", 0, "has shape [4,6], must be [4,0]");
  with("intermediate_size", 0, "has shape [5,6], must be [0,6]");
  with("num_local_experts", 0, "has shape [4,6], must be [0,6]");

  const ChangedModel deeper("mixtral");
  deeper.set("num_hidden_layers", 3);
  fails<Routed>(deeper, 2, "has no tensor \"model.layers.2.block_sparse_moe.gate.weight\"");
  const ChangedModel dense("deepseek_v2");
  dense.set("first_k_dense_replace", 0);
  fails<Shared>(dense, 0, "has no tensor \"model.layers.0.mlp.gate.weight\"");
  const ChangedModel shared("deepseek_v2");
  shared.set("n_shared_experts", 1);
  fails<Shared>(shared, 1, "has shape [10,6], must be [5,6]");
  const ChangedModel unshared("deepseek_v2");
  unshared.set("n_shared_experts", nullptr);
  fails<Routed>(unshared, 1,
                "tensor \"model.layers.1.mlp.shared_experts.down_proj.weight\" does not belong "
                "to the mixture that config.json describes");
}

TEST_CASE("pretrained: a tensor that is missing, left over, of another type or shape",
          "[io][pretrained]") {
  {
    const ChangedModel model("mixtral");
    model.rename(whole, mixtral_expert + "w3.weight", "other");
    fails<Routed>(model, 1, "has no tensor \"" + mixtral_expert + "w3.weight\"");
    CHECK_NOTHROW(io::open_pretrained(model.folder()).load_layer<Routed>(0));
  }
  {
    const ChangedModel model("mixtral");
    model.rename(whole, "model.norm.weight", mixtral_expert + "w1.bias");
    fails<Routed>(model, 1,
                  "model.safetensors: tensor \"" + mixtral_expert +
                      "w1.bias\" does not belong to the mixture that config.json describes");
  }
  {
    const ChangedModel model("mixtral");
    model.change_header(
        whole, [](auto& header) { header[mixtral_expert + "w1.weight"]["dtype"] = "I64"; });
    fails<Routed>(model, 1,
                  "model.safetensors: tensor \"" + mixtral_expert +
                      "w1.weight\" is I64, must be F64, F32, F16, BF16 or F8_E4M3");
  }
  {
    const ChangedModel model("mixtral");
    model.change_header(whole, [](auto& header) {
      header[mixtral_expert + "w1.weight"]["shape"] = {6, 5};
    });
    fails<Routed>(model, 1,
                  "model.safetensors: tensor \"" + mixtral_expert +
                      "w1.weight\" has shape [6,5], must be [5,6]");
  }
  {
    const ChangedModel model("deepseek_v3");
    const std::string scale = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv";
    model.rename(whole, scale, "other");
    fails<Shared>(model, 1,
                  "has no tensor \"" + scale + "\" and no tensor \"" +
                      scale.substr(0, scale.size() - 4) + "\"");
    // Another name for the same.
    model.rename(whole, "other", scale.substr(0, scale.size() - 4));
    CHECK(values_of(io::open_pretrained(model.folder()).load_layer<Shared>(1)) ==
          values_of(io::open_pretrained(golden("deepseek_v3")).load_layer<Shared>(1)));
  }
  {
    const ChangedModel model("deepseek_v3");
    model.change_json("config.json", [](auto& config) { config.erase("quantization_config"); });
    fails<Shared>(model, 1, "_scale_inv\" has shape [2,2], must be [1,1]");
  }
}

TEST_CASE("pretrained: a file that is cut short while it is open", "[io][pretrained]") {
  const ChangedModel model("mixtral");
  const io::Pretrained opened = io::open_pretrained(model.folder());
  std::filesystem::resize_file(model.file(whole), 3000);
  CHECK_THROWS_WITH(opened.load_layer<Routed>(1),
                    Contains("model.safetensors: cannot be read any more"));
  CHECK_THROWS_WITH(io::open_pretrained(model.folder()), Contains("model.safetensors: "));
}

TEST_CASE("pretrained: a model that is not known, or has no configuration", "[io][pretrained]") {
  const ChangedModel model("mixtral");
  model.set("model_type", "mistral");
  CHECK_THROWS_WITH(io::open_pretrained(model.folder()),
                    Contains("config.json: \"model_type\" is \"mistral\", must be one of mixtral, "
                             "olmoe, "));
  model.set("model_type", nullptr);
  CHECK_THROWS_WITH(io::open_pretrained(model.folder()), Contains("has no \"model_type\""));
  std::filesystem::remove(model.file("config.json"));
  CHECK_THROWS_WITH(io::open_pretrained(model.folder()),
                    Contains("config.json: cannot be read: No such file"));
}

TEST_CASE("pretrained: a family of one's own goes before those that are known",
          "[io][pretrained]") {
  const ChangedModel model("mixtral");
  model.set("model_type", "mine");
  const std::vector<io::Family> mine{{"mine", io::mixtral_mixtures}};
  const io::Pretrained opened = io::open_pretrained(model.folder(), mine);
  CHECK(opened.mixtures().size() == 2);
  CHECK_NOTHROW(opened.load_layer<Routed>(0));
  const std::vector<io::Family> other{
      {"mixtral", [](const io::ModelConfig&) { return std::vector<io::Mixture>(); }}};
  const io::Pretrained none = io::open_pretrained(golden("mixtral"), other);
  CHECK(none.mixtures().empty());
  CHECK_THROWS_WITH(none.mixture(0), Contains("layer 0 is not a mixture, the mixtures are none"));
}

TEST_CASE("pretrained: a family that does not say all is told what", "[io][pretrained]") {
  const auto with = [](const auto& change, const std::string& message) {
    const std::vector<io::Family> wrong{{"deepseek_v3", [&](const io::ModelConfig& config) {
                                           auto mixtures = io::deepseek_v3_mixtures(config);
                                           for (io::Mixture& mixture : mixtures) change(mixture);
                                           return mixtures;
                                         }}};
    CHECK_THROWS_WITH(io::open_pretrained(golden("deepseek_v3"), wrong),
                      Contains("family deepseek_v3: " + message));
  };
  const auto with_name = [&](auto member, const std::string& message) {
    with([&](io::Mixture& m) { member(m.layouts[1]).clear(); }, message);
  };
  using Mixture = io::Mixture;
  using Tensors = io::MixtureTensors;
  with([](Mixture& m) { m.layouts.clear(); }, "Mixture.layouts is empty");
  with([](Mixture& m) { m.scale_rows = 0; }, "Mixture.scale_rows and scale_columns must be at");
  with([](Mixture& m) { m.scale_columns = 0; }, "Mixture.scale_rows and scale_columns must be at");
  with([](Mixture& m) { m.gate.bias = true; }, "MixtureTensors.router_bias is empty");
  with([](Mixture& m) { m.shared_gated = true; }, "MixtureTensors.shared_gate is empty");
  with([](Mixture& m) { m.shared_gated = true, m.shared = 0; },
       "Mixture.shared_gated is true, but there are no shared experts");
  with([](Mixture& m) { m.bias = true; }, "the mixture has biases, MixtureTensors has no names");
  with([](Mixture& m) { m.bias = true, m.shared = 2; },
       "Mixture.shared must be at most 1 with biases");
  with_name(
      [](Tensors & t) -> auto& { return t.router; }, "MixtureTensors.router is empty");
  with_name(
      [](Tensors & t) -> auto& { return t.selection_bias; },
      "MixtureTensors.selection_bias is empty");
  const std::string experts = "MixtureTensors.experts has no name for a map";
  with_name(
      [](Tensors & t) -> auto& { return t.experts.gate; }, experts);
  with_name(
      [](Tensors & t) -> auto& { return t.experts.up; }, experts);
  with_name(
      [](Tensors & t) -> auto& { return t.experts.down; }, experts);
  with_name(
      [](Tensors & t) -> auto& { return t.shared.down; },
      "MixtureTensors.shared has no name for a map");
}
