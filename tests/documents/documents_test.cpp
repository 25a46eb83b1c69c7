#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "../naive_layer.hpp"
#include "../reinforce/policies.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "moe/adapt/lora.hpp"
#include "moe/adapt/narrow_lora.hpp"
#include "moe/adapt/upcycle.hpp"
#include "moe/config_fields.hpp"
#include "moe/io/adapters.hpp"
#include "moe/io/pretrained.hpp"
#include "moe/io/pretrained_serving.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/io/serving.hpp"
#include "moe/moe.hpp"
#include "moe/testing/check_gradients.hpp"
#include "moe/weights/narrow_linear.hpp"

// The blocks of the README and of docs/, taken from the documents, compiled and run with the declarations
// that they need. extract.awk makes the files; a block that no test includes is an error of CMake.

// They declare what they show, whatever stands around them, and do not use all of it.
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wunused-variable"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"

namespace moe::test::layer {
#include "gates_5.inc"
#include "layer_11.inc"
#include "layer_6.inc"
}  // namespace moe::test::layer

namespace {

/// What most blocks are about.
template <class Gate = moe::NoisyTopKGate<float>>
struct Context {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>, Gate>;

  explicit Context(const typename Gate::Config& gate)
      : layer({.width = 12, .expert = {.hidden = 16}, .gate = gate, .seed = 1}) {}

  Layer layer;
  typename Layer::Tape tape;
  moe::Adam<float> adam;
  moe::Matrix<float> x = moe::test::random_matrix<float>(64, 12, 2);
  moe::Matrix<float> dy = moe::test::random_matrix<float>(64, 12, 3);
  std::vector<std::uint8_t> valid = std::vector<std::uint8_t>(64, 1);
  std::uint64_t step = 1;
  double rate = 0.01;
  double decay = 0.5;
};

/// The fields of a configuration as text, by name.
template <class Config>
std::map<std::string, std::string> fields_of(const Config& config) {
  std::map<std::string, std::string> fields;
  moe::detail::for_each_field(config, [&](const std::string& name, const auto& field) {
    fields[name] = moe::detail::field_text(field);
  });
  return fields;
}

Context<> noisy() { return Context<>({.experts = 8, .top_k = 2}); }

namespace saving {
#include "saving_4.inc"
}  // namespace saving

#include "pretrained_6.inc"

}  // namespace

TEST_CASE("documents: README.md and layer.md", "[documents]") {
  auto [layer, tape, adam, x, dy, valid, step, rate, decay] = noisy();
  {
#include "readme_2.inc"
    CHECK(y.rows() == 64);
    CHECK(dx.cols() == 12);
    CHECK(y2.rows() == 64);
  }
  {
#include "layer_1.inc"
#include "layer_2.inc"
    CHECK(pass.noise_factor == 0.5);
  }
  {
#include "layer_3.inc"
    const Layer sigmoid(config);
    Layer::Config without = config;
    without.output = moe::Activation::identity;
    const Layer identity(without);
    const auto rows = moe::test::random_matrix<float>(5, 8, 2);
    const moe::Matrix<float> expected = 1 / (1 + (-identity.evaluate(rows).array()).exp());
    CHECK(moe::test::relative_error(sigmoid.evaluate(rows), expected) < 1e-5);
    CHECK(fields_of(config).at("output") == "sigmoid");
  }
  {
#include "layer_4.inc"
    adam.update(layer, rate);
  }
  {
    const auto before = moe::test::values_of(layer);
#include "layer_5.inc"
    layer.backward(dy, tape);
    adam.update(layer, rate);
    const auto after = moe::test::values_of(layer);
    CHECK(after.at("experts.0.up.weight") == before.at("experts.0.up.weight"));
    CHECK(after.at("gate.weight") != before.at("gate.weight"));
  }
  {
#include "layer_10.inc"
    adam.update(layer, rate);
  }
}

