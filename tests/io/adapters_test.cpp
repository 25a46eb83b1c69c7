#include "moe/io/adapters.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "files.hpp"
#include "moe/adapt/narrow_lora.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/optim/adam.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using Catch::Matchers::Equals;
using nlohmann::json;
using test::random_matrix;
using test::same_bits;
using test::TemporaryFolder;

namespace {

/// A model whose network() is no module.
template <class Layer>
struct NamedModel {
  Layer layer;

  static const char* network() { return "mixture"; }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("layer", self.layer);
  }
};

/// Numbers in whatever is trained.
template <class Module>
void randomize_adapters(Module& module) {
  for_each_parameter(module, [seed = std::uint64_t{4}](const std::string&, auto& p) mutable {
    if (p.trained) p.value = random_matrix(p.value.rows(), p.value.cols(), ++seed);
  });
}

constexpr const char* config_file = "/adapter_config.json";
constexpr const char* tensors_file = "/adapter_model.safetensors";

/// What adapters/make_golden.py wrote.
std::string golden(const std::string& name) { return MOE_TEST_ADAPTERS "/" + name; }

json read_config(const std::string& folder) {
  return json::parse(test::read_all(folder + config_file));
}
void write_config(const std::string& folder, const json& config) {
  std::ofstream(folder + config_file) << config;
}

/// Random numbers in every parameter that is trained.
template <class Module>
void randomize_trained(Module& module, std::uint64_t seed) {
  for_each_parameter(module, [&](const std::string&, auto& p) {
    if (!p.trained) return;
    p.value = random_matrix<std::remove_cvref_t<decltype(*p.value.data())>>(
        p.value.rows(), p.value.cols(), ++seed, 0.3);
  });
}

/// All parameters of a module, the bytes of each by its name.
template <class Module>
std::map<std::string, std::string> bytes_of(const Module& module) {
  std::map<std::string, std::string> bytes;
  for_each_parameter(module, [&](const std::string& name, const auto& p) {
    bytes[name] = std::string(reinterpret_cast<const char*>(p.value.data()),
                              detail::to_size(p.value.size()) * sizeof(*p.value.data()));
  });
  return bytes;
}

// The mixtures of make_golden.py: D = 6, H = 5, E = 4.

template <class Scalar>
using Layer = MoELayer<Expert<FeedForward, Scalar>, TopKGate<Scalar>>;
template <class Scalar>
using Adapted = MoELayer<Lora<FeedForward, Scalar>, LoraGate<TopKGate<Scalar>>>;

struct Golden {
  std::string name;
  FeedForwardConfig expert;
  Index top_k;
  bool router_bias;
  LoraConfig lora;
  LoraGateConfig gate;
};

std::vector<Golden> all_golden() {
  return {
      {"plain",
       {.hidden = 5, .activation = Activation::relu},
       2,
       false,
       {.rank = 3, .alpha = 10},
       {.rank = 0}},
      {"gated",
       {.hidden = 5, .activation = Activation::silu, .gated = true},
       2,
       true,
       {.rank = 3, .alpha = 10},
       {.rank = 2, .alpha = 10}},
      {"stabilized",
       {.hidden = 5, .activation = Activation::silu, .gated = true, .bias = true},
       3,
       false,
       {.rank = 3, .alpha = 10, .rank_stabilized = true, .gate = false},
       {.rank = 1, .alpha = 7, .rank_stabilized = true}},
  };
}

template <class Scalar>
Adapted<Scalar> adapted_layer(const Golden& of) {
  Layer<Scalar> layer({.width = 6,
                       .expert = of.expert,
                       .gate = {.experts = 4,
                                .top_k = of.top_k,
                                .bias = of.router_bias,
                                .score = Score::softmax_of_chosen},
                       .seed = 1});
  const SafetensorsFile base(golden(of.name) + "/base.safetensors");
  for_each_parameter(layer, [&](const std::string& name, auto& p) {
    const Matrix<Scalar> value = base.matrix<Scalar>(name);
    REQUIRE(value.rows() == p.value.rows());
    REQUIRE(value.cols() == p.value.cols());
    p.value = value;
  });
  return adapt(layer, of.lora, of.gate, Seed{1});
}

template <class Scalar>
void check_golden(const Golden& of, double tolerance) {
  INFO(of.name << ", " << sizeof(Scalar) << " bytes");
  Adapted<Scalar> layer = adapted_layer<Scalar>(of);
  load_adapters(golden(of.name), layer);
  const SafetensorsFile passes(golden(of.name) + "/passes.safetensors");
  const auto rows = [&](const char* name) { return passes.matrix<Scalar>(name); };
  typename Adapted<Scalar>::Tape tape;
  CHECK(test::relative_error(layer.forward(rows("x"), tape, {.step = 0}), rows("y")) < tolerance);
  CHECK(test::relative_error(layer.backward(rows("dy"), tape), rows("dx")) < tolerance);

  const SafetensorsFile gradients(golden(of.name) + "/gradients.safetensors");
  std::size_t compared = 0;
  for_each_parameter(layer, [&](const std::string& name, auto& p) {
    if (!p.trained) return;
    INFO("parameter " << name);
    const Matrix<Scalar> expected =
        gradients.matrix<Scalar>("base_model.model." + name).transpose();
    CHECK(test::relative_error(p.gradient(), expected) < tolerance);
    ++compared;
  });
  CHECK(compared == gradients.tensors().size());

  typename Adapted<Scalar>::Tape plain_tape;
  const auto plain = merged(layer);
  typename std::remove_const_t<decltype(plain)>::Tape merged_tape;
  CHECK(test::relative_error(plain.evaluate(rows("x"), merged_tape), rows("y")) < tolerance);
}

