#include "moe/optim/parameter_groups.hpp"

#include <limits>
#include <memory>

#include "../allocation.hpp"
#include "laws.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;
using Catch::Matchers::WithinAbs;
using namespace moe::test;

namespace {

/// A weight and a bias, both 1, of a module that is updated by hand.
Linear<double> two_ones() {
  Linear<double> module({.inputs = 1, .outputs = 1}, 0);
  module.weight.value.setOnes();
  module.bias.value.setOnes();
  return module;
}

void set_gradients(Linear<double>& module, double gradient) {
  module.weight.gradient().setConstant(gradient);
  module.bias.gradient().setConstant(gradient);
}

/// Half the learning rate for weights, no decay for biases.
ParameterGroup half_and_undecayed(std::string_view name) {
  if (name == "weight") return {.rate_factor = 0.5};
  return {.weight_decay = 0};
}

/// Of a Mixture: another rate for the gate, another decay for some experts and none at all for one.
ParameterGroup of_mixture(std::string_view name) {
  if (name == "gate") return {.rate_factor = 0.25, .weight_decay = 0};
  if (name == "experts.3") return {.rate_factor = 0};
  if (name.ends_with("4")) return {.rate_factor = 2, .weight_decay = 0.3};
  return {};
}

template <class Scalar>
Linear<Scalar> linear_of_ones() {
  Linear<Scalar> module({.inputs = 3, .outputs = 5}, 1);
  module.weight.gradient().setOnes();
  module.bias.gradient().setOnes();
  return module;
}

/// Somebody's parameter under the name "first" or "second".
template <int which>
struct Named {
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit(which == 0 ? "first" : "second", self.parameter);
  }
  Parameter<double>& parameter;
};

template <class Law, class Module>
void update_with(Module& module, double learning_rate, ParameterGroups groups) {
  auto optimizer = Law::make({.weight_decay = 0.1});
  optimizer.set_groups(std::move(groups));
  optimizer.update(module, learning_rate);
}

}  // namespace

TEST_CASE("parameter groups: sgd worked by hand", "[optim][groups]") {
  Linear<double> module = two_ones();
  SGD<double> sgd({.momentum = 0.5, .weight_decay = 0.25});
  sgd.set_groups(half_and_undecayed);
  set_gradients(module, 2);
  sgd.update(module, 0.2);  // v = 2
  CHECK_THAT(module.weight.value(0, 0), WithinAbs(1 - 0.1 * 0.25 - 0.1 * 2, 1e-14));
  CHECK_THAT(module.bias.value(0, 0), WithinAbs(1 - 0.2 * 2, 1e-14));
  set_gradients(module, -4);
  sgd.update(module, 0.4);  // v = -3
  CHECK_THAT(module.weight.value(0, 0), WithinAbs(0.775 * (1 - 0.2 * 0.25) + 0.2 * 3, 1e-14));
  CHECK_THAT(module.bias.value(0, 0), WithinAbs(0.6 + 0.4 * 3, 1e-14));
}

TEST_CASE("parameter groups: adam worked by hand", "[optim][groups]") {
  Linear<double> module = two_ones();
  Adam<double> adam({.beta1 = 0.5, .beta2 = 0.75, .epsilon = 0.5, .weight_decay = 0.25});
  adam.set_groups(half_and_undecayed);
  set_gradients(module, 2);
  adam.update(module, 0.2);  // m̂ = 2, v̂ = 4
  CHECK_THAT(module.weight.value(0, 0), WithinAbs(1 - 0.025 - 0.1 * 2 / 2.5, 1e-14));
  CHECK_THAT(module.bias.value(0, 0), WithinAbs(1 - 0.2 * 2 / 2.5, 1e-14));
  set_gradients(module, 3);
  adam.update(module, 0.2);  // m = 2, m̂ = 8/3; v = 3, v̂ = 3/(1 - 0.5625)
  const double move = (8.0 / 3) / (std::sqrt(3 / 0.4375) + 0.5);
  CHECK_THAT(module.weight.value(0, 0), WithinAbs(0.895 * 0.975 - 0.1 * move, 1e-14));
  CHECK_THAT(module.bias.value(0, 0), WithinAbs(0.84 - 0.2 * move, 1e-14));
}