TEST_CASE("documents: a model and a network of one's own in layer.md", "[documents]") {
  namespace own = moe::test::layer;
  {
    own::Classifier<> model(
        {.inputs = 12,
         .classes = 3,
         .mixture = {
             .width = 8, .expert = {.hidden = 16}, .gate = {.experts = 4, .top_k = 2}, .seed = 1}});
    const auto in_weight_of = [](std::uint64_t seed) {
      const own::Classifier<> other({.inputs = 12,
                                     .classes = 3,
                                     .mixture = {.width = 8,
                                                 .expert = {.hidden = 16},
                                                 .gate = {.experts = 4, .top_k = 2},
                                                 .seed = seed}});
      return moe::test::values_of(other).at("in.weight");
    };
    CHECK(in_weight_of(1) == in_weight_of(1));
    CHECK(in_weight_of(1) != in_weight_of(2));
    own::Classifier<>::Tape tape;
    moe::Adam<float> adam;
    const auto x = moe::test::random_matrix<float>(30, 12, 2);
    std::vector<moe::Index> labels(30);
    for (moe::Index t = 0; t < 30; ++t) x.row(t).head(3).maxCoeff(&labels[moe::detail::to_size(t)]);
    double first = 0;
    double last = 0;
    for (std::uint64_t step = 1; step <= 300; ++step) {
#include "layer_7.inc"
      if (step == 1) first = loss;
      last = loss;
    }
    CHECK(last < 0.1 * first);
    CHECK(model.config().mixture.gate.experts == model.mixture().gate().experts());

    // What changes in training is in the file.
    const moe::test::TemporaryFolder folder;
    model.mixture().set_loss_weights({.importance = 0.5, .load = 0.25});
    model.mixture().copy_experts({1, 2}, {.noise_stddev = 0.1, .seed = 3});
    moe::save_module(folder.file("model"), model);
    const moe::SafetensorsFile file(folder.file("model"));
    own::Classifier<> loaded(file.config<own::Classifier<>>());
    file.read_module(loaded);
    CHECK(loaded.mixture().gate().config().importance_weight == 0.5);
    CHECK(loaded.mixture().gate().experts() == 6);
    CHECK(loaded.evaluate(x) == model.evaluate(x));
  }
  {
    own::Classifier<double> model(
        {.inputs = 5,
         .classes = 3,
         .mixture = {.width = 4,
                     .expert = {.hidden = 6, .activation = moe::Activation::gelu},
                     .gate = {.experts = 4, .top_k = 2},
                     .seed = 1}});
    own::Classifier<double>::Tape tape;
    moe::SoftmaxCrossEntropy<double> cross_entropy;
    moe::SoftmaxCrossEntropy<double>::Tape loss_tape;
    const moe::Matrix<double> x = moe::test::random_matrix(7, 5, 2);
    const std::vector<moe::Index> labels{0, 1, 2, 0, 1, 2, 0};
#include "layer_8.inc"
    CHECK(check.error < 1e-7);
    CHECK(check.checked == 5 * 4 + 4 + 4 * 3 + 3 + 2 * 4 * 4 + 4 * (2 * 4 * 6 + 6 + 4));
  }
  {
    const std::vector<moe::Index> ids{3, 1, 4, 1, 5, 9, 2, 6};
    const std::uint64_t step = 1;
#include "layer_9.inc"
    CHECK(n.rows() == 8);
    CHECK(n.cols() == 8);
    CHECK(state.hidden.rows() == 4);
  }
  {
    using own::ProductNetwork;
#include "layer_12.inc"
    CHECK(check.error < 1e-8);
    CHECK(check.checked == 24 + 2 * 4 * 3 + 3 * 2 * 16);
    CHECK(check.kinks == 0);

    using Layer = decltype(layer);
    const moe::test::TemporaryFolder folder;
    moe::save_module(folder.file("layer"), layer);
    const moe::SafetensorsFile file(folder.file("layer"));
    Layer loaded(file.config<Layer>());
    file.read_module(loaded);
    CHECK(loaded.evaluate(x) == layer.evaluate(x));
  }
}

