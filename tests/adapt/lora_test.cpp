#include "moe/adapt/lora.hpp"

#include <map>
#include <string>
#include <vector>

#include "../allocation.hpp"
#include "../experts/passes.hpp"
#include "../naive_layer.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/optim/adam.hpp"

using namespace moe;
using namespace moe::test;  // NOLINT(google-build-using-namespace)
using Catch::Matchers::Contains;
using Catch::Matchers::WithinAbs;

namespace {

template <class Scalar>
using Plain = MoELayer<Expert<FeedForward, Scalar>>;
template <class Scalar>
using Adapted = MoELayer<Lora<FeedForward, Scalar>>;

/// Plain and gated, biases, limits that are reached, weights on the input, recomputed pre-activations.
std::vector<FeedForwardConfig> forms(Index width, Index hidden) {
  std::vector<FeedForwardConfig> all;
  for (const bool gated : {false, true}) {
    for (const bool weighted : {false, true}) {
      all.push_back({.width = width,
                     .hidden = hidden,
                     .activation = Activation::silu,
                     .gated = gated,
                     .weighted_input = weighted});
      all.push_back({.width = width,
                     .hidden = hidden,
                     .activation = Activation::gelu,
                     .gated = gated,
                     .bias = true,
                     .limit = 0.5,
                     .linear_offset = gated ? 1.0 : 0.0,
                     .weighted_input = weighted,
                     .recompute = true});
    }
  }
  return all;
}

/// Random numbers in every parameter, frozen ones too.
template <class Scalar>
LoraFeedForward<Scalar> random_network(const FeedForwardConfig& config, const LoraConfig& lora,
                                       std::uint64_t seed = 1) {
  LoraFeedForward<Scalar> network(LoraFeedForwardConfig{config.width, config, lora}, 0);
  randomize(network, seed, 0.3);
  return network;
}

template <class Module>
std::map<std::string, bool> trained_of(const Module& module) {
  std::map<std::string, bool> trained;
  for_each_parameter(module,
                     [&](const std::string& name, const auto& p) { trained[name] = p.trained; });
  return trained;
}

}  // namespace

TEST_CASE("lora: the parameters of a map with an adapter", "[adapt]") {
  const LoraFeedForward<double> network(
      LoraFeedForwardConfig{.width = 5,
                            .network = {.hidden = 7, .gated = true, .bias = true},
                            .lora = {.rank = 2, .up = false}},
      1);
  std::map<std::string, std::pair<Index, Index>> shapes;
  for_each_parameter(network, [&](const std::string& name, const auto& p) {
    shapes[name] = {p.value.rows(), p.value.cols()};
    CHECK(p.trained == (name.find("lora") != std::string::npos));
  });
  const std::map<std::string, std::pair<Index, Index>> expected = {
      {"gate.weight", {5, 7}}, {"gate.lora_A.weight", {5, 2}}, {"gate.lora_B.weight", {2, 7}},
      {"gate.bias", {1, 7}},   {"up.weight", {5, 7}},          {"up.bias", {1, 7}},
      {"down.weight", {7, 5}}, {"down.lora_A.weight", {7, 2}}, {"down.lora_B.weight", {2, 5}},
      {"down.bias", {1, 5}}};
  CHECK(shapes == expected);
  CHECK(parameter_count(network) == 2 * (5 + 7) + 2 * (7 + 5));
  CHECK(network.row_work() == 3 * 35 + 2 * 2 * (5 + 7));
}