TEST_CASE("parameter groups: factored adam worked by hand", "[optim][groups]") {
  Linear<double> module = two_ones();
  FactoredAdam<double> adam({.beta2 = 0.5, .epsilon = 0.5, .weight_decay = 0.25});
  adam.set_groups(half_and_undecayed);
  set_gradients(module, 2);
  adam.update(module, 0.2);  // v = 2, v̂ = 4
  CHECK_THAT(module.weight.value(0, 0), WithinAbs(1 - 0.025 - 0.1 * 2 / 2.5, 1e-14));
  CHECK_THAT(module.bias.value(0, 0), WithinAbs(1 - 0.2 * 2 / 2.5, 1e-14));
  set_gradients(module, -1);
  adam.update(module, 0.2);  // v = 1.5, v̂ = 2
  const double move = 1 / (std::sqrt(2.0) + 0.5);
  CHECK_THAT(module.weight.value(0, 0), WithinAbs(0.895 * 0.975 + 0.1 * move, 1e-14));
  CHECK_THAT(module.bias.value(0, 0), WithinAbs(0.84 + 0.2 * move, 1e-14));
}

TEMPLATE_LIST_TEST_CASE("parameter groups: a factor scales the learning rate, decay included",
                        "[optim][groups]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  auto plain = linear_of_ones<Scalar>();
  update_with<TestType>(plain, 0.1, {});
  auto scaled = linear_of_ones<Scalar>();
  update_with<TestType>(scaled, 0.2,
                        [](std::string_view) -> ParameterGroup { return {.rate_factor = 0.5}; });
  CHECK(same_values(scaled, plain));
  // Groups that say nothing change no bit.
  auto named = linear_of_ones<Scalar>();
  update_with<TestType>(named, 0.1, [](std::string_view) -> ParameterGroup { return {}; });
  CHECK(same_values(named, plain));
}

TEMPLATE_LIST_TEST_CASE("parameter groups: no decay on biases", "[optim][groups]",
                        test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  const Linear<Scalar> before({.inputs = 3, .outputs = 5}, 1);
  Linear<Scalar> module = before;
  auto optimizer = TestType::make({.weight_decay = 0.5});
  optimizer.set_groups([](std::string_view name) -> ParameterGroup {
    if (name.ends_with("bias")) return {.weight_decay = 0};
    return {};
  });
  optimizer.update(module, 0.125);  // by gradients of zero
  CHECK(same_bits(module.bias.value, before.bias.value));
  CHECK(same_bits(module.weight.value, Matrix<Scalar>(Scalar{0.9375} * before.weight.value)));
}

TEMPLATE_LIST_TEST_CASE("parameter groups: a factor of 0 leaves a parameter alone",
                        "[optim][groups]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  // Large enough to be cut, with values and gradients that arithmetic would not leave as they are.
  std::vector<Parameter<Scalar>> module(2, test::scattered_parameter<Scalar>(300, 500, 1));
  module[0].value(7, 7) = Scalar{-0.0f};
  module[0].gradient() = test::scattered<Scalar>(300, 500, 2);
  module[0].gradient()(7, 7) = Scalar{-1};
  module[0].gradient()(8, 8) = std::numeric_limits<Scalar>::quiet_NaN();
  module[1].gradient() = test::scattered<Scalar>(300, 500, 3);
  const std::vector<Parameter<Scalar>> before = module;
  auto optimizer = TestType::make({.weight_decay = 0.1});
  optimizer.set_groups([](std::string_view name) -> ParameterGroup {
    return {.rate_factor = name == "0" ? 0.0 : 1.0};
  });
  for (int step = 0; step < 3; ++step) optimizer.update(module, 0.1);
  CHECK(same_bits(module[0].value, before[0].value));
  CHECK_FALSE(same_bits(module[1].value, before[1].value));

  // Nothing of its gradients was remembered, and these were no updates of it.
  optimizer.set_groups({});
  Parameter<Scalar> alone = before[0];
  auto own = TestType::make({.weight_decay = 0.1});
  for (int step = 0; step < 2; ++step) {
    module[0].gradient() = test::scattered<Scalar>(300, 500, 4 + step);
    alone.gradient() = module[0].gradient();
    optimizer.update(module, 0.1);
    own.update(alone, 0.1);
  }
  CHECK(same_bits(module[0].value, alone.value));
}