TEST_CASE("documents: training.md", "[documents]") {
  auto [layer, tape, adam, x, dy, valid, step, rate, decay] = noisy();
#include "training_1.inc"
#include "training_2.inc"
#include "training_4.inc"
  CHECK_THAT(csv, Catch::Matchers::Contains("\n1,middle,64,128,"));
  layer.backward(dy, tape);
  const auto before = moe::test::values_of(layer);
  adam.update(layer, rate);
  // The first update of Adam moves by the rate.
  const auto after = moe::test::values_of(layer);
  const auto moved = [&before, &after, full = rate](const std::string& name) {
    return (after.at(name) - before.at(name)).cwiseAbs().maxCoeff() / full;
  };
  CHECK_THAT(moved("experts.0.up.weight"), Catch::Matchers::WithinAbs(0.3, 1e-3));
  CHECK_THAT(moved("gate.weight"), Catch::Matchers::WithinAbs(2, 1e-2));
  CHECK_THAT(moved("gate.noise_weight"), Catch::Matchers::WithinAbs(0.03, 1e-3));
#include "training_3.inc"
}

TEST_CASE("documents: training.md, batches and accuracy", "[documents]") {
  const auto pictures = moe::test::random_matrix<float>(40, 12, 2);
  const std::vector<moe::Index> labels(40, 1);
  const moe::Matrix<float> logits = pictures.leftCols(2);
  const std::uint64_t epoch = 0;
  moe::Matrix<float> x;
  std::vector<moe::Index> batch_labels;
#include "training_5.inc"
  CHECK(x.rows() == 40 % 16);  // the last batch
  CHECK(batch_labels == std::vector<moe::Index>(8, 1));
  double right = 0;
  for (moe::Index i = 0; i < 40; ++i) right += logits(i, 1) > logits(i, 0) ? 1 : 0;
  CHECK_THAT(share, Catch::Matchers::WithinAbs(right / 40, 1e-12));
}

TEST_CASE("documents: gates.md", "[documents]") {
  {
    // The numbers that are called defaults are.
#include "gates_1.inc"
    const auto check_defaults = []<class Config>(const Config& shown,
                                                 std::vector<std::string> given) {
      const auto defaults = fields_of(Config{});
      for (const auto& [name, value] : fields_of(shown)) {
        INFO(name << " = " << value);
        const bool is_given = std::find(given.begin(), given.end(), name) != given.end();
        CHECK((value == defaults.at(name)) != is_given);
      }
    };
    check_defaults(noisy, {"experts", "top_k"});
    check_defaults(hierarchical, {"groups", "group_experts", "top_k_groups", "top_k"});
    check_defaults(product_key, {"row_keys", "column_keys", "top_k"});
    check_defaults(balanced, {"experts", "top_k"});
    check_defaults(expert_choice, {"experts"});
    check_defaults(shared, {"routed.experts", "routed.top_k"});
  }
  {
    auto [layer, tape, adam, x, dy, valid, step, rate, decay] =
        Context<moe::TopKGate<float>>({.experts = 8, .top_k = 2, .selection_bias = true});
    const auto before = moe::test::values_of(layer);
#include "gates_2.inc"
    const auto after = moe::test::values_of(layer);
    CHECK(after.at("gate.selection_bias") != before.at("gate.selection_bias"));
    CHECK(after.at("gate.weight") != before.at("gate.weight"));
  }
  {
    auto [layer, tape, adam, x, dy, valid, step, rate, decay] = noisy();
#include "gates_3.inc"
    CHECK(layer.gate().config().load_weight == 0.05);
    valid[7] = 0;
#include "gates_4.inc"
    layer.forward(x, tape, {.step = step, .valid = valid});
    CHECK(tape.routing().slots() == 2 * 63);
  }
  {
    using moe::test::layer::PlainNoisyGate;
#include "gates_6.inc"
#include "gates_7.inc"
    CHECK(all);
    CHECK(check.kinks == 0);
    CHECK(check.checked == 6 * 3 + 3 * 4 + 4 * (2 * 3 * 4 + 4 + 3));
    CHECK(check.error < 1e-7);
  }
}