/// A layer of 3 gated experts, with adapters of rank 2, D = 4 and H = 3.
template <class Scalar>
Adapted<Scalar> small_layer(const LoraConfig& lora = {.rank = 2, .alpha = 5},
                            const LoraGateConfig& gate = {.rank = 2, .alpha = 5}) {
  const Layer<Scalar> layer({.width = 4,
                             .expert = {.hidden = 3, .gated = true},
                             .gate = {.experts = 3, .top_k = 2},
                             .seed = 1});
  return adapt(layer, lora, gate, Seed{2});
}

/// A layer of 2 groups of one expert, likewise.
auto hierarchical_layer(const LoraConfig& lora, const LoraGateConfig& gate) {
  const MoELayer<Expert<FeedForward>, HierarchicalGate<float>> layer(
      {.width = 4,
       .expert = {.hidden = 3},
       .gate = {.groups = 2, .group_experts = 1, .top_k_groups = 1, .top_k = 1},
       .seed = 1});
  return adapt(layer, lora, gate, Seed{2});
}

/// Adapters of a module, saved and loaded into one with others, make the same of it.
template <class Module>
void check_round_trip(Module saved, const std::string& prefix = {}) {
  const TemporaryFolder folder;
  Module loaded = saved;
  randomize_trained(saved, 3);
  randomize_trained(loaded, 4);
  REQUIRE(bytes_of(loaded) != bytes_of(saved));
  save_adapters(folder.file("a"), saved, prefix);
  load_adapters(folder.file("a"), loaded, prefix);
  CHECK(bytes_of(loaded) == bytes_of(saved));
}

template <class First, class Second>
struct TwoLayers {
  First first;
  Second second;

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("first", self.first);
    visit("second", self.second);
  }
};
using Model = TwoLayers<Adapted<float>, Adapted<float>>;

Model two_layers() {
  return {small_layer<float>(), small_layer<float>({.rank = 3, .alpha = 0.1}, {.rank = 0})};
}

/// Puts change(its tensors) into the file of a folder.
using Tensors = std::map<std::string, Matrix<float>>;
void rewrite_tensors(const std::string& folder, const std::function<void(Tensors&)>& change) {
  const SafetensorsFile file(folder + tensors_file);
  Tensors tensors;
  for (const auto& [name, tensor] : file.tensors()) tensors[name] = file.matrix<float>(name);
  change(tensors);
  SafetensorsWriter writer;
  for (const auto& [name, matrix] : tensors) writer.add(name, matrix);
  writer.write(folder + tensors_file);
}

/// What load_adapters() says of a folder that was saved well and changed; the layer is what it was.
std::string refusal(const std::function<void(const std::string&)>& change,
                    const Adapted<float>& layer = small_layer<float>()) {
  const TemporaryFolder folder;
  const std::string path = folder.file("a");
  Adapted<float> saved = small_layer<float>();
  randomize_trained(saved, 3);
  save_adapters(path, saved);
  change(path);
  Adapted<float> loaded = layer;
  try {
    load_adapters(path, loaded);
  } catch (const std::runtime_error& error) {
    CHECK(bytes_of(loaded) == bytes_of(layer));
    return error.what();
  }
  return "not refused";
}

/// The same with a setting of another value.
std::string refusal_of(const std::string& key, const json& value) {
  return refusal([&](const std::string& path) {
    json config = read_config(path);
    config[key] = value;
    write_config(path, config);
  });
}
/// Whether it is loaded all the same.
bool is_loaded(const std::string& key, const json& value) {
  return refusal_of(key, value) == "not refused";
}

constexpr const char* some_a = "base_model.model.experts.1.up.lora_A.weight";

/// The folder of a name that MOE_TEST_KEEP_ADAPTERS says, for make_golden.py --check, or a temporary one.
std::string kept(const TemporaryFolder& folder, const std::string& name) {
  const char* const keep = std::getenv("MOE_TEST_KEEP_ADAPTERS");
  return keep == nullptr ? folder.file(name) : std::string(keep) + "/" + name;
}

}  // namespace

TEST_CASE("adapters: a folder of PEFT's computes what PEFT computes", "[io][adapt]") {
  for (const Golden& of : all_golden()) {
    check_golden<double>(of, 1e-12);
    check_golden<float>(of, 1e-5);
  }
}