TEST_CASE("lora: hand-worked numbers", "[adapt]") {
  // D = H = 1, an identity activation: y = (w1·x + f·a1·b1·x)·(w2 + f·a2·b2), f = 3 / 2.
  LoraFeedForward<double> network(
      LoraFeedForwardConfig{
          .width = 1,
          .network = {.hidden = 1, .activation = Activation::identity, .bias = false},
          .lora = {.rank = 2, .alpha = 3}},
      0);
  for_each_parameter(network, [](const std::string& name, Parameter<double>& p) {
    if (name == "up.weight") p.value << 2;
    if (name == "up.lora_A.weight") p.value << 1, -1;
    if (name == "up.lora_B.weight") p.value << 4, 2;  // A·B = 2, times 3/2 is 3
    if (name == "down.weight") p.value << -1;
    if (name == "down.lora_A.weight") p.value << 0.5, 1;
    if (name == "down.lora_B.weight") p.value << 2, 1;  // A·B = 2, times 3/2 is 3
  });
  const Matrix<double> x = Matrix<double>::Constant(1, 1, 7);
  const Matrix<double> one = Matrix<double>::Ones(1, 1);
  Passes<double> passes(network, GatheredRows<double>(x));
  CHECK_THAT(passes.forward(network)(0, 0), WithinAbs(7 * 5 * 2, 1e-12));
  passes.backward(network, one, one);
  CHECK_THAT(passes.dx(0, 0), WithinAbs(5 * 2, 1e-12));
  // dy/dA of up = x·f·B·2, dy/dB = x·f·A·2; of down: the hidden number is 35.
  const std::map<std::string, std::vector<double>> expected = {
      {"up.lora_A.weight", {7 * 1.5 * 4 * 2, 7 * 1.5 * 2 * 2}},
      {"up.lora_B.weight", {7 * 1.5 * 1 * 2, 7 * 1.5 * -1 * 2}},
      {"down.lora_A.weight", {35 * 1.5 * 2, 35 * 1.5 * 1}},
      {"down.lora_B.weight", {35 * 1.5 * 0.5, 35 * 1.5 * 1}}};
  for_each_parameter(network, [&](const std::string& name, Parameter<double>& p) {
    INFO(name);
    if (!p.trained) return;
    for (Index i = 0; i < 2; ++i) {
      CHECK_THAT(p.gradient().data()[i], WithinAbs(expected.at(name)[detail::to_size(i)], 1e-12));
    }
  });
}

TEMPLATE_TEST_CASE("lora: with rank 0 the bits of the base", "[adapt]", float, double) {
  using S = TestType;
  for (const FeedForwardConfig& form : forms(21, 35)) {
    Plain<S> layer({.width = 21, .expert = form, .gate = {.experts = 4, .top_k = 2}, .seed = 3});
    randomize(layer, 5, 0.3);
    const auto x = random_matrix<S>(50, 21, 1);
    const auto dy = random_matrix<S>(50, 21, 2);
    auto adapted = adapt(layer, LoraConfig{.rank = 0}, Seed{1});
    typename Plain<S>::Tape tape;
    typename Adapted<S>::Tape adapted_tape;
    CHECK(same_bits(adapted.forward(x, adapted_tape, {.step = 1}),
                    layer.forward(x, tape, {.step = 1})));
    CHECK(same_bits(adapted.backward(dy, adapted_tape), layer.backward(dy, tape)));
    CHECK(parameter_count(adapted) == 0);
  }
}

TEMPLATE_TEST_CASE("lora: at the start it computes what the layer does", "[adapt]", float, double) {
  using S = TestType;
  for (const FeedForwardConfig& form : forms(21, 35)) {
    Plain<S> layer({.width = 21, .expert = form, .gate = {.experts = 4, .top_k = 2}, .seed = 3});
    randomize(layer, 5, 0.3);
    const auto x = random_matrix<S>(50, 21, 1);
    const auto adapted = adapt(layer, LoraConfig{.rank = 3}, Seed{1});
    CHECK(relative_error(adapted.evaluate(x), layer.evaluate(x)) == 0);
    for_each_parameter(adapted, [](const std::string& name, const auto& p) {
      if (name.ends_with("lora_A.weight")) CHECK(p.value.norm() > 0);
      if (name.ends_with("lora_B.weight")) CHECK(p.value.norm() == 0);
    });
  }
}