TEST_CASE("documents: experts.md", "[documents]") {
  auto [layer, tape, adam, x, dy, valid, step, rate, decay] = noisy();
  auto& model = layer;
  layer.forward(x, tape, {.step = step});
  layer.backward(dy, tape);
  adam.update(layer, rate);
#include "experts_1.inc"
  CHECK(layer.gate().experts() == 8 + 2 - 2 + 4);
}

TEST_CASE("documents: serving.md", "[documents]") {
  const moe::test::TemporaryFolder folder;
  const moe::test::CurrentFolder inside(folder);
  auto [layer, tape, adam, x, dy, valid, step, rate, decay] = noisy();
  using Layer = Context<>::Layer;
  const moe::Linear<float> linear({.inputs = 12, .outputs = 7}, 1);
#include "serving_1.inc"
#include "serving_2.inc"
#include "serving_3.inc"
#include "serving_4.inc"
  CHECK(logits.cols() == 7);
  CHECK(moe::test::same_bits(again.evaluate(x), y8));
  CHECK(!moe::test::same_bits(rounded.evaluate(x), y8));
}

TEST_CASE("documents: saving.md and from_pytorch.md", "[documents]") {
  const moe::test::TemporaryFolder folder;
  const moe::test::CurrentFolder inside(folder);
  auto [layer, tape, adam, x, dy, valid, step, rate, decay] = noisy();
  using Layer = Context<>::Layer;
  auto& model = layer;
  layer.forward(x, tape, {.step = step});
  layer.backward(dy, tape);
  adam.update(layer, rate);
  {
#include "saving_1.inc"
  } {
#include "saving_2.inc"
  } {
    moe::SafetensorsWriter writer;
    writer.add_module(layer, "layer.");
    writer.write("named.safetensors");
    const moe::SafetensorsFile file("named.safetensors");
    const moe::Matrix<float> expected = layer.evaluate(x);
#include "saving_3.inc"
    CHECK(moe::test::same_bits(layer.evaluate(x), expected));
  }
  STATIC_REQUIRE(moe::detail::visits_every_field<saving::Config>());

  using Published = moe::MoELayer<moe::Expert<moe::FeedForward>, moe::TopKGate<>>;
  Published saved({.width = 8,
                   .expert = {.hidden = 16, .activation = moe::Activation::silu, .gated = true},
                   .gate = {.experts = 4, .top_k = 2, .renormalise = true},
                   .seed = 2});
  moe::save_parameters("layer.safetensors", saved);
  {
#include "from_pytorch_1.inc"
    const auto rows = moe::test::random_matrix<float>(5, 8, 1);
    CHECK(moe::test::same_bits(layer.evaluate(rows), saved.evaluate(rows)));
  }
}

TEST_CASE("documents: pretrained.md", "[documents]") {
  namespace fs = std::filesystem;
  const moe::test::TemporaryFolder folder;
  const moe::test::CurrentFolder inside(folder);
  const std::string golden = MOE_TEST_PRETRAINED;
  fs::copy(golden + "/olmoe", "OLMoE-1B-7B-0924");
  fs::copy(golden + "/olmoe/passes.safetensors", "rows.safetensors");
  fs::copy(golden + "/jamba", "Jamba-v0.1");
  {
#include "pretrained_1.inc"
#include "pretrained_2.inc"
#include "pretrained_3.inc"
    CHECK(narrow.experts().size() == static_cast<std::size_t>(layer.gate().experts()));
#include "pretrained_4.inc"
    CHECK(difference.cwiseAbs().maxCoeff() < 1e-5f * y.cwiseAbs().maxCoeff());
#include "pretrained_5.inc"
    CHECK(moe::SafetensorsFile("layer.safetensors").tensors().size() == 16);
  }
  {
#include "pretrained_7.inc"
    REQUIRE(jamba.mixtures().size() == 1);
    const auto layer = jamba.load_layer<moe::io::RoutedLayer<double>>(1);
    const moe::SafetensorsFile passes("Jamba-v0.1/passes.safetensors");
    const moe::Matrix<double> y = passes.matrix<double>("y");
    CHECK((layer.evaluate(passes.matrix<double>("x")) - y).cwiseAbs().maxCoeff() < 1e-10);
  }
  {
    const moe::Matrix<float> numbers = moe::test::random_matrix<float>(3, 2, 1);
    moe::SafetensorsWriter writer;
    writer.add("model.embed_tokens.weight", numbers);
    writer.add("lm_head.weight", numbers);
    writer.add("model.norm.weight", numbers);
    writer.write("model.safetensors");
#include "pretrained_8.inc"
    CHECK(moe::test::same_bits(embedding, numbers));
  }
}

