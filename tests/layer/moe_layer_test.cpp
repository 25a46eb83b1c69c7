#include "moe/layer/moe_layer.hpp"

#include <vector>

#include "layers.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "user_parts.hpp"

using namespace moe;
using namespace moe::test;
template <class Scalar>
using Config = test::LayerConfig<Scalar>;

TEST_CASE("layer: the documented spelling compiles and names its parameters in order", "[layer]") {
  moe::MoELayer<moe::Expert<moe::FeedForward>> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 2, .top_k = 1}, .seed = 1});
  static_assert(std::same_as<decltype(layer)::Scalar, float>);
  const auto names = [](const auto& module) {
    std::vector<std::string> list;
    for_each_parameter(module, [&](const std::string& name, const auto&) { list.push_back(name); });
    return list;
  };
  CHECK(names(layer) == std::vector<std::string>{"gate.weight", "gate.noise_weight",
                                                 "experts.0.up.weight", "experts.0.up.bias",
                                                 "experts.0.down.weight", "experts.0.down.bias",
                                                 "experts.1.up.weight", "experts.1.up.bias",
                                                 "experts.1.down.weight", "experts.1.down.bias"});
  moe::MoELayer<moe::Expert<moe::FeedForward, double>> gated(
      {.width = 3,
       .expert = {.hidden = 4, .gated = true},
       .gate = {.experts = 1, .top_k = 1},
       .seed = 0});
  CHECK(names(gated) == std::vector<std::string>{"gate.weight", "gate.noise_weight",
                                                 "experts.0.gate.weight", "experts.0.up.weight",
                                                 "experts.0.down.weight"});
  MoELayer<Expert<SineMap, double>, HashGate> plugged(
      {.width = 3, .gate = {.experts = 1}, .seed = 0});
  CHECK(names(plugged) == std::vector<std::string>{"gate.strength", "experts.0.w"});
}

TEST_CASE("layer: experts start apart and the seed decides how", "[layer]") {
  const auto start = [](std::uint64_t seed) {
    return test::values_of(Layer<float>(
        {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 2, .top_k = 1}, .seed = seed}));
  };
  Named one = start(1);
  CHECK(one == start(1));
  CHECK(one != start(2));
  CHECK(one["experts.0.up.weight"] != one["experts.1.up.weight"]);
  CHECK(one["gate.weight"].cwiseAbs().maxCoeff() == 0);
}

TEST_CASE("layer: a bad configuration is refused with its field and numbers", "[layer]") {
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config<float> config{
        .width = 4, .expert = {.hidden = 3}, .gate = {.experts = 6, .top_k = 2}, .seed = 0};
    CHECK_NOTHROW(Layer<float>(config));
    spoil(config);
    CHECK_THROWS_AS(Layer<float>(config), std::invalid_argument);
    CHECK_THROWS_WITH(Layer<float>(config), message);
  };
  refuse([](auto& c) { c.width = 0; }, "moe: MoELayer::Config.width = 0, must be at least 1");
  refuse([](auto& c) { c.expert.width = 5; },
         "moe: MoELayer::Config.expert.width = 5, must be 0 or Config.width = 4");
  refuse([](auto& c) { c.gate.width = 3; },
         "moe: MoELayer::Config.gate.width = 3, must be 0 or Config.width = 4");
  refuse([](auto& c) { c.expert.hidden = 0; },
         "moe: FeedForward::Config.hidden = 0, must be at least 1");
  refuse([](auto& c) { c.gate.experts = 0; },
         "moe: NoisyTopKGate::Config.experts = 0, must be at least 1");
  for (const Index bad : {-1, 6, 7}) {
    refuse([=](auto& c) { c.identity_experts = bad; },
           "moe: MoELayer::Config.identity_experts = " + std::to_string(bad) +
               ", must be at least 0 and below the gate's 6 experts");
  }
  refuse([](auto& c) { c.gate.top_k = 7; },
         "moe: NoisyTopKGate::Config.top_k = 7, must be from 1 to experts = 6");
  CHECK_NOTHROW(Layer<float>({.width = 4,
                              .expert = {.width = 4, .hidden = 3},
                              .gate = {.width = 4, .experts = 6, .top_k = 2},
                              .seed = 0}));
  using Hashed = MoELayer<Expert<SineMap, double>, HashGate>;
  CHECK_THROWS_WITH(Hashed({.width = 3, .gate = {.experts = 0}, .seed = 0}),
                    "moe: MoELayer: the gate has 0 experts, must be at least 1");
}