TEST_CASE("adapters: what is saved is what PEFT saved", "[io][adapt]") {
  const TemporaryFolder folder;
  for (const Golden& of : all_golden()) {
    INFO(of.name);
    Adapted<double> layer = adapted_layer<double>(of);
    load_adapters(golden(of.name), layer);
    const std::string ours = kept(folder, of.name);
    save_adapters(ours, layer);

    const SafetensorsFile expected(golden(of.name) + tensors_file);
    const SafetensorsFile saved(ours + tensors_file);
    REQUIRE(saved.tensors().size() == expected.tensors().size());
    for (const auto& [name, tensor] : expected.tensors()) {
      INFO(name);
      CHECK(saved.tensor(name).type == "F64");
      CHECK(saved.tensor(name).shape == tensor.shape);
      CHECK(same_bits(saved.matrix<double>(name), expected.matrix<double>(name)));
    }
    const json config = read_config(ours);
    const json theirs = read_config(golden(of.name));
    for (const auto& [key, value] : config.items()) {
      INFO(key);
      if (key == "target_modules") continue;  // theirs are the ends of names and an expression
      CHECK(value == theirs.at(key));
    }
  }
}

TEST_CASE("adapters: a round trip keeps the bits", "[io][adapt]") {
  check_round_trip(small_layer<float>());
  check_round_trip(small_layer<double>());
  check_round_trip(small_layer<float>({.rank = 3, .alpha = 0.1, .rank_stabilized = true},
                                      {.rank = 1, .alpha = 7, .rank_stabilized = true}));
  // Of these PEFT's one flag says neither.
  check_round_trip(small_layer<double>({.rank = 3, .alpha = 0.1, .rank_stabilized = true},
                                       {.rank = 2, .alpha = 7}));
  check_round_trip(small_layer<float>({.rank = 0}, {.rank = 2}));
  check_round_trip(small_layer<float>({.rank = 2, .alpha = -3, .up = false}, {.rank = 0}));
  check_round_trip(two_layers());
  check_round_trip(two_layers(), "model.layers-7.");
  // A single expert, or the experts of a layer alone.
  check_round_trip(LoraFeedForward<float>(
                       {.width = 4, .network = {.hidden = 3}, .lora = {.rank = 2, .alpha = 5}}, 1),
                   "experts.5.");

  check_round_trip(
      LoraGate<TopKGate<float>>({.width = 4, .gate = {.experts = 3, .top_k = 2}, .lora = {}}, 1),
      "gate");
  check_round_trip(hierarchical_layer({.rank = 2}, {.rank = 3}));

  const Layer<float> layer({.width = 4,
                            .expert = {.hidden = 3, .gated = true},
                            .gate = {.experts = 3, .top_k = 2},
                            .seed = 1});
  check_round_trip(adapt(ServingLayer<Layer<float>, Int8>(layer), LoraConfig{.rank = 2}, Seed{2}));
}

TEST_CASE("adapters: numbers that are not finite are kept too", "[io][adapt]") {
  const TemporaryFolder folder;
  Adapted<float> saved = small_layer<float>();
  for_each_parameter(saved, [&](const std::string& name, auto& p) {
    if (name == "experts.1.up.lora_A.weight") {
      p.value(1, 0) = std::numeric_limits<float>::quiet_NaN();
      p.value(2, 1) = -std::numeric_limits<float>::infinity();
    }
  });
  save_adapters(folder.file("a"), saved);
  Adapted<float> loaded = small_layer<float>();
  load_adapters(folder.file("a"), loaded);
  CHECK(bytes_of(loaded) == bytes_of(saved));
}

TEST_CASE("adapters: of float into double and back", "[io][adapt]") {
  const TemporaryFolder folder;
  Adapted<float> narrow = small_layer<float>();
  randomize_trained(narrow, 3);
  save_adapters(folder.file("a"), narrow);
  Adapted<double> wide = small_layer<double>();
  load_adapters(folder.file("a"), wide);
  save_adapters(folder.file("b"), wide);
  Adapted<float> back = small_layer<float>();
  load_adapters(folder.file("b"), back);
  CHECK(bytes_of(back) == bytes_of(narrow));
}

TEST_CASE("adapters: names and settings in the files", "[io][adapt]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("new/and/deep");
  const auto adapted =
      hierarchical_layer({.rank = 3, .alpha = 0.5, .up = false}, {.rank = 2, .alpha = 0.5});
  save_adapters(path, adapted, "model.moe.");

  const std::string begin = "base_model.model.model.moe.";
  const std::map<std::string, std::vector<std::uint64_t>> shapes = {
      {begin + "gate.primary.lora_A.weight", {2, 4}},
      {begin + "gate.primary.lora_B.weight", {2, 2}},
      {begin + "gate.secondary.0.lora_A.weight", {2, 4}},
      {begin + "gate.secondary.0.lora_B.weight", {1, 2}},
      {begin + "gate.secondary.1.lora_A.weight", {2, 4}},
      {begin + "gate.secondary.1.lora_B.weight", {1, 2}},
      {begin + "experts.0.down.lora_A.weight", {3, 3}},
      {begin + "experts.0.down.lora_B.weight", {4, 3}},
      {begin + "experts.1.down.lora_A.weight", {3, 3}},
      {begin + "experts.1.down.lora_B.weight", {4, 3}},
  };
  const SafetensorsFile file(path + tensors_file);
  CHECK(file.tensors().size() == shapes.size());
  for (const auto& [name, shape] : shapes) {
    INFO(name);
    CHECK(file.tensor(name).shape == shape);
    CHECK(file.tensor(name).type == "F32");
  }

  // The rank of most is "r".
  const json config = read_config(path);
  CHECK(config.at("peft_type") == "LORA");
  CHECK(config.at("r") == 2);
  CHECK(config.at("lora_alpha") == 0.5);
  CHECK(config.at("rank_pattern") ==
        json({{"^model.moe.experts.0.down", 3}, {"^model.moe.experts.1.down", 3}}));
  CHECK(config.at("alpha_pattern") == json::object());
  CHECK(config.at("target_modules") ==
        json({"model.moe.gate.primary", "model.moe.gate.secondary.0", "model.moe.gate.secondary.1",
              "model.moe.experts.0.down", "model.moe.experts.1.down"}));
}

