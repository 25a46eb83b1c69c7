#include "moe/adapt/narrow_lora.hpp"

#include <string>
#include <utility>
#include <vector>

#include "../naive_layer.hpp"
#include "../temporary_folder.hpp"
#include "../weights/formats.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/io/serving.hpp"

using namespace moe;
using namespace moe::test;  // NOLINT(google-build-using-namespace)

namespace {

using Layer = MoELayer<Expert<FeedForward>, TopKGate<float>>;

Layer make_layer(bool gated) {
  Layer layer(
      {.width = 70,
       .expert = {.hidden = 130, .activation = Activation::silu, .gated = gated, .bias = true},
       .gate = {.experts = 4, .top_k = 2, .bias = true},
       .seed = 1});
  randomize(layer, 3, 0.2);
  return layer;
}

/// The same adapters on the weights that narrow ones stand for.
template <class Served>
auto adapted_wide(const Layer& layer, const Served& served, const LoraConfig& lora, Seed seed) {
  Layer wide = layer;
  for (Index e = 0; e < 4; ++e) {
    auto expert = layer.experts()[detail::to_size(e)];
    Served::Expert::Network::visit_weights(
        served.experts()[detail::to_size(e)].network(), [&](std::string_view name, const auto& w) {
          for_each_parameter(expert, [&](const std::string& of, auto& p) {
            if (of == name) p.value = w.matrix.decoded();
          });
        });
    wide.replace_expert(e, expert);
  }
  return adapt(wide, lora, seed);
}

/// Numbers in the adapters, by their names.
template <class Module>
void fill_adapters(Module& module) {
  for_each_parameter(module, [](const std::string& name, auto& p) {
    if (!p.trained) return;
    fill_normal(p.value, 0.2f, std::hash<std::string>{}(name));
  });
}

/// A user's module with layers in it.
template <class Part>
struct Model {
  Parameter<float> before;
  std::vector<Part> layers;

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("before", self.before);
    visit("layers", self.layers);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("narrow lora: passes are those of adapters on the rounded weights", "[adapt]",
                   MOE_TEST_FORMATS) {
  const bool gated = GENERATE(false, true);
  const Layer layer = make_layer(gated);
  const ServingLayer<Layer, TestType> served(layer);
  const LoraConfig lora{.rank = 5, .alpha = 3};
  auto adapted = adapt(served, lora, Seed{2});
  auto wide = adapted_wide(layer, served, lora, Seed{2});
  const auto x = random_matrix<float>(60, 70, 1);
  CHECK(same_bits(adapted.evaluate(x), served.evaluate(x)));
  fill_adapters(adapted);
  fill_adapters(wide);
  typename decltype(adapted)::Tape tape;
  typename decltype(wide)::Tape wide_tape;
  CHECK(is_served<TestType>(adapted.forward(x, tape, {.step = 0}),
                            wide.forward(x, wide_tape, {.step = 0})));
  CHECK(relative_error(adapted.backward(x, tape), wide.backward(x, wide_tape)) < 1e-5);
  const Named needed = gradients_of(wide);
  Index adapters = 0;
  for_each_parameter(adapted, [&](const std::string& name, auto& p) {
    INFO(name);
    CHECK(p.trained == (name.find("lora") != std::string::npos));
    CHECK(!name.ends_with("up.weight"));
    if (!p.trained) return;
    ++adapters;
    CHECK(relative_error(p.gradient(), needed.at(name).template cast<float>()) < 1e-5);
  });
  CHECK(adapters == 4 * 2 * (gated ? 3 : 2));
  CHECK(relative_error(merged(adapted).evaluate(x), merged(wide).evaluate(x)) == 0);
  CHECK(relative_error(merged(adapted).evaluate(x), adapted.evaluate(x)) < 1e-5);
}

TEST_CASE("narrow lora: with rank 0 and rounded activations the bits of the served layer",
          "[adapt]") {
  const Layer layer = make_layer(true);
  const ServingLayer<Layer, Int4> served(layer, {.activations = Activations::int8});
  const auto adapted = adapt(served, LoraConfig{.rank = 0}, Seed{2});
  const auto x = random_matrix<float>(60, 70, 1);
  CHECK(same_bits(adapted.evaluate(x), served.evaluate(x)));
}

TEST_CASE("narrow lora: a mapped file may change once its layer is adapted", "[adapt]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("served.safetensors");
  const Layer layer = make_layer(false);
  using Served = ServingLayer<Layer, Int8>;
  save_serving(path, Served(layer), Packing::packed);
  auto served = load_serving<Served>(path);
  const auto adapted = adapt(served, LoraConfig{.rank = 2}, Seed{2});
  const auto x = random_matrix<float>(60, 70, 1);
  const Matrix<float> y = served.evaluate(x);
  std::filesystem::resize_file(path, 100);
  if (served.is_mapped()) {
    CHECK_THROWS_AS(adapt(served, LoraConfig{.rank = 2}, Seed{2}), std::runtime_error);
  }
  if (served.is_mapped()) CHECK_THROWS_AS(served.evaluate(x), std::runtime_error);
  CHECK(same_bits(adapted.evaluate(x), y));
  CHECK(!Served(layer).is_mapped());
}

TEST_CASE("narrow lora: a module with narrow weights is not saved without them", "[adapt][io]") {
  using Served = ServingLayer<Layer, Int8>;
  using Adapted = decltype(adapt(std::declval<const Served&>(), LoraConfig{}, Seed{1}));
  const TemporaryFolder folder;
  const std::string path = folder.file("module.safetensors");
  const Layer layer = make_layer(true);
  const Served served(layer);
  const Adapted adapted = adapt(served, LoraConfig{.rank = 2}, Seed{2});
  const std::string what =
      " has narrow weights, which are no parameters and would not be in the file;"
      " save_serving() saves a ServingLayer, save_adapters() the adapters on one";
  const std::string begin = "moe: SafetensorsWriter::add_module: ";
  CHECK_THROWS_WITH(save_module(path, adapted), begin + "experts.0" + what);
  CHECK_THROWS_WITH(save_module(path, served), begin + "experts.0" + what);
  CHECK_THROWS_AS(save_module(path, served), std::invalid_argument);
  const auto& network = adapted.experts()[0].network();
  CHECK_THROWS_WITH(save_module(path, network), begin + "the module" + what);
  const Model<Adapted> model{Parameter<float>(3, 4), {adapted}};
  CHECK_THROWS_WITH(save_module(path, model), begin + "layers.0.experts.0" + what);
  CHECK(folder.files().empty());
  // Wide adapters, a wide layer, and the parameters alone are saved.
  CHECK_NOTHROW(save_module(path, adapt(layer, LoraConfig{.rank = 2}, Seed{2})));
  CHECK_NOTHROW(save_module(path, merged(adapted)));
  CHECK_NOTHROW(save_parameters(path, adapted));
}

TEST_CASE("narrow lora: an expert from a configuration and a seed", "[adapt]") {
  const LoraFeedForward<Int8> network(
      LoraFeedForwardConfig{.width = 70, .network = {.hidden = 40}, .lora = {.rank = 3}}, 4);
  CHECK(network.row_work() == 2 * 70 * 40 + 2 * 3 * (70 + 40));
  CHECK(parameter_count(network) == 2 * 3 * (70 + 40));
}
