#include "moe/adapt/lora_gate.hpp"

#include <map>
#include <string>

#include "../naive_layer.hpp"
#include "moe/adapt/lora.hpp"
#include "moe/gates/balanced_gate.hpp"
#include "moe/gates/expert_choice_gate.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/product_key_gate.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/optim/adam.hpp"

using namespace moe;
using namespace moe::test;  // NOLINT(google-build-using-namespace)
using Catch::Matchers::Contains;
using Catch::Matchers::WithinAbs;

namespace {

constexpr Index width = 12;

template <class Gate>
typename Gate::Config config_of() {
  typename Gate::Config config;
  config.width = width;
  if constexpr (requires { config.groups, config.group_experts; }) {
    config.groups = 3;
    config.group_experts = 2;
    config.top_k_groups = 2;
    config.top_k = 1;
  } else if constexpr (requires { config.routed; }) {
    config.shared = 1;
    config.gated = true;
    config.routed.experts = 6;
    config.routed.top_k = 2;
  } else if constexpr (requires { config.row_keys; }) {
    config.row_keys = 2;
    config.column_keys = 3;
    config.top_k = 2;
  } else {
    config.experts = 6;
    if constexpr (requires { config.top_k; }) config.top_k = 2;
  }
  if constexpr (requires { config.load_weight; }) config.load_weight = 0.7;
  if constexpr (requires { config.importance_weight; }) config.importance_weight = 0.3;
  return config;
}

/// A gate with numbers in all parameters, adapted, with numbers in its adapters too.
template <class Gate>
LoraGate<Gate> adapted_gate(const LoraGateConfig& lora) {
  Gate gate(config_of<Gate>(), 3);
  randomize(gate, 4, 0.5);
  LoraGate<Gate> adapted(detail::frozen(gate), lora, 5);
  for_each_parameter(adapted, [seed = std::uint64_t{8}](const std::string&, auto& p) mutable {
    if (p.trained) p.value = random_matrix(p.value.rows(), p.value.cols(), ++seed, 0.4);
  });
  return adapted;
}

/// A gate that computes the gradient of its weights by itself.
struct ByItself : TopKGate<double> {
  using TopKGate<double>::TopKGate;
  void backward(const MatrixRef<double>& x, std::span<const double> dweight, Tape& tape,
                Matrix<double>& dx) {
    for_each_parameter(*this, [](const std::string&, auto& p) { p.stored.factors = nullptr; });
    TopKGate<double>::backward(x, dweight, tape, dx);
  }
};

/// A gate that names no parameter.
struct Unweighted : TopKGate<double> {
  using TopKGate<double>::TopKGate;
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}
};

/// A gate that does not check the tape itself.
struct Unchecked : HierarchicalGate<double> {
  using HierarchicalGate<double>::HierarchicalGate;
  void check_tape(const Tape&) const = delete;
};

}  // namespace