TEST_CASE("layer: a bad input is refused and changes nothing", "[layer]") {
  Layer<double> layer = small_layer();
  const Matrix<double> x = random_matrix(10, 3, 2);
  const Everything<double> expected(layer, x, x);
  zero_gradients(layer);

  const std::string no_forward = "moe: MoELayer::backward without a forward pass on this tape";
  Layer<double>::Tape tape;
  CHECK_THROWS_AS(layer.backward(x, tape), std::invalid_argument);
  CHECK_THROWS_WITH(layer.backward(x, tape), no_forward);
  CHECK_THROWS_WITH(layer.backward(x.topRows(0), tape), no_forward);

  layer.forward(x, tape, {.step = 2});
  const Matrix<double> wide = random_matrix(10, 4, 2);
  CHECK_THROWS_AS(layer.forward(wide, tape, {.step = 0}), std::invalid_argument);
  CHECK_THROWS_WITH(layer.forward(wide, tape, {.step = 0}),
                    "moe: MoELayer: x has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(layer.evaluate(wide, tape), "moe: MoELayer: x has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(layer.evaluate(wide), "moe: MoELayer: x has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(layer.backward(wide, tape),
                    "moe: MoELayer: dy has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(layer.backward(x.topRows(9), tape), "moe: MoELayer: dy has 9 rows, y has 10");
  for (const auto& [name, gradient] : test::gradients_of(layer)) {
    CHECK(gradient.cwiseAbs().maxCoeff() == 0);
  }
  CHECK(same_bits(tape.y, expected.y));
  CHECK(tape.balance().loss == expected.loss);
  CHECK(same_bits(layer.backward(x, tape), expected.dx));  // the tape is as good as before
  CHECK(gradient_error(test::gradients_of(layer), expected.gradients) == 0);

  layer.evaluate(x, tape);
  CHECK_THROWS_WITH(layer.backward(x, tape), no_forward);
  layer.evaluate(x.topRows(0), tape);
  CHECK_THROWS_WITH(layer.backward(x.topRows(0), tape), no_forward);
}

TEST_CASE("layer: after a pass that the gate refused backward() refuses the tape", "[layer]") {
  MoELayer<Expert<FeedForward, double>, TopKGate<double>> layer(
      {.width = 3,
       .expert = {.hidden = 4},
       .gate = {.experts = 3, .top_k = 1, .jitter = 0.1, .evaluation_capacity = 2},
       .seed = 1});
  const Matrix<double> x = random_matrix(6, 3, 2);
  const std::string no_forward = "moe: MoELayer::backward without a forward pass on this tape";
  decltype(layer)::Tape tape;
  // Other rows than before, which the layer copies before it asks the gate.
  const Matrix<double> other = random_matrix(6, 3, 3);
  const auto check = [&](auto&& refused) {
    layer.forward(x, tape, {.step = 1});
    CHECK_THROWS_AS(refused(), std::invalid_argument);
    CHECK_THROWS_WITH(layer.backward(x, tape), no_forward);
    for (const auto& [name, gradient] : test::gradients_of(layer)) CHECK(gradient.isZero(0));
  };
  const std::vector<double> noise(3, 0.0);
  check([&] { layer.forward(other, tape, {.step = 2, .noise = noise}); });
  check([&] { layer.evaluate(other, tape, {.sequences = 4}); });
  layer.forward(x, tape, {.step = 1});
  CHECK_NOTHROW(layer.backward(x, tape));
  CHECK_THROWS_WITH(layer.forward(x, tape, {.step = 1, .sequences = -1}),
                    "moe: MoELayer: Pass.sequences = -1, must be from 0 to 2147483648");
  CHECK_THROWS_WITH(layer.evaluate(x, tape, {.sequences = -1}),
                    "moe: MoELayer: Pass.sequences = -1, must be from 0 to 2147483648");
  CHECK_NOTHROW(layer.backward(x, tape));  // the tape is as good as before
}

TEST_CASE("layer: the tape of another layer is refused", "[layer]") {
  Layer<float> few(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 2, .top_k = 1}, .seed = 0});
  const Layer<float> many(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 8, .top_k = 1}, .seed = 0});
  const Layer<float> deep(
      {.width = 3, .expert = {.hidden = 9}, .gate = {.experts = 2, .top_k = 1}, .seed = 0});
  const Matrix<float> x = random_matrix<float>(6, 3, 1);
  Layer<float>::Tape tape;
  many.forward(x, tape, {.step = 0});
  CHECK_THROWS_WITH(
      few.backward(x, tape),
      "moe: MoELayer::backward: the tape is another layer's, of 8 experts and width 3");
  deep.forward(x, tape, {.step = 0});
  CHECK_THROWS_AS(few.backward(x, tape), std::invalid_argument);

  // Rows of 256 numbers take the room of 272.
  REQUIRE(detail::padded_stride<float>(256) == detail::padded_stride<float>(272));
  const Layer<float> spread(
      {.width = 3, .expert = {.hidden = 256}, .gate = {.experts = 2, .top_k = 1}, .seed = 0});
  Layer<float> wide(
      {.width = 3, .expert = {.hidden = 272}, .gate = {.experts = 2, .top_k = 1}, .seed = 0});
  spread.forward(x, tape, {.step = 0});
  CHECK_THROWS_AS(wide.backward(x, tape), std::invalid_argument);
}

