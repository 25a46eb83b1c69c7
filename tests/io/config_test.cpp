#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "files.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/moe.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using Catch::Matchers::EndsWith;
using test::same_bits;

namespace {

using Layer = MoELayer<Expert<FeedForward>, SharedExpertGate<TopKGate<float>>>;
const Layer::Config small{
    .width = 3,
    .expert = {.hidden = 2,
               .activation = Activation::silu,
               .gated = true,
               .bias = true,
               .limit = 7,
               .linear_offset = 1},
    .gate =
        {.shared = 1,
         .routed = {.experts = 4, .top_k = 2, .bias = true, .score = Score::sigmoid, .scale = 0.1}},
    .identity_experts = 1,
    .seed = 18446744073709551615u};

void check_same(const Layer& layer, const Layer& other) {
  std::vector<Matrix<float>> values;
  for_each_parameter(other, [&](const std::string&, const auto& p) { values.push_back(p.value); });
  std::size_t i = 0;
  for_each_parameter(
      layer, [&](const std::string&, const auto& p) { CHECK(same_bits(p.value, values[i++])); });
}

/// A model that has no configuration of its own.
struct Model {
  Linear<float> input;
  std::vector<Layer> layers;
  Parameter<float> scale;

  explicit Model(const Layer::Config& config) : input({.inputs = 5, .outputs = 3}, 1), scale(1, 3) {
    for (int i = 0; i < 2; ++i) layers.emplace_back(config);
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("input", self.input);
    visit("layers", self.layers);
    visit("scale", self.scale);
  }
};

/// A file of a module whose names begin with `prefix`.
template <class Module>
SafetensorsFile written(const test::TemporaryFolder& folder, const Module& module,
                        const std::string& prefix) {
  SafetensorsWriter writer;
  writer.add_module(module, prefix);
  writer.write(folder.file("a"));
  return SafetensorsFile(folder.file("a"));
}

}  // namespace

TEST_CASE("safetensors config: a layer's is stored by the names of its fields", "[io]") {
  const test::TemporaryFolder folder;
  const Layer layer(small);
  const SafetensorsFile file = written(folder, layer, "layer.");
  const auto said = [&](const std::string& field) {
    return file.metadata("layer.config." + field);
  };
  CHECK(said("width") == "3");
  CHECK(said("expert.width") == "3");  // which was left out
  CHECK(said("expert.hidden") == "2");
  CHECK(said("expert.activation") == "silu");
  CHECK(said("expert.gated") == "true");
  CHECK(said("expert.bias") == "true");
  CHECK(said("expert.limit") == "7");
  CHECK(said("expert.linear_offset") == "1");
  CHECK(said("identity_experts") == "1");
  CHECK(said("gate.shared") == "1");
  CHECK(said("gate.routed.bias") == "true");
  CHECK(said("gate.routed.score") == "sigmoid");
  CHECK(said("gate.routed.scale") == "0.1");
  CHECK(said("output") == "identity");
  CHECK(said("seed") == "18446744073709551615");
  std::size_t fields = 0;
  detail::for_each_field(small, [&](const std::string&, const auto&) { ++fields; });
  CHECK(file.metadata().size() == fields);
}

TEST_CASE("safetensors config: a layer is made from a file", "[io]") {
  const test::TemporaryFolder folder;
  Layer::Config config = small;
  config.gate.routed.switch_count = SwitchCount::first_choice;
  config.gate.routed.row_order = RowOrder::sequence_major;
  config.gate.routed.bias_rate = 1.0 / 3;
  config.gate.routed.renormalise_epsilon = 5e-324;
  config.gate.routed.capacity_factor = 1.7976931348623157e308;
  const Layer layer(config);
  const SafetensorsFile file = written(folder, layer, "layer.");
  const auto read = file.config<Layer>("layer.");
  std::vector<std::pair<std::string, std::int64_t>> fields;
  detail::for_each_field(layer.config(), [&](const std::string& name, const auto& field) {
    fields.emplace_back(name, detail::field_bits(field));
  });
  std::size_t i = 0;
  detail::for_each_field(read, [&](const std::string& name, const auto& field) {
    CHECK(std::pair(name, detail::field_bits(field)) == fields[i++]);
  });
  Layer back(read);
  file.read_module(back, "layer.");
  check_same(back, layer);
  CHECK_THROWS_WITH(file.config<Layer>("model."),
                    Contains("has no metadata \"model.config.width\""));
}

TEST_CASE("safetensors config: another configuration is an error that names the field", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const Layer saved(small);
  save_module(path, saved);
  const auto fails = [&](const Layer::Config& config, const std::string& message) {
    Layer layer(config);
    const Layer before = layer;
    CHECK_THROWS_WITH(load_module(path, layer), Contains(message));
    CHECK_THROWS_AS(load_module(path, layer), std::runtime_error);
    check_same(layer, before);
    load_parameters(path, layer);  // whose shapes are the same
  };
  Layer::Config other = small;
  other.gate.routed.top_k = 1;
  fails(other, path + ": metadata \"config.gate.routed.top_k\" is 2, the module has 1");
  other = small;
  other.gate.routed.scale = 0.1 + 1e-17 * 2;
  fails(other, "\"config.gate.routed.scale\" is 0.1, the module has 0.10000000000000002");
  other = small;
  other.gate.routed.score = Score::softmax;
  fails(other, "\"config.gate.routed.score\" is sigmoid, the module has softmax");
  other = small;
  other.expert.recompute = true;
  fails(other, "\"config.expert.recompute\" is false, the module has true");
  other = small;
  other.output = Activation::tanh;
  fails(other, "\"config.output\" is identity, the module has tanh");

  other = small;
  other.seed = 5;
  Layer layer(other);
  load_module(path, layer);
  check_same(layer, saved);
}