TEMPLATE_TEST_CASE("lora gate: passes and gradients are those of the merged gate", "[adapt]",
                   NoisyTopKGate<double>, TopKGate<double>, HierarchicalGate<double>,
                   BalancedGate<double>, ExpertChoiceGate<double>, ProductKeyGate<double>,
                   SharedExpertGate<TopKGate<double>>, ByItself) {
  using Gate = TestType;
  auto gate = adapted_gate<Gate>({.rank = 2, .alpha = 3});
  Gate merged = detail::unfrozen(gate.merged(), gate.config().gate);
  const auto x = random_matrix(30, width, 1);
  typename LoraGate<Gate>::Tape tape;
  typename Gate::Tape merged_tape;
  // Twice, with other adapters, on one tape.
  for (const std::uint64_t step : {1u, 2u}) {
    zero_gradients(gate);
    zero_gradients(merged);
    gate.forward(x, tape, {.step = step});
    merged.forward(x, merged_tape, {.step = step});
    REQUIRE(tape.routing.expert == merged_tape.routing.expert);
    CHECK(tape.routing.weight == merged_tape.routing.weight);
    CHECK_THAT(tape.balance.loss, WithinAbs(merged_tape.balance.loss, 1e-12));
    const auto dweight = random_matrix(1, tape.routing.slots(), 6);
    const std::span<const double> of_slots(dweight.data(), detail::to_size(dweight.size()));
    Matrix<double> dx = Matrix<double>::Zero(30, width);
    Matrix<double> needed = Matrix<double>::Zero(30, width);
    gate.backward(x, of_slots, tape, dx);
    merged.backward(x, of_slots, merged_tape, needed);
    CHECK(relative_error(dx, needed) < 1e-13);
    // The gradient of the sum is not formed.
    for_each_parameter(*tape.gate, [](const std::string& name, const auto& p) {
      INFO(name);
      CHECK((p.stored.memory.size() == 0) == !std::is_same_v<Gate, ByItself>);
    });

    const Named whole = gradients_of(merged);
    const Named values = values_of(gate);
    Index adapters = 0;
    for_each_parameter(gate, [&](const std::string& name, auto& p) {
      INFO(name);
      const bool is_a = name.ends_with("lora_A.weight");
      if (!is_a && !name.ends_with("lora_B.weight")) {
        CHECK(!p.trained);
        CHECK(p.gradient().isZero(0));
        return;
      }
      ++adapters;
      const std::string part = name.substr(0, name.size() - std::string("lora_A.weight").size());
      const Matrix<double>& g = whole.at(part + "weight");
      CHECK(relative_error(
                p.gradient(),
                is_a ? Matrix<double>(1.5 * g * values.at(part + "lora_B.weight").transpose())
                     : Matrix<double>(1.5 * values.at(part + "lora_A.weight").transpose() * g)) <
            1e-12);
    });
    CHECK(adapters >= 2);
    for_each_parameter(gate, [](const std::string&, auto& p) {
      if (p.trained) p.value *= 1.1;
    });
    merged = detail::unfrozen(gate.merged(), gate.config().gate);
  }
  CHECK(gate.evaluate(x, tape).expert == merged.evaluate(x, merged_tape).expert);
}

TEMPLATE_TEST_CASE("lora gate: with rank 0 the bits of the gate", "[adapt]", NoisyTopKGate<double>,
                   TopKGate<double>, HierarchicalGate<double>) {
  using Gate = TestType;
  const auto gate = adapted_gate<Gate>({.rank = 0});
  CHECK(parameter_count(gate) == 0);
  const auto x = random_matrix(30, width, 1);
  typename LoraGate<Gate>::Tape tape;
  typename Gate::Tape plain;
  gate.forward(x, tape, {.step = 1});
  gate.gate().forward(x, plain, {.step = 1});
  CHECK(tape.routing.expert == plain.routing.expert);
  CHECK(tape.routing.weight == plain.routing.weight);
}

TEST_CASE("lora gate: gradients are derivatives", "[adapt]") {
  using Gate = NoisyTopKGate<double>;
  auto gate = adapted_gate<Gate>({.rank = 2, .alpha = 3});
  Matrix<double> x = random_matrix(20, width, 1);
  LoraGate<Gate>::Tape tape;
  gate.forward(x, tape, {.step = 1});
  REQUIRE(choice_margin(tape.noisy, 2) > 2e-3);
  const auto dweight = random_matrix(1, tape.routing.slots(), 6);
  Matrix<double> dx = Matrix<double>::Zero(20, width);
  gate.backward(x, {dweight.data(), detail::to_size(dweight.size())}, tape, dx);
  const auto loss = [&] {
    LoraGate<Gate>::Tape fresh;
    gate.forward(x, fresh, {.step = 1});
    double sum = fresh.balance.loss;
    for (Index s = 0; s < fresh.routing.slots(); ++s) {
      sum += dweight(0, s) * fresh.routing.weight[s];
    }
    return sum;
  };
  for_each_parameter(gate, [&](const std::string& name, Parameter<double>& p) {
    INFO(name);
    if (p.trained) CHECK(relative_error(p.gradient(), difference_gradient(p.value, loss)) < 1e-7);
  });
  CHECK(relative_error(dx, difference_gradient(x, loss)) < 1e-7);
}