TEST_CASE("layer: the tape of a layer with another gate is refused with nothing changed",
          "[layer]") {
  const Matrix<float> x = random_matrix<float>(6, 3, 1);
  const auto check = [&](const auto& other, auto& layer) {
    typename std::decay_t<decltype(layer)>::Tape tape;
    other.forward(x, tape, {.step = 0});
    zero_gradients(layer, Updates::lazy);
    CHECK_THROWS_AS(layer.backward(x, tape), std::invalid_argument);
    for_each_parameter(layer, [](const std::string& name, const Parameter<float>& parameter) {
      INFO(name);
      CHECK((parameter.gradient().array() == 0).all());
    });
  };
  {
    const Layer<float> other(
        {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 4, .top_k = 2}, .seed = 0});
    Layer<float> layer(
        {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 4, .top_k = 1}, .seed = 0});
    check(other, layer);
  }
  {
    using Hierarchical = MoELayer<Expert<FeedForward>, HierarchicalGate<float>>;
    Hierarchical::Config config{
        .width = 3,
        .expert = {.hidden = 4},
        .gate = {.groups = 4, .group_experts = 2, .top_k_groups = 1, .top_k = 1},
        .seed = 0};
    const Hierarchical other(config);
    config.gate.groups = 2;
    config.gate.group_experts = 4;
    Hierarchical layer(config);
    check(other, layer);
  }
  {
    using Shared = MoELayer<Expert<FeedForward>, SharedExpertGate<NoisyTopKGate<float>>>;
    Shared::Config config{.width = 3,
                          .expert = {.hidden = 4},
                          .gate = {.shared = 1, .routed = {.experts = 4, .top_k = 2}},
                          .seed = 0};
    const Shared other(config);
    config.gate.routed.top_k = 1;
    Shared layer(config);
    check(other, layer);
  }
}

TEST_CASE("layer: an activation outside its enumeration is refused", "[layer]") {
  const auto unknown = static_cast<Activation>(99);
  const std::string is = " = 99, must be one of the 9 activations";
  Config<float> config{.width = 3,
                       .expert = {.hidden = 4},
                       .gate = {.experts = 2, .top_k = 1},
                       .output = unknown,
                       .seed = 0};
  CHECK_THROWS_WITH(Layer<float>(config), "moe: MoELayer::Config.output" + is);
  config.output = Activation::identity;
  config.expert.activation = unknown;
  CHECK_THROWS_WITH(Layer<float>(config), "moe: FeedForward::Config.activation" + is);
}