TEST_CASE("adapters: a gate's name does not stand for the experts' gates", "[io][adapt]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a");
  save_adapters(path, small_layer<float>({.rank = 2, .gate = false, .up = false}));
  CHECK(read_config(path).at("target_modules") ==
        "gate|experts\\.0\\.down|experts\\.1\\.down|experts\\.2\\.down");
}

TEST_CASE("adapters: alpha and its flag", "[io][adapt]") {
  const TemporaryFolder folder;
  const auto saved = [&](const LoraConfig& lora, const LoraGateConfig& gate) {
    save_adapters(folder.file("a"), small_layer<float>(lora, gate));
    return read_config(folder.file("a"));
  };
  // Whole numbers are so in the file.
  CHECK_THAT(saved({.rank = 3, .alpha = 10}, {.rank = 3, .alpha = 10}).at("lora_alpha").dump(),
             Equals("10"));
  const json all = saved({.rank = 4, .alpha = 10, .rank_stabilized = true},
                         {.rank = 4, .alpha = 6, .rank_stabilized = true});
  CHECK(all.at("use_rslora") == true);
  CHECK(all.at("lora_alpha") == 10);
  CHECK(all.at("alpha_pattern") == json({{"^gate", 6}}));
  // alpha / sqrt(4) is 2·alpha / 4.
  const json some =
      saved({.rank = 4, .alpha = 10, .rank_stabilized = true}, {.rank = 2, .alpha = 6});
  CHECK(some.at("use_rslora") == false);
  CHECK(some.at("lora_alpha") == 20);
  CHECK(some.at("alpha_pattern") == json({{"^gate", 6}}));
  CHECK(some.at("rank_pattern") == json({{"^gate", 2}}));
}

TEST_CASE("adapters: a layer of a model by its prefix", "[io][adapt]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a");
  Model model = two_layers();
  randomize_trained(model, 3);
  save_adapters(path, model, "model.");
  Adapted<float> first = small_layer<float>();
  load_adapters(path, first, "model.first.");
  CHECK(bytes_of(first) == bytes_of(model.first));
  CHECK_THROWS_WITH(load_adapters(path, first, "model."),
                    Contains("has no tensor \"base_model.model.model.gate.lora_A.weight\""));
}

TEST_CASE("adapters: the configuration that a folder's adapters have", "[io][adapt]") {
  for (const Golden& of : all_golden()) {
    INFO(of.name);
    const LoraConfig lora = load_lora_config(golden(of.name));
    CHECK(lora.rank == 3);
    CHECK(lora.alpha == 10);
    CHECK(lora.rank_stabilized == (of.name == "stabilized"));
    CHECK(lora.gate == (of.name == "gated"));
    CHECK(lora.up);
    CHECK(lora.down);
    if (of.gate.rank == 0) {
      CHECK_THROWS_WITH(load_lora_gate_config(golden(of.name)),
                        Contains("has no adapters of a gate"));
      continue;
    }
    const LoraGateConfig gate = load_lora_gate_config(golden(of.name));
    CHECK(gate.rank == of.gate.rank);
    CHECK(gate.alpha == of.gate.alpha);
    CHECK(gate.rank_stabilized == of.gate.rank_stabilized);
  }

  const TemporaryFolder folder;
  const std::string path = folder.file("a");
  Model model = two_layers();
  save_adapters(path, model, "model.");
  const LoraConfig first = load_lora_config(path, "model.first.");
  CHECK(first.rank == 2);
  CHECK(first.alpha == 5);
  const LoraConfig second = load_lora_config(path, "model.second.");
  CHECK(second.rank == 3);
  CHECK(second.alpha == 0.1);
  CHECK_THROWS_WITH(load_lora_config(path), Contains("has no adapters of experts"));
  CHECK_THROWS_WITH(load_lora_config(folder.file("b")), Contains("adapter_config.json"));

  json config = read_config(path);
  config["rank_pattern"]["^model.first.experts.2.up"] = 4;
  write_config(path, config);
  CHECK_THROWS_WITH(load_lora_config(path, "model.first."),
                    Contains("the adapters of experts have several ranks or alphas"));
  CHECK(load_lora_gate_config(path, "model.first.").rank == 2);
  CHECK_THROWS_WITH(load_lora_gate_config(path, "model.second."),
                    Contains("has no adapters of a gate"));

  SafetensorsWriter writer;
  const Matrix<float> matrix = Matrix<float>::Ones(2, 4);
  writer.add("base_model.model.experts.0.out.lora_A.weight", matrix);
  writer.write(path + tensors_file);
  CHECK_THROWS_WITH(load_lora_config(path), Contains("has no adapters of experts"));

  const auto hierarchical = hierarchical_layer({.rank = 1}, {.rank = 3, .alpha = 2});
  save_adapters(path, hierarchical, "moe.");
  CHECK(load_lora_gate_config(path, "moe.").rank == 3);
  CHECK(load_lora_gate_config(path, "moe.").alpha == 2);
  config = read_config(path);
  config["alpha_pattern"]["^moe.gate.secondary.1"] = 4;
  write_config(path, config);
  CHECK_THROWS_WITH(load_lora_gate_config(path, "moe."),
                    Contains("the adapters of a gate have several ranks or alphas"));
}