TEST_CASE("lora gate: losses and selection bias are the gate's own", "[adapt]") {
  using Gate = TopKGate<double>;
  Gate::Config config = config_of<Gate>();
  config.selection_bias = true;
  config.score = Score::sigmoid;
  config.switch_loss_weight = 0.5;
  LoraGate<Gate> gate({.gate = config, .lora = {.rank = 1}}, 3);
  CHECK(gate.config().width == width);
  const auto x = random_matrix(30, width, 1);
  LoraGate<Gate>::Tape tape;
  gate.forward(x, tape, {.step = 1});
  const double loss = tape.balance.loss;
  REQUIRE(loss > 0);
  auto weights = decltype(gate)::LossWeights{};
  gate.set_loss_weights(weights);
  gate.forward(x, tape, {.step = 1});
  CHECK(tape.balance.loss == 0);
  const Named before = values_of(gate);
  gate.update_selection_bias(tape);
  Vector<double> load = Vector<double>::Zero(6);
  load[2] = 1;
  gate.update_selection_bias(load);
  CHECK(!same_bits(values_of(gate).at("selection_bias"), before.at("selection_bias")));
}

TEMPLATE_TEST_CASE("lora gate: what a user trains of the gate gets its gradient", "[adapt]",
                   NoisyTopKGate<double>, HierarchicalGate<double>) {
  using Gate = TestType;
  auto gate = adapted_gate<Gate>({.rank = 2});
  for_each_parameter(gate, [](const std::string&, auto& p) { p.trained = true; });
  Gate merged = detail::unfrozen(gate.merged(), gate.config().gate);
  const auto x = random_matrix(20, width, 1);
  typename LoraGate<Gate>::Tape tape;
  typename Gate::Tape merged_tape;
  // The second time what is there is written over.
  for (int pass = 0; pass < 2; ++pass) {
    zero_gradients(gate, Updates::lazy);
    zero_gradients(merged);
    gate.forward(x, tape, {.step = 1});
    merged.forward(x, merged_tape, {.step = 1});
    const std::vector<double> dweight(detail::to_size(tape.routing.slots()), 0.25);
    Matrix<double> dx = Matrix<double>::Zero(20, width);
    gate.backward(x, dweight, tape, dx);
    merged.backward(x, dweight, merged_tape, dx);
    const Named whole = gradients_of(merged);
    Index compared = 0;
    for_each_parameter(gate, [&](const std::string& name, auto& p) {
      INFO(name);
      if (name.find("lora") != std::string::npos) return;
      ++compared;
      CHECK(relative_error(p.gradient(), whole.at(name)) < 1e-13);
    });
    CHECK(compared >= 2);
  }
  // What is lazy moves it.
  Adam<double> adam({.updates = Updates::lazy});
  const Named before = values_of(gate);
  adam.update(gate, 0.1);
  for (const auto& [name, value] : values_of(gate)) {
    INFO(name);
    if (name == "weight" || name == "primary.weight" || name == "primary.lora_A.weight") {
      CHECK(!same_bits(value, before.at(name)));
    }
  }
}

TEMPLATE_TEST_CASE("lora gate: a second pass adds to the gradients", "[adapt]", TopKGate<double>,
                   NoisyTopKGate<double>, HierarchicalGate<double>) {
  auto gate = adapted_gate<TestType>({.rank = 2});
  const auto x = random_matrix(20, width, 1);
  typename LoraGate<TestType>::Tape tape;
  Matrix<double> dx = Matrix<double>::Zero(20, width);
  gate.forward(x, tape, {.step = 1});
  const std::vector<double> dweight(detail::to_size(tape.routing.slots()), 0.25);
  gate.backward(x, dweight, tape, dx);
  const Named once = gradients_of(gate);
  gate.backward(x, dweight, tape, dx);
  for (const auto& [name, gradient] : gradients_of(gate)) {
    INFO(name);
    CHECK((gradient - 2 * once.at(name)).norm() <= 1e-14 * once.at(name).norm());
  }
}