TEST_CASE("lora: an adapter starts as PEFT's does, by the seed and the expert's number",
          "[adapt]") {
  const Plain<double> layer({.width = 400,
                             .expert = {.hidden = 3, .gated = true},
                             .gate = {.experts = 3, .top_k = 1},
                             .seed = 3});
  const auto first = values_of(adapt(layer, LoraConfig{.rank = 6}, Seed{1}));
  const auto again = values_of(adapt(layer, LoraConfig{.rank = 6}, Seed{1}));
  const auto other = values_of(adapt(layer, LoraConfig{.rank = 6}, Seed{2}));
  const auto& a = first.at("experts.0.up.lora_A.weight");
  CHECK(same_bits(a, again.at("experts.0.up.lora_A.weight")));
  CHECK(!same_bits(a, other.at("experts.0.up.lora_A.weight")));
  CHECK(!same_bits(a, first.at("experts.1.up.lora_A.weight")));
  CHECK(!same_bits(a, first.at("experts.0.gate.lora_A.weight")));
  // Uniform in ±1/√400: its largest is near that, its variance a third of the square.
  CHECK(a.cwiseAbs().maxCoeff() <= 0.05);
  CHECK(a.cwiseAbs().maxCoeff() > 0.0495);
  CHECK_THAT(a.squaredNorm() / static_cast<double>(a.size()), WithinAbs(0.0025 / 3, 5e-5));
}

// With G the gradient of the whole matrix W + f·A·B, that of A is f·G·Bᵀ and that of B f·Aᵀ·G; everything
// else is as of the merged network.
TEST_CASE("lora: passes and gradients are those of the merged network", "[adapt]") {
  struct Shape {
    Index width, hidden, rank, rows;
  };
  for (const Shape shape : {Shape{5, 7, 1, 1}, Shape{21, 35, 3, 4}, Shape{16, 130, 8, 70},
                            Shape{33, 20, 70, 9}, Shape{70, 300, 130, 150}}) {
    for (FeedForwardConfig form : forms(shape.width, shape.hidden)) {
      for (const bool stabilized : {false, true}) {
        CAPTURE(shape.width, shape.hidden, shape.rank, shape.rows, form.gated, form.bias,
                form.weighted_input, stabilized);
        const LoraConfig lora{.rank = shape.rank, .alpha = 2.5, .rank_stabilized = stabilized};
        auto network = random_network<double>(form, lora);
        auto merged = network.merged();
        const auto x = random_matrix(shape.rows, shape.width, 4);
        const auto dy = random_matrix(shape.rows, shape.width, 5);
        const auto weight = random_matrix(1, shape.rows, 6);
        Passes<double> passes(network, GatheredRows<double>(x));
        Passes<double> expected(merged, GatheredRows<double>(x));
        CHECK(relative_error(passes.forward(network, weight), expected.forward(merged, weight)) <
              1e-12);
        passes.backward(network, dy, weight);
        expected.backward(merged, dy, weight);
        CHECK(relative_error(passes.dx, expected.dx) < 1e-12);
        CHECK(relative_error(passes.dweight, expected.dweight) < 1e-11);
        const double rank = static_cast<double>(shape.rank);
        const double factor = 2.5 / (stabilized ? std::sqrt(rank) : rank);
        const Named whole = gradients_of(merged);
        const Named values = values_of(network);
        for_each_parameter(network, [&](const std::string& name, Parameter<double>& p) {
          INFO(name);
          const std::string map = name.substr(0, name.find('.'));
          const bool is_a = name.ends_with("lora_A.weight");
          if (!is_a && !name.ends_with("lora_B.weight")) {
            CHECK(p.stored.memory.size() == 0);
            return;
          }
          const Matrix<double>& g = whole.at(map + ".weight");
          const Matrix<double> needed =
              is_a ? Matrix<double>(factor * g * values.at(map + ".lora_B.weight").transpose())
                   : Matrix<double>(factor * values.at(map + ".lora_A.weight").transpose() * g);
          CHECK(relative_error(p.gradient(), needed) < 1e-11);
        });
      }
    }
  }
}