TEST_CASE("adapters: training goes on to the same bits", "[io][adapt]") {
  using Noisy = MoELayer<Expert<FeedForward>, NoisyTopKGate<float>>;
  using Trained = MoELayer<Lora<FeedForward>, LoraGate<NoisyTopKGate<float>>>;
  const Noisy base({.width = 4,
                    .expert = {.hidden = 3},
                    .gate = {.experts = 5, .top_k = 2, .load_weight = 0.1},
                    .seed = 1});
  const auto start = [&](std::uint64_t seed) {
    return adapt(base, LoraConfig{.rank = 2}, LoraGateConfig{.rank = 3}, Seed{seed});
  };
  const auto train = [](Trained& layer, Adam<float>& adam, std::uint64_t first, std::uint64_t end) {
    Trained::Tape tape;
    for (std::uint64_t step = first; step < end; ++step) {
      const Matrix<float> x = random_matrix<float>(9, 4, step);
      const Matrix<float> y = layer.forward(x, tape, {.step = step});
      zero_gradients(layer);
      layer.backward(y - random_matrix<float>(9, 4, step + 100), tape);
      adam.update(layer, 0.05F);
    }
  };
  Trained whole = start(1);
  Adam<float> adam{{}};
  train(whole, adam, 0, 6);

  const TemporaryFolder folder;
  {
    Trained half = start(1);
    Adam<float> half_adam{{}};
    train(half, half_adam, 0, 3);
    save_adapters(folder.file("a"), half);
    SafetensorsWriter writer;
    writer.add_optimizer(half_adam, half, "adam.");
    writer.write(folder.file("optimizer.safetensors"));
  }
  Trained resumed = start(7);
  Adam<float> resumed_adam{{}};
  load_adapters(folder.file("a"), resumed);
  SafetensorsFile(folder.file("optimizer.safetensors"))
      .read_optimizer(resumed_adam, resumed, "adam.");
  REQUIRE(bytes_of(resumed) != bytes_of(whole));
  train(resumed, resumed_adam, 3, 6);
  CHECK(bytes_of(resumed) == bytes_of(whole));
}

TEST_CASE("adapters: files that are not there or not in order", "[io][adapt]") {
  CHECK_THAT(refusal([](const std::string& path) { std::filesystem::remove_all(path); }),
             Contains("adapter_config.json"));
  CHECK_THAT(refusal([](const std::string& path) { std::filesystem::remove(path + config_file); }),
             Contains("adapter_config.json"));
  CHECK_THAT(refusal([](const std::string& path) { std::filesystem::remove(path + tensors_file); }),
             Contains("adapter_model.safetensors"));
  CHECK_THAT(refusal([](const std::string& path) {
               std::filesystem::resize_file(path + tensors_file, 2000);
             }),
             Contains("adapter_model.safetensors"));
  CHECK_THAT(refusal([](const std::string& path) {
               std::filesystem::resize_file(path + config_file, 20);
             }),
             Contains("is not JSON"));
  CHECK_THAT(refusal([](const std::string& path) { write_config(path, json::array({1})); }),
             Contains("is not an object"));
}