TEST_CASE("lora gate: adapters of secondary gates without tokens are passed by", "[adapt]") {
  using Gate = HierarchicalGate<double>;
  auto gate = adapted_gate<Gate>({.rank = 2});
  // One token reaches two of the three groups.
  const auto x = random_matrix(1, width, 1);
  LoraGate<Gate>::Tape tape;
  gate.forward(x, tape, {.step = 1});
  const std::vector<double> dweight(detail::to_size(tape.routing.slots()), 0.25);
  Matrix<double> dx = Matrix<double>::Zero(1, width);
  gate.backward(x, dweight, tape, dx);
  Index idle = 0;
  for_each_parameter(gate, [&](const std::string& name, const auto& p) {
    if (name.ends_with("lora_B.weight")) idle += detail::is_idle(p, Updates::lazy) ? 1 : 0;
  });
  CHECK(idle == 1);
}

TEST_CASE("lora gate: weights of another shape are refused before they are used", "[adapt]") {
  using Gate = TopKGate<double>;
  const auto x = random_matrix(20, width, 1);
  for (const std::string transposed : {"weight", "lora_A.weight", "lora_B.weight"}) {
    auto gate = adapted_gate<Gate>({.rank = 2});
    for_each_parameter(gate, [&](const std::string& name, auto& p) {
      if (name == transposed) p.value = Matrix<double>(p.value.transpose());
    });
    LoraGate<Gate>::Tape tape;
    CHECK_THROWS_WITH(gate.evaluate(x, tape), Contains("LoraGate: " + transposed));
    CHECK_THROWS_WITH(gate.forward(x, tape, {.step = 0}), Contains("LoraGate: " + transposed));
    CHECK_THROWS_WITH(gate.merged(), Contains("LoraGate: " + transposed));
  }
}

TEST_CASE("lora gate: backward refuses adapters that got another shape after forward", "[adapt]") {
  using Gate = TopKGate<double>;
  const auto x = random_matrix(20, width, 1);
  for (const std::string transposed : {"weight", "lora_A.weight", "lora_B.weight"}) {
    auto gate = adapted_gate<Gate>({.rank = 2});
    LoraGate<Gate>::Tape tape;
    gate.forward(x, tape, {.step = 0});
    for_each_parameter(gate, [&](const std::string& name, auto& p) {
      if (name == transposed) p.value = Matrix<double>(p.value.transpose());
    });
    Matrix<double> dx = Matrix<double>::Zero(20, width);
    CHECK_THROWS_WITH(gate.backward(x, std::vector<double>(40, 1), tape, dx),
                      Contains("LoraGate: " + transposed));
    CHECK(dx.isZero(0));
  }
}

// The tape has a gate, which fits the tape always; the one of the call did not have to.
TEST_CASE("lora gate: backward on the tape of another gate is refused", "[adapt]") {
  using Gate = TopKGate<double>;
  auto gate = adapted_gate<Gate>({.rank = 2});
  Gate::Config config = config_of<Gate>();
  config.experts = 4;
  LoraGate<Gate> smaller({.gate = config, .lora = {.rank = 2}}, 3);
  const auto x = random_matrix(20, width, 1);
  LoraGate<Gate>::Tape tape;
  gate.forward(x, tape, {.step = 0});
  Matrix<double> dx = Matrix<double>::Zero(20, width);
  CHECK_THROWS_WITH(smaller.backward(x, std::vector<double>(40, 1), tape, dx),
                    Contains("the tape is another gate's"));
  CHECK(dx.isZero(0));
}

TEST_CASE("lora gate: backward on a tape with another number of adapters is refused", "[adapt]") {
  const auto gate_of = [](Index groups) {
    Unchecked::Config config = config_of<Unchecked>();
    config.groups = groups;
    return LoraGate<Unchecked>({.gate = config, .lora = {.rank = 2}}, 3);
  };
  const auto x = random_matrix(20, width, 1);
  LoraGate<Unchecked>::Tape tape;
  gate_of(3).forward(x, tape, {.step = 0});
  for (const Index groups : {2, 5}) {
    auto other = gate_of(groups);
    Matrix<double> dx = Matrix<double>::Zero(20, width);
    // The adapters of the primary gate and of every group's.
    CHECK_THROWS_WITH(other.backward(x, std::vector<double>(40, 1), tape, dx),
                      Contains("the tape is another gate's, of 4 adapters, this one has " +
                               std::to_string(groups + 1)));
    CHECK(dx.isZero(0));
  }
}