TEST_CASE("safetensors config: another gate is one too", "[io]") {
  using Noisy = MoELayer<Expert<FeedForward>>;
  using Chosen = MoELayer<Expert<FeedForward>, ExpertChoiceGate<float>>;
  const test::TemporaryFolder folder;
  const Noisy noisy(
      {.width = 3, .expert = {.hidden = 2}, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
  save_module(folder.file("a"), noisy);
  Chosen chosen({.width = 3, .expert = {.hidden = 2}, .gate = {.experts = 4}, .seed = 1});
  CHECK_THROWS_WITH(
      load_module(folder.file("a"), chosen),
      Contains("has metadata \"config.gate.importance_weight\", a field that the module's"));
}

TEST_CASE("safetensors config: those of the parts of a model", "[io]") {
  const test::TemporaryFolder folder;
  const Model saved(small);
  const SafetensorsFile file = written(folder, saved, "model.");
  CHECK(file.metadata("model.input.config.outputs") == "3");
  CHECK(file.metadata("model.layers.0.config.gate.routed.experts") == "4");
  CHECK(file.metadata().count("model.layers.1.config.width") == 1);
  CHECK(file.config<Layer>("model.layers.1.").gate.routed.top_k == 2);
  Model same(small);
  file.read_module(same, "model.");
  Layer::Config config = small;
  config.gate.routed.jitter = 0.5;
  Model other(small);
  other.layers[1] = Layer(config);
  CHECK_THROWS_WITH(
      file.read_module(other, "model."),
      Contains("\"model.layers.1.config.gate.routed.jitter\" is 0, the module has 0.5"));
}

TEST_CASE("safetensors config: values that do not suit each other are the module's to refuse",
          "[io]") {
  const test::TemporaryFolder folder;
  const Linear<float> linear({.inputs = 2, .outputs = 2}, 1);
  SafetensorsWriter writer;
  writer.add_module(linear);
  writer.set_metadata("config.inputs", "-5");
  writer.write(folder.file("a"));
  const SafetensorsFile file(folder.file("a"));
  CHECK_THROWS_WITH(Linear<float>(file.config<Linear<float>>(), 1),
                    Contains("Linear::Config.inputs = -5"));
}

TEST_CASE("safetensors config: a file without one, written by hand, is loaded", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const std::string header = R"({"bias":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
                             R"("weight":{"dtype":"F32","shape":[3,2],"data_offsets":[8,32]}})";
  const std::string data(
      "\x00\x00\x80\x3f\x00\x00\x00\xc0"   // 1, -2
      "\x00\x00\x00\x3f\x00\x00\x40\x40"   // 0.5, 3
      "\x00\x00\x80\xbe\x00\x00\x00\x00"   // -0.25, 0
      "\x00\x00\xc8\x42\x00\x00\x00\x80",  // 100, -0
      32);
  test::write_file(path, header, data);
  Matrix<float> weight(3, 2);
  weight << 0.5f, 3, -0.25f, 0, 100, -0.0f;
  for (const bool parameters : {true, false}) {
    Linear<float> linear({.inputs = 3, .outputs = 2}, 1);
    if (parameters) {
      load_parameters(path, linear);
    } else {
      load_module(path, linear);
    }
    CHECK(linear.bias.value(0, 0) == 1);
    CHECK(linear.bias.value(0, 1) == -2);
    CHECK(same_bits(linear.weight.value, weight));
  }
  CHECK_THROWS_WITH(SafetensorsFile(path).config<Linear<float>>(),
                    Contains("has no metadata \"config.inputs\""));
}

TEST_CASE("safetensors: a prefix that is missing is shown", "[io]") {
  const test::TemporaryFolder folder;
  const Linear<float> saved({.inputs = 3, .outputs = 2}, 1);
  SafetensorsWriter writer;
  writer.add_module(saved, "model.in.");
  writer.write(folder.file("a"));
  const SafetensorsFile file(folder.file("a"));
  Linear<float> linear({.inputs = 3, .outputs = 2}, 2);
  CHECK_THROWS_WITH(
      file.config<Linear<float>>(),
      EndsWith("has no metadata \"config.inputs\"; there is \"model.in.config.inputs\","
               " with the prefix \"model.in.\""));
  CHECK_THROWS_WITH(file.metadata("config.inputs"), EndsWith("with the prefix \"model.in.\""));
  CHECK_THROWS_WITH(file.read_parameters(linear, "in."),
                    EndsWith("has no tensor \"in.weight\"; there is \"model.in.weight\", with the "
                             "prefix \"model.\""));
  // Two of them do not say which is meant.
  writer.add_module(saved, "model.out.");
  writer.write(folder.file("b"));
  CHECK_THROWS_WITH(SafetensorsFile(folder.file("b")).tensor("weight"),
                    EndsWith("has no tensor \"weight\""));
  // What only ends with the name has another one.
  CHECK_THROWS_WITH(file.tensor("eight"), EndsWith("has no tensor \"eight\""));
}