TEST_CASE("adapters: settings that cannot be served", "[io][adapt]") {
  CHECK_THAT(refusal_of("peft_type", "ADALORA"),
             Contains("\"peft_type\" is \"ADALORA\", must be \"LORA\""));
  CHECK_THAT(refusal_of("peft_type", nullptr), Contains("has no \"peft_type\""));
  CHECK_THAT(refusal_of("bias", "all"), Contains("\"bias\" is \"all\", must be \"none\""));
  CHECK_THAT(refusal_of("bias", 3), Contains("\"bias\" is 3, must be a string"));
  for (const char* key : {"use_dora", "use_qalora", "fan_in_fan_out", "lora_bias"}) {
    CHECK_THAT(refusal_of(key, true),
               Contains('"' + std::string(key) + "\" is true, must be false"));
    CHECK_THAT(refusal_of(key, 1), Contains("must be true or false"));
    CHECK(is_loaded(key, nullptr));
  }
  CHECK_THAT(refusal_of("use_rslora", "yes"), Contains("\"use_rslora\" is \"yes\""));
  CHECK_THAT(refusal_of("modules_to_save", {"head"}),
             Contains("\"modules_to_save\" is [\"head\"], must be null or empty"));
  for (const char* key : {"layer_replication", "target_parameters", "alora_invocation_tokens",
                          "trainable_token_indices"}) {
    CHECK_THAT(refusal_of(key, {1}), Contains("must be null or empty"));
    CHECK(is_loaded(key, json::array()));
  }
  for (const char* key : {"use_bdlora", "arrow_config", "kasa_config", "monteclora_config"}) {
    CHECK_THAT(refusal_of(key, {{"a", 1}}), Contains("must be null or empty"));
    CHECK(is_loaded(key, nullptr));
  }
  for (const char* start : {"pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"}) {
    CHECK_THAT(refusal_of("init_lora_weights", start), Contains("\"init_lora_weights\" is"));
  }
  for (const json& start :
       {json(true), json(false), json("gaussian"), json("orthogonal"), json("eva")}) {
    CHECK(is_loaded("init_lora_weights", start));
  }
  CHECK(is_loaded("what_a_later_version_has", 7));
}

TEST_CASE("adapters: ranks and alphas that are not the module's", "[io][adapt]") {
  CHECK_THAT(refusal_of("r", 3), Contains("the rank of gate is 3, the module has 2"));
  CHECK_THAT(refusal_of("r", 0), Contains("\"r\" is 0, must be at least 1"));
  CHECK_THAT(refusal_of("r", 2.5), Contains("\"r\" is 2.5, must be a whole number"));
  CHECK_THAT(refusal_of("r", -2), Contains("\"r\" is -2"));
  CHECK_THAT(refusal_of("r", nullptr), Contains("has no \"r\""));
  CHECK_THAT(refusal_of("lora_alpha", 6), Contains("the factor of gate is 3, the module has 2.5"));
  CHECK_THAT(refusal_of("lora_alpha", "5"), Contains("\"lora_alpha\" is \"5\", must be a number"));
  CHECK_THAT(refusal_of("lora_alpha", nullptr), Contains("has no \"lora_alpha\""));
  // 5 / sqrt(2)
  CHECK_THAT(refusal_of("use_rslora", true), Contains("the factor of gate is 3.535"));
  CHECK(is_loaded("lora_alpha", 5.000000000001));
}

TEST_CASE("adapters: a factor that is not finite in the layer's Scalar", "[io][adapt]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a");
  const auto save = [&](double alpha) {
    const LoraFeedForward<double> network(
        {.width = 4, .network = {.hidden = 3}, .lora = {.rank = 1, .alpha = alpha}}, 0);
    save_adapters(path, network, "experts.0.");
  };
  const MoELayer<Expert<FeedForward>> layer(
      {.width = 4, .expert = {.hidden = 3}, .gate = {.experts = 1, .top_k = 1}, .seed = 1});
  save(1e38);
  CHECK_NOTHROW(adapt(layer, load_lora_config(path), Seed{1}));
  save(1e39);
  CHECK_THROWS_WITH(adapt(layer, load_lora_config(path), Seed{1}),
                    Contains("LoraConfig.alpha = 1e+39, gives a factor of 1e+39"));
}

TEST_CASE("adapters: patterns of ranks and alphas", "[io][adapt]") {
  // Of whole names, of their ends, and of nothing that is here.
  CHECK_THAT(refusal_of("rank_pattern", {{"^experts.1.up", 4}}),
             Contains("the rank of experts.1.up is 4, the module has 2"));
  CHECK_THAT(refusal_of("rank_pattern", {{"experts.1.up", 4}}), Contains("experts.1.up is 4"));
  CHECK_THAT(refusal_of("rank_pattern", {{"1.up", 4}}), Contains("experts.1.up is 4"));
  CHECK_THAT(refusal_of("rank_pattern", {{"up", 4}}), Contains("experts.0.up is 4"));
  CHECK_THAT(refusal_of("rank_pattern", {{"^gate", 4}}), Contains("the rank of gate is 4"));
  CHECK_THAT(refusal_of("alpha_pattern", {{"down", 4}}),
             Contains("the factor of experts.0.down is 2, the module has 2.5"));
  for (const char* pattern : {"^up", "p", "^1.up", "experts", "xperts.1.up", "^experts.1"}) {
    CHECK(is_loaded("rank_pattern", {{pattern, 4}}));
  }
  CHECK(is_loaded("rank_pattern", nullptr));

  CHECK_THAT(refusal_of("rank_pattern", {{"up", 2}, {"experts.1.up", 2}}),
             Contains("\"experts.1.up\" and \"up\" are both patterns of experts.1.up"));
  CHECK_THAT(refusal_of("rank_pattern", {{"up", 0}}),
             Contains("\"rank_pattern.up\" is 0, must be at least 1"));
  CHECK_THAT(refusal_of("rank_pattern", {{"up", "2"}}), Contains("\"rank_pattern.up\" is \"2\""));
  CHECK_THAT(refusal_of("rank_pattern", {1, 2}), Contains("\"rank_pattern\" is [1,2]"));
  for (const char* pattern :
       {"experts\\.1\\.up", "up|down", ".*up", "^^up", "up$", "experts.[0-9].up", "", "^"}) {
    for (const char* key : {"rank_pattern", "alpha_pattern"}) {
      CHECK_THAT(refusal_of(key, {{pattern, 2}}),
                 Contains("must have letters, digits, '_', '-' and '.' only"));
    }
  }
}