TEMPLATE_TEST_CASE("lora gate: the tape of a gate with more experts is as good as a new one",
                   "[adapt]", TopKGate<double>, HierarchicalGate<double>) {
  using Gate = TestType;
  // The weights of the gate too, whose gradients take memory in the tape.
  const bool all_trained = GENERATE(false, true);
  const auto run = [&](Index experts, typename LoraGate<Gate>::Tape& tape) {
    typename Gate::Config config = config_of<Gate>();
    if constexpr (requires { config.group_experts; }) {
      config.groups = experts;
    } else {
      config.experts = experts;
    }
    LoraGate<Gate> gate({.gate = config, .lora = {.rank = 2}}, 3);
    randomize(gate, 7, 0.4);
    for_each_parameter(gate,
                       [&](const std::string&, auto& p) { p.trained = p.trained || all_trained; });
    const auto x = random_matrix(30, width, 1);
    gate.forward(x, tape, {.step = 1});
    const std::vector<double> dweight(detail::to_size(tape.routing.slots()), 0.25);
    Matrix<double> dx = Matrix<double>::Zero(30, width);
    gate.backward(x, dweight, tape, dx);
    return gradients_of(gate);
  };
  typename LoraGate<Gate>::Tape used;
  run(9, used);
  typename LoraGate<Gate>::Tape fresh;
  const Named expected = run(5, fresh);
  for (const auto& [name, gradient] : run(5, used)) {
    CHECK(same_bits(gradient, expected.at(name)));
  }
  const Named larger = run(9, fresh);
  for (const auto& [name, gradient] : run(9, used)) {
    CHECK(same_bits(gradient, larger.at(name)));
  }
}

TEST_CASE("lora gate: a gate without weights to adapt is refused", "[adapt]") {
  const Unweighted gate(config_of<TopKGate<double>>(), 1);
  CHECK_THROWS_WITH(
      LoraGate<Unweighted>(gate, LoraGateConfig{.rank = 3}, 1),
      Contains("LoraGateConfig.rank = 3, but the gate has no parameter named weight"));
}

TEST_CASE("lora gate: in a layer, with adapters on the experts too", "[adapt]") {
  using Layer = MoELayer<Expert<FeedForward, double>, SharedExpertGate<NoisyTopKGate<double>>>;
  Layer layer({.width = width,
               .expert = {.hidden = 9},
               .gate = {.shared = 1, .routed = {.experts = 4, .top_k = 2}},
               .seed = 3});
  randomize(layer, 5, 0.3);
  auto adapted = adapt(layer, LoraConfig{.rank = 2}, LoraGateConfig{.rank = 3}, Seed{1});
  const auto x = random_matrix(40, width, 1);
  Layer::Tape tape;
  decltype(adapted)::Tape adapted_tape;
  CHECK(relative_error(adapted.forward(x, adapted_tape, {.step = 1}),
                       layer.forward(x, tape, {.step = 1})) == 0);
  CHECK(relative_error(adapted.backward(x, adapted_tape), layer.backward(x, tape)) < 1e-13);
  for_each_parameter(adapted, [&](const std::string&, auto& p) {
    if (p.trained) p.value = random_matrix(p.value.rows(), p.value.cols(), 9, 0.2);
  });
  const auto plain = merged(adapted);
  CHECK(relative_error(plain.evaluate(x), adapted.evaluate(x)) < 1e-12);
  CHECK(relative_error(plain.evaluate(x), layer.evaluate(x)) > 1e-3);
  // The noise of the gate is that of the layer before.
  decltype(merged(adapted))::Tape plain_tape;
  adapted.forward(x, adapted_tape, {.step = 7});
  auto trained = merged(adapted);
  trained.forward(x, plain_tape, {.step = 7});
  CHECK(plain_tape.routing().expert == adapted_tape.routing().expert);
}

