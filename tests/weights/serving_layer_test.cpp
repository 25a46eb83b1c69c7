#include "moe/weights/serving_layer.hpp"

#include <limits>
#include <string>
#include <thread>

#include "../allocation.hpp"
#include "../support.hpp"
#include "formats.hpp"
#include "moe/gates/balanced_gate.hpp"
#include "moe/gates/expert_choice_gate.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"

using namespace moe;
using namespace moe::test;  // NOLINT(google-build-using-namespace)
using Catch::Matchers::Contains;

namespace {

constexpr Index width = 70;

template <class Gate = NoisyTopKGate<float>>
using Layer = MoELayer<Expert<FeedForward>, Gate>;

/// A layer whose parameters are all of ordinary size.
template <class Gate>
Layer<Gate> make_layer(const FeedForward<float>::Config& expert,
                       const typename Gate::Config& gate) {
  Layer<Gate> layer({.width = width, .expert = expert, .gate = gate, .seed = 1});
  std::uint64_t seed = 10;
  for_each_parameter(layer, [&](const std::string&, auto& p) {
    p.value = random_matrix<float>(p.value.rows(), p.value.cols(), ++seed, 0.3);
  });
  return layer;
}

/// The layer with the weights that a served one stands for.
template <class Layer, class Served>
Layer rounded(Layer layer, const Served& served) {
  for (Index e = 0; e < static_cast<Index>(served.experts().size()); ++e) {
    auto expert = layer.experts()[detail::to_size(e)];
    Served::Expert::Network::visit_weights(
        served.experts()[detail::to_size(e)].network(), [&](std::string_view name, const auto& w) {
          for_each_parameter(expert, [&](const std::string& of, auto& p) {
            if (of == name) p.value = w.matrix.decoded();
          });
        });
    layer.replace_expert(e, expert);
  }
  return layer;
}

FeedForward<float>::Config form(int number) {
  switch (number) {
    case 0:
      return {.hidden = 130, .activation = Activation::relu};
    case 1:
      return {.hidden = 64, .activation = Activation::silu, .gated = true};
    case 2:
      return {.hidden = 33, .activation = Activation::gelu, .bias = false};
    case 3:
      return {.hidden = 50,
              .activation = Activation::silu,
              .gated = true,
              .bias = true,
              .limit = 0.5,
              .linear_offset = 1};
    case 4:
      return {.hidden = 40, .activation = Activation::tanh, .gated = true, .weighted_input = true};
    case 5:
      return {.hidden = 70,
              .activation = Activation::silu,
              .gated = true,
              .bias = true,
              .weighted_input = true,
              .saved = Precision::bfloat16};
    default:
      return {.hidden = 200, .activation = Activation::sigmoid, .recompute = true};
  }
}
constexpr int forms = 7;

}  // namespace

TEMPLATE_TEST_CASE("serving: the layer with rounded weights, in every form", "[weights]",
                   MOE_TEST_FORMATS) {
  const int number = GENERATE(range(0, forms));
  const Index tokens = GENERATE(1, 5, 40);
  CAPTURE(number, tokens);
  using Gate = TopKGate<float>;
  const auto layer = make_layer<Gate>(form(number), {.experts = 6, .top_k = 2});
  const ServingLayer<Layer<Gate>, TestType> served(layer);
  const auto x = random_matrix<float>(tokens, width, 2);
  CHECK(is_served<TestType>(served.evaluate(x), rounded(layer, served).evaluate(x)));
}