TEST_CASE("lora: gradients are derivatives at every scale", "[adapt]") {
  for (const FeedForwardConfig& form : forms(4, 6)) {
    if (form.limit > 0) continue;  // has kinks; the merged network is compared above
    for (const double weights : {1e-2, 1.0, 3.0}) {
      for (const double inputs : {1e-2, 1.0, 3.0}) {
        CAPTURE(form.gated, form.weighted_input, weights, inputs);
        auto network = random_network<double>(form, {.rank = 2, .alpha = 2});
        randomize(network, 3, weights);
        Matrix<double> x = random_matrix(5, 4, 4, inputs);
        const auto dy = random_matrix(5, 4, 5);
        const auto weight = random_matrix(1, 5, 6);
        Passes<double> passes(network, GatheredRows<double>(x));
        passes.forward(network, weight);
        passes.backward(network, dy, weight);
        const auto loss = [&] {
          Passes<double> fresh(network, GatheredRows<double>(x));
          return fresh.forward(network, weight, false).cwiseProduct(dy).sum();
        };
        // Where all is small the functions are nearly straight, and rounding counts more.
        const double step = weights * inputs > 2 ? 2e-5 : weights * inputs < 0.1 ? 1e-2 : 1e-4;
        for_each_parameter(network, [&](const std::string& name, Parameter<double>& p) {
          if (!p.trained) return;
          INFO(name);
          CHECK(relative_error(p.gradient(), difference_gradient(p.value, loss, step * weights)) <
                1e-7);
        });
        CHECK(relative_error(passes.dx, difference_gradient(x, loss, step * inputs)) < 1e-7);
      }
    }
  }
}

TEST_CASE("lora: a second pass adds to the gradients", "[adapt]") {
  Plain<double> layer(
      {.width = 6, .expert = {.hidden = 9}, .gate = {.experts = 3, .top_k = 2}, .seed = 3});
  randomize(layer, 5, 0.3);
  auto adapted = adapt(layer, LoraConfig{.rank = 2}, Seed{1});
  randomize(adapted, 6, 0.3);
  const auto x = random_matrix(20, 6, 1);
  Adapted<double>::Tape tape;
  zero_gradients(adapted, Updates::lazy);
  adapted.forward(x, tape, {.step = 1});
  adapted.backward(x, tape);
  const Named once = gradients_of(adapted);
  adapted.backward(x, tape);
  for (const auto& [name, gradient] : gradients_of(adapted)) {
    CHECK(relative_error(gradient, 2 * once.at(name)) < 1e-14);
  }
  // And the one after a lazy zero writes over what is there.
  zero_gradients(adapted, Updates::lazy);
  adapted.backward(x, tape);
  for (const auto& [name, gradient] : gradients_of(adapted)) {
    CHECK(same_bits(gradient, once.at(name)));
  }
}

TEST_CASE("lora: what a user trains of the base gets its gradient", "[adapt]") {
  auto network = random_network<double>(forms(6, 9)[1], {.rank = 2});
  for_each_parameter(network, [](const std::string& name, auto& p) {
    p.trained = p.trained || name == "up.weight" || name == "down.bias";
  });
  auto merged = network.merged();
  const auto x = random_matrix(7, 6, 1);
  const auto weight = random_matrix(1, 7, 6);
  Passes<double> passes(network, GatheredRows<double>(x));
  Passes<double> expected(merged, GatheredRows<double>(x));
  passes.forward(network, weight);
  passes.backward(network, x, weight);
  expected.forward(merged, weight);
  expected.backward(merged, x, weight);
  const Named needed = gradients_of(merged);
  for_each_parameter(network, [&](const std::string& name, auto& p) {
    INFO(name);
    if (name == "up.weight" || name == "down.bias") {
      CHECK(relative_error(p.gradient(), needed.at(name)) < 1e-12);
    }
    if (name == "down.weight" || name == "up.bias") CHECK(p.gradient().isZero(0));
  });
}