TEMPLATE_LIST_TEST_CASE("parameter groups: names are looked up once a parameter and module",
                        "[optim][groups]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  auto module = linear_of_ones<Scalar>();
  std::vector<std::string> names;
  auto optimizer = TestType::make();
  optimizer.set_groups([&](std::string_view name) -> ParameterGroup {
    names.emplace_back(name);
    return {.rate_factor = name == "bias" ? 0.0 : 1.0};
  });
  CHECK(names.empty());
  optimizer.update(module, 0.1);
  CHECK(names == std::vector<std::string>{"weight", "bias"});
  CHECK(test::allocations_in([&] { optimizer.update(module, 0.1); }) == 0);
  CHECK(names.size() == 2);

  // Again where the parameters are others.
  auto moved = std::make_unique<Linear<Scalar>>(std::move(module));
  optimizer.update(*moved, 0.1);
  optimizer.update(*moved, 0.1);
  CHECK(names.size() == 4);
  // And where the groups are.
  optimizer.set_groups([&](std::string_view name) -> ParameterGroup {
    names.emplace_back(name);
    return {.rate_factor = name == "weight" ? 0.0 : 1.0};
  });
  const Matrix<Scalar> weight = moved->weight.value;
  optimizer.update(*moved, 0.1);
  CHECK(names.size() == 6);
  CHECK(same_bits(moved->weight.value, weight));
}

TEST_CASE("parameter groups: another module in the place of one is another", "[optim][groups]") {
  // Without momentum an optimizer remembers nothing that would tell them apart.
  Parameter<double> parameter(1, 1);
  parameter.gradient().setOnes();
  SGD<double> sgd;
  sgd.set_groups([](std::string_view name) -> ParameterGroup {
    return {.rate_factor = name == "first" ? 1.0 : 2.0};
  });
  Named<0> first{parameter};
  sgd.update(first, 1);
  CHECK(parameter.value(0, 0) == -1);
  Named<1> second{parameter};
  sgd.update(second, 1);
  CHECK(parameter.value(0, 0) == -3);
  std::vector<Parameter<double>> more(2, Parameter<double>(1, 1));
  more[1].gradient().setOnes();
  sgd.update(more, 1);
  CHECK(more[1].value(0, 0) == -2);
}

TEMPLATE_LIST_TEST_CASE("parameter groups: lazy is dense where nothing is idle",
                        "[optim][groups][lazy]", test::Optimizers) {
  const auto trained = [](Updates updates) {
    Mixture<typename TestType::Scalar> mixture;
    auto optimizer = TestType::make({.weight_decay = 0.01, .updates = updates});
    optimizer.set_groups(of_mixture);
    for (Index t = 0; t < 4; ++t) {
      zero_gradients(mixture, updates);
      mixture.backward(t, test::to_all);
      optimizer.update(mixture, 0.1);
    }
    return mixture;
  };
  CHECK(same_values(trained(Updates::lazy), trained(Updates::dense)));
}