TEMPLATE_TEST_CASE("serving: any gate", "[weights]", NoisyTopKGate<float>, TopKGate<float>,
                   HierarchicalGate<float>, BalancedGate<float>, ExpertChoiceGate<float>,
                   SharedExpertGate<TopKGate<float>>) {
  typename TestType::Config config;
  if constexpr (requires {
                  config.groups;
                  config.group_experts;
                }) {
    config.groups = 2;
    config.group_experts = 4;
    config.top_k_groups = 1;
    config.top_k = 2;
  } else if constexpr (requires { config.routed; }) {
    config.routed.experts = 6;
    config.routed.top_k = 2;
  } else {
    config.experts = 8;
    if constexpr (requires { config.top_k; }) config.top_k = 2;
  }
  const auto layer = make_layer<TestType>(form(1), config);
  const ServingLayer<Layer<TestType>, Int8> served(layer);
  const auto x = random_matrix<float>(64, width, 2);
  CHECK(is_served<Int8>(served.evaluate(x), rounded(layer, served).evaluate(x)));
}

TEST_CASE("serving: identity experts stay what they are", "[weights]") {
  Layer<TopKGate<float>> layer({.width = width,
                                .expert = form(0),
                                .gate = {.experts = 5, .top_k = 3},
                                .identity_experts = 2,
                                .seed = 1});
  const ServingLayer<Layer<TopKGate<float>>, Int8> served(layer);
  CHECK(served.experts().size() == 3);
  const auto x = random_matrix<float>(40, width, 2);
  CHECK(is_served<Int8>(served.evaluate(x), rounded(layer, served).evaluate(x)));
}

TEMPLATE_TEST_CASE("serving: a token has the same bits whoever shares its batch", "[weights]",
                   MOE_TEST_FORMATS) {
  const auto activations = GENERATE(Activations::float32, Activations::int8);
  if (activations == Activations::int8 && !TestType::scaled) return;
  using Gate = TopKGate<float>;
  const auto layer = make_layer<Gate>(form(0), {.experts = 4, .top_k = 2});
  const ServingLayer<Layer<Gate>, TestType> served(layer, {.activations = activations});
  CHECK(served.options().activations == activations);
  const auto x = random_matrix<float>(150, width, 2);
  const Matrix<float> all = served.evaluate(x);
  for (const Index count : {1, 2, 7, 30}) {
    const Matrix<float> some = served.evaluate(x.middleRows(20, count));
    CHECK(same_bits(some, Matrix<float>(all.middleRows(20, count))));
  }
  for (const int threads : {1, 3}) {
    const test::Threads scope(threads);
    CHECK(same_bits(served.evaluate(x), all));
  }
}

TEMPLATE_TEST_CASE("serving: rounded activations change little", "[weights]",
                   MOE_TEST_SCALED_FORMATS) {
  const int number = GENERATE(range(0, forms));
  using Gate = TopKGate<float>;
  const auto layer = make_layer<Gate>(form(number), {.experts = 4, .top_k = 2});
  const auto x = random_matrix<float>(50, width, 2);
  const Matrix<float> exact = ServingLayer<Layer<Gate>, TestType>(layer).evaluate(x);
  const Matrix<float> rounded =
      ServingLayer<Layer<Gate>, TestType>(layer, {.activations = Activations::int8}).evaluate(x);
  CHECK((rounded - exact).norm() < 0.02f * exact.norm());
  CHECK(!same_bits(rounded, exact));
}

TEMPLATE_TEST_CASE("serving: gradients go through it", "[weights]", MOE_TEST_FORMATS) {
  const int number = GENERATE(range(0, forms));
  CAPTURE(number);
  using Gate = TopKGate<float>;
  const auto layer = make_layer<Gate>(form(number), {.experts = 5, .top_k = 2});
  ServingLayer<Layer<Gate>, TestType> served(layer);
  auto wide = rounded(layer, served);
  const auto x = random_matrix<float>(30, width, 2);
  const auto dy = random_matrix<float>(30, width, 3);
  typename decltype(served)::Tape tape;
  typename Layer<Gate>::Tape wide_tape;
  CHECK(is_served<TestType>(served.forward(x, tape, {.step = 0}),
                            wide.forward(x, wide_tape, {.step = 0})));
  // A saved number that is rounded to bfloat16 may be rounded to another one.
  const double most = TestType::scaled && number == 5 ? 1e-3 : 1e-5;
  CHECK(relative_error(served.backward(dy, tape), wide.backward(dy, wide_tape)) < most);
  Index gate_parameters = 0;
  for_each_parameter(served, [&](const std::string& name, const auto& p) {
    if (!name.starts_with("gate.")) {
      CHECK(!p.trained);
      CHECK(p.gradient().isZero(0));
      return;
    }
    ++gate_parameters;
    for_each_parameter(wide, [&](const std::string& of, const auto& q) {
      if (of == name) CHECK(relative_error(p.gradient(), q.gradient()) < most);
    });
  });
  CHECK(gate_parameters > 0);
}