TEST_CASE("lora: what a user trains of one expert alone gets its gradient", "[adapt]") {
  Plain<double> layer(
      {.width = 6, .expert = {.hidden = 9}, .gate = {.experts = 3, .top_k = 2}, .seed = 3});
  randomize(layer, 5, 0.3);
  const auto x = random_matrix(20, 6, 1);
  const auto gradients = [&](auto module) {
    typename decltype(module)::Tape tape;
    module.forward(x, tape, {.step = 1});
    module.backward(x, tape);
    return gradients_of(module);
  };
  const Named whole = gradients(layer);
  for (const Index rank : {0, 2}) {
    auto adapted = adapt(layer, LoraConfig{.rank = rank}, Seed{1});
    const Named alone = gradients(adapted);
    for_each_parameter(adapted, [](const std::string& name, auto& p) {
      p.trained = p.trained || name == "experts.1.up.weight" || name == "experts.2.down.bias";
    });
    // B is zero, so that all others are those of the layer.
    for (const auto& [name, gradient] : gradients(adapted)) {
      INFO(name);
      if (name == "experts.1.up.weight" || name == "experts.2.down.bias") {
        CHECK(relative_error(gradient, whole.at(name)) < 1e-13);
      } else {
        CHECK(same_bits(gradient, alone.at(name)));
      }
    }
  }
}

TEST_CASE("lora: one of the two matrices can be frozen", "[adapt]") {
  for (const std::string frozen : {"lora_A.weight", "lora_B.weight"}) {
    auto network = random_network<double>(forms(6, 9)[0], {.rank = 2});
    auto both = network;
    for_each_parameter(network, [&](const std::string& name, auto& p) {
      p.trained = p.trained && !name.ends_with(frozen);
    });
    const auto x = random_matrix(7, 6, 1);
    const auto weight = random_matrix(1, 7, 6);
    for (auto* each : {&network, &both}) {
      Passes<double> passes(*each, GatheredRows<double>(x));
      passes.forward(*each, weight);
      passes.backward(*each, x, weight);
    }
    const Named needed = gradients_of(both);
    for_each_parameter(network, [&](const std::string& name, auto& p) {
      if (p.trained) CHECK(same_bits(p.gradient(), needed.at(name)));
      if (name.ends_with(frozen)) CHECK(p.stored.memory.size() == 0);
    });
  }
}

TEMPLATE_TEST_CASE("lora: the same bits on any number of threads", "[adapt]", float, double) {
  using S = TestType;
  const auto gated = GENERATE(false, true);
  // One expert has all tokens, and hidden rows of several panels, so that columns are split too.
  const auto top_k = GENERATE(Index{1}, Index{2});
  Plain<S> layer({.width = 40,
                  .expert = {.hidden = 2 * detail::panel_columns<S> + 5, .gated = gated},
                  .gate = {.experts = top_k, .top_k = top_k},
                  .seed = 5});
  auto adapted = adapt(layer, LoraConfig{.rank = 5}, Seed{1});
  randomize(adapted, 7, 0.1);
  const auto x = random_matrix<S>(700, 40, 1);
  const auto dy = random_matrix<S>(700, 40, 2);
  const auto run = [&](int count) {
    const Threads threads(count);
    typename Adapted<S>::Tape tape;
    zero_gradients(adapted);
    std::vector<Matrix<S>> all;
    all.push_back(adapted.forward(x, tape, {.step = 1}));
    all.push_back(adapted.backward(dy, tape));
    for_each_parameter(adapted, [&](const std::string&, auto& p) {
      if (p.trained) all.push_back(p.gradient());
    });
    return all;
  };
  const auto one = run(1);
  for (const int count : {2, 3, 8}) {
    const auto several = run(count);
    for (std::size_t i = 0; i < one.size(); ++i) CHECK(same_bits(several[i], one[i]));
  }
}

TEMPLATE_TEST_CASE("lora: a token has the same bits alone and in a batch", "[adapt]", float,
                   double) {
  using S = TestType;
  const auto gated = GENERATE(false, true);
  Plain<S> layer({.width = 21,
                  .expert = {.hidden = 35, .activation = Activation::gelu, .gated = gated},
                  .gate = {.experts = 4, .top_k = 2},
                  .seed = 5});
  auto adapted = adapt(layer, LoraConfig{.rank = 70}, Seed{1});
  randomize(adapted, 7, 0.3);
  const auto x = random_matrix<S>(700, 21, 1);
  const Matrix<S> whole = adapted.evaluate(x);
  for (const Index t : {0, 1, 63, 64, 350, 699}) {
    CHECK(same_bits(adapted.evaluate(x.row(t)), whole.row(t)));
  }
  CHECK(same_bits(adapted.evaluate(x.middleRows(100, 333)), whole.middleRows(100, 333)));
}