TEST_CASE("adapters: tensors that do not fit the module", "[io][adapt]") {
  const auto rewritten = [](const std::function<void(Tensors&)>& change) {
    return refusal([&](const std::string& path) { rewrite_tensors(path, change); });
  };
  CHECK_THAT(rewritten([](Tensors&) {}), Equals("not refused"));
  CHECK_THAT(rewritten([](Tensors& tensors) { tensors.erase(some_a); }),
             Contains("has no tensor \"" + std::string(some_a) + '"'));
  CHECK_THAT(rewritten([](Tensors& tensors) {
               tensors[some_a] = Matrix<float>(tensors[some_a].transpose());
             }),
             Contains(std::string(some_a) + "\" has shape [4,2], must be [2,4]"));
  CHECK_THAT(
      rewritten([](Tensors& tensors) {
        tensors["base_model.model.experts.3.up.lora_A.weight"] = Matrix<float>::Ones(2, 4);
      }),
      Contains("tensor \"base_model.model.experts.3.up.lora_A.weight\" belongs to an adapter "
               "that the module does not have"));
  CHECK_THAT(
      refusal([](const std::string&) {}, small_layer<float>({.rank = 2, .alpha = 5, .up = false})),
      Contains("experts.0.up.lora_A.weight\" belongs to an adapter that the module does not have"));
  CHECK_THAT(
      refusal([](const std::string&) {}, small_layer<float>({.rank = 2, .alpha = 5}, {.rank = 0})),
      Contains("gate.lora_A.weight\" belongs to an adapter that the module does not have"));
}

TEST_CASE("adapters: a module without any", "[io][adapt]") {
  const TemporaryFolder folder;
  Adapted<float> none = small_layer<float>({.rank = 0}, {.rank = 0});
  CHECK_THROWS_AS(save_adapters(folder.file("a"), none), std::invalid_argument);
  CHECK_THROWS_WITH(save_adapters(folder.file("a"), none),
                    Contains("save_adapters: the module has no adapters"));
  CHECK(folder.files().empty());
  save_adapters(folder.file("a"), small_layer<float>());
  CHECK_THROWS_AS(load_adapters(folder.file("a"), none), std::invalid_argument);
  CHECK_THROWS_WITH(load_adapters(folder.file("a"), none),
                    Contains("load_adapters: the module has no adapters"));
  Layer<float> plain(
      {.width = 4, .expert = {.hidden = 3}, .gate = {.experts = 3, .top_k = 2}, .seed = 1});
  CHECK_THROWS_AS(save_adapters(folder.file("b"), plain), std::invalid_argument);
  CHECK_THROWS_AS(load_adapters(folder.file("a"), plain), std::invalid_argument);
}

TEST_CASE("adapters: an adapted layer in a file with its configuration", "[io][adapt]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  using Layer = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  const Layer layer({.width = 4,
                     .expert = {.hidden = 3, .activation = Activation::silu},
                     .gate = {.experts = 3, .top_k = 2},
                     .seed = 1});
  const LoraConfig lora{.rank = 2, .alpha = 5, .rank_stabilized = true, .up = false};
  auto adapted = adapt(layer, lora, LoraGateConfig{.rank = 1, .alpha = 3}, Seed{1});
  for_each_parameter(adapted, [](const std::string&, auto& p) {
    if (p.trained) p.value = random_matrix(p.value.rows(), p.value.cols(), 4);
  });
  save_module(path, adapted);
  using Adapted = decltype(adapted);
  const SafetensorsFile file(path);
  Adapted again(file.config<Adapted>());
  file.read_module(again);
  const auto x = random_matrix(10, 4, 1);
  CHECK(same_bits(again.evaluate(x), adapted.evaluate(x)));
  for_each_parameter(again, [](const std::string& name, const auto& p) {
    CHECK(p.trained == (name.find("lora") != std::string::npos));
  });
  LoraConfig other = lora;
  other.alpha = 6;
  auto different = adapt(layer, other, LoraGateConfig{.rank = 1, .alpha = 3}, Seed{1});
  CHECK_THROWS_WITH(load_module(path, different), Contains("config.expert.lora.alpha"));
}

TEST_CASE("adapters: trained parameters that would get lost are refused", "[io][adapt]") {
  const TemporaryFolder folder;
  using Layer = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  const Layer layer(
      {.width = 4, .expert = {.hidden = 3}, .gate = {.experts = 2, .top_k = 1}, .seed = 1});
  for (const std::string trained : {"experts.1.up.bias", "experts.0.down.weight", "gate.weight"}) {
    auto adapted = adapt(layer, LoraConfig{.rank = 2}, LoraGateConfig{.rank = 1}, Seed{1});
    for_each_parameter(adapted, [&](const std::string& name, auto& p) {
      p.trained = p.trained || name == trained;
    });
    CHECK_THROWS_WITH(save_adapters(folder.file("lost"), adapted),
                      Contains(trained + " is trained but not part of an adapter"));
    CHECK(folder.files().empty());
  }
}