TEST_CASE("documents: adapt.md", "[documents]") {
  const moe::test::TemporaryFolder folder;
  const moe::test::CurrentFolder inside(folder);
  {
    auto [layer, tape, adam, x, dy, valid, step, rate, decay] = noisy();
    using Layer = decltype(layer);
#include "adapt_1.inc"
    CHECK(moe::test::relative_error(plain.evaluate(x), adapted.evaluate(x)) < 1e-5);
    CHECK(moe::test::relative_error(plain.evaluate(x), layer.evaluate(x)) > 0);
#include "adapt_2.inc"
#include "adapt_3.inc"
    CHECK(moe::test::same_bits(on_int8.evaluate(x), served.evaluate(x)));
#include "adapt_4.inc"
    CHECK(moe::test::same_bits(again.evaluate(x), both.evaluate(x)));
  }
  {
    const moe::FeedForward<float> dense({.width = 12, .hidden = 16}, 1);
    const moe::Matrix<float> x = moe::test::random_matrix<float>(64, 12, 2);
#include "adapt_5.inc"
#include "adapt_6.inc"
    CHECK(layer.experts().size() == 8);
    CHECK(fine.experts().size() == 32);
    CHECK(moe::test::relative_error(fine.evaluate(x), layer.evaluate(x)) < 1e-5);
  }
  {
    // An expert of a published model, under the names of a dense one.
    const moe::SafetensorsFile published(std::string(MOE_TEST_PRETRAINED) +
                                         "/olmoe/model.safetensors");
    std::vector<moe::Matrix<float>> weights;
    for (const char* part : {"gate", "up", "down"}) {
      weights.push_back(published.matrix<float>("model.layers.0.mlp.experts.3." +
                                                std::string(part) + "_proj.weight"));
    }
    moe::SafetensorsWriter writer;
    writer.add("model.layers.0.mlp.gate_proj.weight", weights[0]);
    writer.add("model.layers.0.mlp.up_proj.weight", weights[1]);
    writer.add("model.layers.0.mlp.down_proj.weight", weights[2]);
    writer.write("model.safetensors");
#include "adapt_7.inc"
    // silu(x·gateᵀ) ⊙ (x·upᵀ)·downᵀ
    const moe::Matrix<float> x = moe::test::random_matrix<float>(9, 6, 2);
    const moe::Matrix<float> gate = x * weights[0].transpose();
    const moe::Matrix<float> hidden =
        gate.array() / (1 + (-gate.array()).exp()) * (x * weights[1].transpose()).array();
    const moe::Matrix<float> y = hidden * weights[2].transpose();
    CHECK(moe::test::relative_error(upcycled.evaluate(x), y) < 1e-5);
  }
}

TEST_CASE("documents: reinforce.md", "[documents]") {
  using MyPolicy = moe::test::SmallPolicy<float>;
  MyPolicy policy({.symbols = 5});
  moe::Adam<float> adam;
  const std::vector<moe::Index> inputs{0, 1, 2, 3};
  const std::vector<std::vector<moe::Index>> references{{1}, {2, 3}, {3}, {1, 2}};
  const auto score = [](moe::Index input, std::span<const moe::Index> sequence, bool done) {
    return done && static_cast<moe::Index>(sequence.size()) == input ? 1.0 : 0.0;
  };
  // Twenty thousand updates are too many to run here: it is only compiled.
  const auto program = [&] {
#include "reinforce_1.inc"
  };
  STATIC_REQUIRE(std::is_invocable_v<decltype(program)>);
}