TEMPLATE_TEST_CASE("lora: passes after the first do not allocate", "[adapt]", NoisyTopKGate<float>,
                   HierarchicalGate<float>) {
  typename TestType::Config gate;
  if constexpr (requires { gate.groups; }) {
    gate = {.groups = 2, .group_experts = 2, .top_k_groups = 2, .top_k = 1};
  } else {
    gate = {.experts = 4, .top_k = 2};
  }
  MoELayer<Expert<FeedForward>, TestType> layer(
      {.width = 24, .expert = {.hidden = 40}, .gate = gate, .seed = 5});
  auto adapted = adapt(layer, LoraConfig{.rank = 4}, LoraGateConfig{.rank = 2}, Seed{1});
  // One of the base too.
  for_each_parameter(adapted, [](const std::string& name, auto& p) {
    p.trained = p.trained || name == "gate.weight" || name == "gate.primary.weight";
  });
  const auto x = random_matrix<float>(100, 24, 1);
  typename decltype(adapted)::Tape tape;
  Adam<float> adam({});
  const auto step = [&](std::uint64_t number) {
    zero_gradients(adapted, Updates::lazy);
    adapted.forward(x, tape, {.step = number});
    adapted.backward(x, tape);
    adam.update(adapted, 1e-3);
    adapted.evaluate(x, tape);
  };
  const Threads threads(1);
  step(0);
  step(0);
  const std::size_t before = allocation_count();
  step(0);
  CHECK(allocation_count() == before);
}

TEST_CASE("lora: an optimizer moves the adapters alone, and merging keeps what was learned",
          "[adapt]") {
  Plain<double> layer({.width = 8,
                       .expert = {.hidden = 12, .activation = Activation::silu},
                       .gate = {.experts = 4, .top_k = 2},
                       .seed = 5});
  randomize(layer, 3, 0.4);
  // A layer that differs by a matrix of rank 1 in every down map.
  Plain<double> target = layer;
  for_each_parameter(target, [](const std::string& name, Parameter<double>& p) {
    if (!name.ends_with("down.weight")) return;
    p.value += 0.5 * random_matrix(p.value.rows(), 1, 8) * random_matrix(1, p.value.cols(), 9);
  });
  auto adapted = adapt(layer, LoraConfig{.rank = 2, .alpha = 2}, Seed{1});
  const auto x = random_matrix(200, 8, 1);
  const Matrix<double> y = target.evaluate(x);
  const double before = (adapted.evaluate(x) - y).norm() / y.norm();
  const auto base = values_of(layer);
  Adam<double> adam({});
  Adapted<double>::Tape tape;
  for (std::uint64_t step = 0; step < 300; ++step) {
    zero_gradients(adapted);
    // evaluate()'s choice: without noise the gate's is the same.
    const Matrix<double> dy = (adapted.forward(x, tape, {.step = step}) - y) / 200;
    adapted.backward(dy, tape);
    adam.update(adapted, 0.02);
  }
  const double after = (adapted.evaluate(x) - y).norm() / y.norm();
  CAPTURE(before, after);
  CHECK(after < 0.3 * before);
  for (const auto& [name, value] : values_of(adapted)) {
    if (name.find("lora") == std::string::npos) CHECK(same_bits(value, base.at(name)));
  }
  const auto plain = merged(adapted);
  CHECK(relative_error(plain.evaluate(x), adapted.evaluate(x)) < 1e-12);
  CHECK(trained_of(plain) == trained_of(layer));
  CHECK(plain.config().expert.hidden == 12);
}