TEST_CASE("adapters: a model that has a network() of its own", "[io][adapt]") {
  using Layer = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  using Adapted = MoELayer<Lora<FeedForward, double>, TopKGate<double>>;
  const Layer layer(
      {.width = 4, .expert = {.hidden = 3}, .gate = {.experts = 2, .top_k = 1}, .seed = 1});
  const TemporaryFolder folder;
  NamedModel<Adapted> model{adapt(layer, LoraConfig{.rank = 2}, Seed{1})};
  randomize_adapters(model);
  save_adapters(folder.file("a"), model);
  NamedModel<Adapted> again{adapt(layer, LoraConfig{.rank = 2}, Seed{2})};
  load_adapters(folder.file("a"), again);
  const auto x = random_matrix(10, 4, 1);
  CHECK(same_bits(again.layer.evaluate(x), model.layer.evaluate(x)));
}

TEST_CASE("adapters: a prefix does not run into names", "[io][adapt]") {
  const TemporaryFolder folder;
  using Layer = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  const Layer layer(
      {.width = 4, .expert = {.hidden = 3}, .gate = {.experts = 2, .top_k = 1}, .seed = 1});
  auto adapted = adapt(layer, LoraConfig{.rank = 2}, Seed{1});
  CHECK_THROWS_WITH(save_adapters(folder.file("a"), adapted, "layers.4"),
                    Contains("the prefix \"layers.4\" must end in '.'"));
  save_adapters(folder.file("a"), adapted, "layers.4.");
  CHECK_THROWS_WITH(load_adapters(folder.file("a"), adapted, "layers.4"),
                    Contains("must end in '.'"));
}

TEST_CASE("adapters: the whole name of a gate is not the beginning of another's", "[io][adapt]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a");
  using Gate = LoraGate<TopKGate<float>>;
  Gate gate({.width = 4, .gate = {.experts = 3, .top_k = 2}, .lora = {.rank = 2}}, 1);
  save_adapters(path, gate, "router");
  rewrite_tensors(path, [](Tensors& tensors) {
    tensors["base_model.model.router2.lora_A.weight"] = Matrix<float>::Ones(2, 4);
  });
  Gate again({.width = 4, .gate = {.experts = 3, .top_k = 2}, .lora = {.rank = 2}}, 2);
  load_adapters(path, again, "router");
  CHECK(bytes_of(again).at("lora_A.weight") == bytes_of(gate).at("lora_A.weight"));
}

TEST_CASE("adapters: what cannot be saved", "[io][adapt]") {
  const TemporaryFolder folder;
  const Adapted<float> layer = small_layer<float>();
  const std::string path = folder.file("a");
  for (const char* prefix : {"a+b.", "a b.", "layers[0].", "\xFF."}) {
    CHECK_THROWS_AS(save_adapters(path, layer, prefix), std::invalid_argument);
    CHECK_THROWS_WITH(save_adapters(path, layer, prefix),
                      Contains("must have letters, digits, '_', '-' and '.' only"));
  }
  const LoraGate<TopKGate<float>> gate({.width = 4, .gate = {.experts = 3, .top_k = 2}}, 1);
  CHECK_THROWS_WITH(save_adapters(path, gate),
                    Contains("\"\" must have letters, digits, '_', '-' and '.' only"));
  // alpha / sqrt(r) is (alpha·sqrt(r)) / r, which has no number here.
  const auto huge = small_layer<double>({.rank = 2, .alpha = 1.7e308, .rank_stabilized = true},
                                        {.rank = 2, .alpha = 5});
  CHECK_THROWS_AS(save_adapters(path, huge), std::invalid_argument);
  CHECK_THROWS_WITH(save_adapters(path, huge),
                    Contains("alpha of experts.0.gate is inf, must be finite"));

  Adapted<float> turned = small_layer<float>();
  for_each_parameter(turned, [](const std::string& name, auto& p) {
    if (name == "experts.1.up.lora_B.weight") p.value.resize(3, 2);
  });
  CHECK_THROWS_AS(save_adapters(path, turned), std::invalid_argument);
  CHECK_THROWS_WITH(save_adapters(path, turned),
                    Contains("save_adapters: experts.1.up.lora_B.weight is 3 x 2, must be 2 x 3"));
  CHECK(folder.files().empty());

  std::ofstream(folder.file("file")) << "x";
  CHECK_THROWS_AS(save_adapters(folder.file("file"), layer), std::runtime_error);
  CHECK_THROWS_WITH(save_adapters(folder.file("file/a"), layer), Contains("cannot be created"));
  CHECK(test::read_all(folder.file("file")) == "x");
  std::filesystem::create_directories(path + tensors_file);
  CHECK_THROWS_WITH(save_adapters(path, layer), Contains("adapter_model.safetensors"));
  CHECK_FALSE(std::filesystem::exists(path + config_file));
}