TEST_CASE("serving: several threads, each with its own tape", "[weights]") {
  const auto layer = make_layer<TopKGate<float>>(form(1), {.experts = 8, .top_k = 2});
  const ServingLayer<Layer<TopKGate<float>>, Int4> served(layer,
                                                          {.activations = Activations::int8});
  const auto x = random_matrix<float>(60, width, 2);
  const Matrix<float> expected = served.evaluate(x);
  std::vector<std::thread> threads;
  std::vector<int> same(4);
  for (int& result : same) {
    threads.emplace_back([&] {
      decltype(served)::Tape tape;
      result = 1;
      for (int i = 0; i < 5; ++i) result &= same_bits(served.evaluate(x, tape), expected) ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int result : same) CHECK(result == 1);
}

TEMPLATE_TEST_CASE("serving: nothing is allocated in steady state, and memory is the format's",
                   "[weights]", MOE_TEST_FORMATS) {
  MoELayer<Expert<FeedForward>, TopKGate<float>> layer(
      {.width = 128, .expert = {.hidden = 256}, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
  const ServingLayer<decltype(layer), TestType> served(layer);
  const auto x = random_matrix<float>(30, 128, 2);
  typename decltype(served)::Tape tape;
  served.evaluate(x, tape);
  CHECK(allocations_in([&] { served.evaluate(x, tape); }) == 0);
  const double weights = 4 * 2.0 * 128 * 256;
  const double bits = std::is_same_v<TestType, Int8>   ? 8 + 16.0 / 32
                      : std::is_same_v<TestType, Int4> ? 4 + 16.0 / 32
                                                       : 16;
  CHECK(static_cast<double>(served.weight_bytes()) <= 1.03 * weights * bits / 8);
}

TEST_CASE("serving: what it refuses", "[weights]") {
  auto layer = make_layer<TopKGate<float>>(form(0), {.experts = 4, .top_k = 2});
  using Served = ServingLayer<Layer<TopKGate<float>>, Float16>;
  const Served served(layer);
  CHECK_THROWS_WITH(served.evaluate(Matrix<float>(3, width + 1)), Contains("x has 71 columns"));
  CHECK_THROWS_WITH(Served(layer, {.activations = Activations::int8}),
                    Contains("float16 has float32 only"));
  CHECK(served.evaluate(Matrix<float>(0, width)).rows() == 0);

  std::vector<Served::Expert> three(served.experts().begin(), served.experts().end() - 1);
  CHECK_THROWS_WITH(Served(served.config(), served.gate(), three),
                    Contains("MoELayer: 3 experts, must be 4 in this process"));

  for_each_parameter(layer, [](const std::string& name, auto& p) {
    if (name == "experts.2.down.weight") p.value(7, 3) = 1e6f;
  });
  CHECK_THROWS_WITH(Served(layer),
                    Contains("experts.2.down.weight(7, 3) = 1e+06 is too large for float16"));
  for_each_parameter(layer, [](const std::string& name, auto& p) {
    if (name == "experts.2.down.weight") p.value.resize(3, 4);
  });
  CHECK_THROWS_WITH(Served(layer), Contains("must be 130 x 70"));
}