TEST_CASE("lora: of a merged layer is trained what is trained of a fresh one", "[adapt]") {
  const MoELayer<Expert<FeedForward, double>, TopKGate<double>> layer(
      {.width = 6,
       .expert = {.hidden = 9},
       .gate = {.experts = 3, .top_k = 2, .score = Score::sigmoid, .selection_bias = true},
       .seed = 3});
  const auto trained = trained_of(layer);
  REQUIRE(trained.at("gate.weight"));
  REQUIRE(!trained.at("gate.selection_bias"));
  CHECK(trained_of(merged(adapt(layer, LoraConfig{}, Seed{1}))) == trained);
  CHECK(trained_of(merged(adapt(layer, LoraConfig{}, LoraGateConfig{}, Seed{1}))) == trained);
}

TEST_CASE("lora: the gate of a layer in training is frozen without its gradients", "[adapt]") {
  MoELayer<Expert<FeedForward, double>, HierarchicalGate<double>> layer(
      {.width = 6,
       .expert = {.hidden = 9},
       .gate = {.groups = 2, .group_experts = 2, .top_k_groups = 2, .top_k = 1},
       .seed = 3});
  randomize(layer, 5, 0.3);
  decltype(layer)::Tape tape;
  const auto x = random_matrix(20, 6, 1);
  layer.forward(x, tape, {.step = 1});
  layer.backward(x, tape);
  auto adapted = adapt(layer, LoraConfig{.rank = 2}, Seed{1});
  Index parameters = 0;
  for_each_parameter(adapted, [&](const std::string& name, auto& p) {
    if (!name.starts_with("gate.")) return;
    INFO(name);
    ++parameters;
    CHECK(p.stored.memory.size() == 0);
    CHECK(std::as_const(p).gradient().isZero(0));
    // What a user trains of it after all waits for its first gradient.
    p.trained = true;
    if (name.find("secondary") != std::string::npos) CHECK(detail::is_idle(p, Updates::lazy));
  });
  CHECK(parameters >= 4);
}

TEST_CASE("lora: a bfloat16 tape and an identity expert work as without adapters", "[adapt]") {
  MoELayer<Expert<FeedForward>, TopKGate<float>> layer(
      {.width = 16,
       .expert = {.hidden = 24, .activation = Activation::silu, .saved = Precision::bfloat16},
       .gate = {.experts = 5, .top_k = 3},
       .identity_experts = 2,
       .seed = 1});
  auto adapted = adapt(layer, LoraConfig{.rank = 4}, Seed{2});
  CHECK(adapted.experts().size() == 3);
  randomize(adapted, 3, 0.2);
  auto plain = merged(adapted);
  const auto x = random_matrix<float>(40, 16, 2);
  decltype(adapted)::Tape tape;
  decltype(plain)::Tape plain_tape;
  CHECK(relative_error(adapted.forward(x, tape, {.step = 0}),
                       plain.forward(x, plain_tape, {.step = 0})) < 1e-5);
  CHECK(relative_error(adapted.backward(x, tape), plain.backward(x, plain_tape)) < 1e-2);
}

TEST_CASE("lora: adapted experts can be copied and removed", "[adapt]") {
  Plain<double> layer(
      {.width = 6, .expert = {.hidden = 9}, .gate = {.experts = 3, .top_k = 2}, .seed = 3});
  auto adapted = adapt(layer, LoraConfig{.rank = 2}, Seed{1});
  randomize(adapted, 6, 0.3);
  const Named before = values_of(adapted);
  adapted.copy_experts({1}, {.seed = 4});
  adapted.remove_experts({0});
  const Named after = values_of(adapted);
  CHECK(same_bits(after.at("experts.0.up.lora_A.weight"), before.at("experts.1.up.lora_A.weight")));
  CHECK(same_bits(after.at("experts.2.up.lora_A.weight"), before.at("experts.1.up.lora_A.weight")));
  CHECK(same_bits(after.at("experts.2.up.weight"), before.at("experts.1.up.weight")));
  adapted.add_experts(1, Seed{9});
  CHECK(adapted.experts().size() == 4);
  for_each_parameter(adapted, [](const std::string& name, const auto& p) {
    if (name.starts_with("experts.")) CHECK(p.trained == (name.find("lora") != std::string::npos));
  });
}