TEST_CASE("lora gate: backward without forward is refused", "[adapt]") {
  auto gate = adapted_gate<TopKGate<double>>({.rank = 2});
  const auto x = random_matrix(20, width, 1);
  LoraGate<TopKGate<double>>::Tape tape;
  Matrix<double> dx = Matrix<double>::Zero(20, width);
  const std::vector<double> dweight(40, 1);
  CHECK_THROWS_WITH(gate.backward(x, dweight, tape, dx),
                    Contains("LoraGate::backward without a forward pass on this tape"));
  gate.evaluate(x, tape);
  CHECK_THROWS_WITH(gate.backward(x, dweight, tape, dx),
                    Contains("LoraGate::backward without a forward pass on this tape"));
  CHECK_THROWS_WITH(gate.forward(random_matrix(3, width + 1, 1), tape, {.step = 0}),
                    Contains("x has 13 columns"));
  CHECK_THROWS_WITH(
      (LoraGate<TopKGate<double>>({.width = 4, .gate = config_of<TopKGate<double>>()}, 1)),
      Contains("LoraGate::Config.gate.width = 12, must be 0 or Config.width = 4"));
}

TEST_CASE("lora gate: a pass that is refused leaves the tape as it was", "[adapt]") {
  using Gate = TopKGate<double>;
  Gate::Config config = config_of<Gate>();
  config.capacity = 9;
  config.evaluation_capacity = 9;
  config.sequences = 2;
  const auto check = [&](auto gate) {
    randomize(gate, 7, 0.4);
    typename decltype(gate)::Tape tape;
    const auto x = random_matrix(20, width, 1);
    gate.forward(x, tape, {.step = 0});
    const std::vector<double> dweight(detail::to_size(tape.routing.slots()), 0.25);
    const auto gradients = [&] {
      zero_gradients(gate);
      Matrix<double> dx = Matrix<double>::Zero(20, width);
      gate.backward(x, dweight, tape, dx);
      Named all = gradients_of(gate);
      all["x"] = dx;
      return all;
    };
    const Named expected = gradients();
    const auto refused = [&](Index rows, Index columns, const Pass& pass,
                             const std::string& message, bool evaluate = true) {
      const auto other = random_matrix(rows, columns, 2);
      CHECK_THROWS_WITH(gate.forward(other, tape, pass), Contains(message));
      if (evaluate) {
        const EvaluationPass served{.valid = pass.valid, .sequences = pass.sequences};
        CHECK_THROWS_WITH(gate.evaluate(other, tape, served), Contains(message));
      }
      REQUIRE(tape.trained);
      for (const auto& [name, gradient] : gradients()) {
        INFO(name);
        CHECK(same_bits(gradient, expected.at(name)));
      }
    };
    refused(20, width + 1, {.step = 1}, "x has 13 columns");
    refused(21, width, {.step = 1}, "not a multiple of Config.sequences = 2");
    refused(20, width, {.step = 1, .sequences = 3}, "not a multiple of Pass.sequences = 3");
    refused(20, width, {.step = 1, .sequences = -1}, "Pass.sequences = -1");
    const std::vector<std::uint8_t> valid(19, 1);
    refused(20, width, {.step = 1, .valid = valid}, "Pass.valid has 19 entries");
    refused(20, width, {.step = 1, .loss_scale = -1}, "Pass.loss_scale = -1", false);
    const std::vector<double> noise(3, 0);
    refused(20, width, {.step = 1, .noise = noise}, "Pass.noise has 3 numbers", false);
  };
  check(LoraGate<Gate>({.gate = config, .lora = {.rank = 2}}, 3));
  // The checks of the gate inside are made by the one around it too.
  check(SharedExpertGate<LoraGate<Gate>>(
      {.width = width, .routed = {.gate = config, .lora = {.rank = 2}}}, 3));
}