TEMPLATE_LIST_TEST_CASE("parameter groups: lazy, each expert by its own group",
                        "[optim][groups][lazy]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Mixture<Scalar> mixture;
  auto optimizer = TestType::make({.weight_decay = 0.01, .updates = Updates::lazy});
  optimizer.set_groups(of_mixture);
  // A dense optimizer for each parameter, at its own learning rate and decay.
  Mixture<Scalar> expected;
  const auto own_of = [](const std::string& name) {
    return TestType::make({.weight_decay = of_mixture(name).weight_decay.value_or(0.01)});
  };
  auto of_gate = own_of("gate");
  std::vector<decltype(of_gate)> own;
  const auto name_of = [](Index e) { return "experts." + std::to_string(e); };
  for (Index e = 0; e < expected.size(); ++e) own.push_back(own_of(name_of(e)));
  for (Index t = 0; t < 6; ++t) {
    zero_gradients(mixture, Updates::lazy);
    mixture.backward(t, test::to_some);
    optimizer.update(mixture, 0.125);
    zero_gradients(expected);
    expected.backward(t, test::to_some);
    of_gate.update(expected.gate, 0.125 * of_mixture("gate").rate_factor);
    for (Index e = 0; e < expected.size(); ++e) {
      const double factor = of_mixture(name_of(e)).rate_factor;
      if (factor == 0 || !test::to_some(e, t)) continue;
      own[detail::to_size(e)].update(expected[e], 0.125 * factor);
    }
  }
  CHECK(same_values(mixture, expected));
}

TEMPLATE_LIST_TEST_CASE("parameter groups: are not saved, and there after loading",
                        "[optim][groups]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  const auto make = [](bool groups) {
    auto optimizer = TestType::make({.weight_decay = 0.1});
    if (groups) optimizer.set_groups(half_and_undecayed);
    return optimizer;
  };
  auto whole = linear_of_ones<Scalar>();
  auto optimizer = make(true);
  optimizer.update(whole, 0.1);
  const test::SavedState<Scalar> saved(optimizer, whole);
  auto without = make(false);
  const test::SavedState<Scalar> plain(without, whole);
  const auto names = [](const auto& map) {
    std::vector<std::string> keys;
    for (const auto& [name, value] : map) keys.push_back(name);
    return keys;
  };
  CHECK(names(saved.matrices) == names(plain.matrices));
  CHECK(names(saved.numbers) == names(plain.numbers));

  auto resumed = whole;
  auto resumed_optimizer = make(true);
  saved.restore(resumed_optimizer, resumed);
  optimizer.update(whole, 0.1);
  resumed_optimizer.update(resumed, 0.1);
  CHECK(same_values(resumed, whole));
}

TEMPLATE_LIST_TEST_CASE("parameter groups: what is wrong is named and changes nothing",
                        "[optim][groups]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  const std::string name = TestType::name;
  auto module = linear_of_ones<Scalar>();
  const auto before = module;
  auto optimizer = TestType::make();
  const auto of_bias = [&](const ParameterGroup& group) {
    optimizer.set_groups(
        [=](std::string_view parameter) { return parameter == "bias" ? group : ParameterGroup{}; });
    optimizer.update(module, 0.1);
  };
  const std::string start = "moe: " + name + "::update: the group of bias: ";
  CHECK_THROWS_WITH(of_bias({.rate_factor = -1}),
                    start + "rate_factor = -1, must be finite and at least 0");
  CHECK_THROWS_WITH(of_bias({.weight_decay = -0.5}),
                    start + "weight_decay = -0.5, must be finite and at least 0");
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {infinity, std::nan("")}) {
    CHECK_THROWS_AS(of_bias({.rate_factor = bad}), std::invalid_argument);
    CHECK_THROWS_AS(of_bias({.weight_decay = bad}), std::invalid_argument);
  }
  CHECK_THROWS_AS(optimizer.update(module, 0.1), std::invalid_argument);  // and again
  optimizer.set_groups([](std::string_view) -> ParameterGroup { return {.rate_factor = 1e300}; });
  CHECK_THROWS_WITH(optimizer.update(module, 1e10),
                    "moe: " + name +
                        "::update: learning_rate = 1e+10 times rate_factor = 1e+300, must be "
                        "finite");
  CHECK(same_values(module, before));

  // None of the failures counted as an update.
  optimizer.set_groups({});
  optimizer.update(module, 0.1);
  auto twin = before;
  auto unharmed = TestType::make();
  unharmed.update(twin, 0.1);
  CHECK(same_values(module, twin));
}