TEST_CASE("lora: a layer whose experts came and went before is adapted as any", "[adapt]") {
  Plain<double> layer(
      {.width = 6, .expert = {.hidden = 9}, .gate = {.experts = 3, .top_k = 2}, .seed = 3});
  layer.copy_experts({1}, {.seed = 4});
  auto adapted = adapt(layer, LoraConfig{.rank = 2}, Seed{1});
  Adam<double> adam({});
  Adapted<double>::Tape tape;
  const auto x = random_matrix(10, 6, 1);
  const auto step = [&] {
    zero_gradients(adapted);
    adapted.forward(x, tape, {.step = 1});
    adapted.backward(x, tape);
    adam.update(adapted, 0.01);
  };
  step();
  const ExpertChange change = adapted.copy_experts({0}, {.seed = 5});
  adam.follow(adapted, adapted, change);
  step();
  CHECK(adapted.experts().size() == 5);
  CHECK(adapted.config().gate.experts == 5);
}

TEST_CASE("lora: a configuration that is out of range is refused", "[adapt]") {
  const Plain<double> layer(
      {.width = 6, .expert = {.hidden = 9}, .gate = {.experts = 3, .top_k = 2}, .seed = 3});
  CHECK_THROWS_WITH(adapt(layer, LoraConfig{.rank = -1}, Seed{1}),
                    Contains("LoraConfig.rank = -1, must be at least 0"));
  CHECK_THROWS_WITH(
      adapt(layer, LoraConfig{.alpha = std::numeric_limits<double>::infinity()}, Seed{1}),
      Contains("LoraConfig.alpha = inf, must be finite"));
  // Finite in double, but not in float.
  const LoraConfig large{.rank = 2, .alpha = 1e39};
  CHECK_THROWS_WITH(
      LoraFeedForward<float>({.width = 4, .network = {.hidden = 3}, .lora = large}, 0),
      Contains("LoraConfig.alpha = 1e+39, gives a factor of 5e+38, must be finite as a"
               " Scalar"));
  CHECK_NOTHROW(LoraFeedForward<double>({.width = 4, .network = {.hidden = 3}, .lora = large}, 0));
  CHECK_THROWS_WITH(
      LoraGate<TopKGate<float>>({.gate = {.width = 4, .experts = 3, .top_k = 2},
                                 .lora = {.rank = 4, .alpha = -1e39, .rank_stabilized = true}},
                                0),
      Contains("LoraGateConfig.alpha = -1e+39, gives a factor of -5e+38, must be finite as a"
               " Scalar"));
  // It is the factor that counts, and without adapters there is none.
  const Plain<float> of_float(
      {.width = 6, .expert = {.hidden = 9}, .gate = {.experts = 3, .top_k = 2}, .seed = 3});
  for (const Index rank : {0, 100}) {
    const auto adapted = adapt(of_float, LoraConfig{.rank = rank, .alpha = 1e39}, Seed{1});
    CHECK(adapted.evaluate(random_matrix<float>(5, 6, 1)).allFinite());
  }
  CHECK_THROWS_WITH(adapt(layer, LoraConfig{}, LoraGateConfig{.rank = -2}, Seed{1}),
                    Contains("LoraGateConfig.rank = -2"));
  CHECK_THROWS_WITH(LoraFeedForward<double>({.width = 4, .network = {.width = 5, .hidden = 3}}, 0),
                    Contains("LoraFeedForward::Config.network.width = 5, must be 0 or Config.width"
                             " = 4"));
  CHECK_THROWS_WITH(LoraFeedForward<double>({.width = 4, .network = {.hidden = 0}}, 0),
                    Contains("FeedForward::Config.hidden = 0"));
  CHECK_THROWS_WITH(adapt(layer, LoraConfig{.up = false, .down = false}, Seed{1}),
                    Contains("LoraConfig.rank = 8, but gate, up and down leave no map"));
  Plain<double> wrong = layer;
  for_each_parameter(wrong, [](const std::string& name, auto& p) {
    if (name == "experts.1.up.weight") p.value.resize(9, 6);
  });
  CHECK_THROWS_WITH(adapt(wrong, LoraConfig{}, Seed{1}), Contains("up.weight is 9 x 6"));
}
