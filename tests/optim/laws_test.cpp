#include "laws.hpp"

#include <limits>

#include "../allocation.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;
using namespace moe::test;

TEMPLATE_LIST_TEST_CASE("optimizers: no gradient, no move", "[optim][laws]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Linear<Scalar> module({.inputs = 9, .outputs = 5}, 1);
  const Matrix<Scalar> before = module.weight.value;
  auto optimizer = TestType::make();
  optimizer.update(module, 0.1);
  CHECK(same_bits(module.weight.value, before));
}

TEMPLATE_LIST_TEST_CASE("optimizers: weight decay is decoupled from the gradient", "[optim][laws]",
                        test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  std::vector<Parameter<Scalar>> decayed(1, test::scattered_parameter<Scalar>(5, 7, 1));
  std::vector<Parameter<Scalar>> plain = decayed;
  const Matrix<Scalar> before = plain[0].value;
  for (auto* module : {&decayed, &plain}) {
    (*module)[0].gradient() = test::scattered<Scalar>(5, 7, 2);
    auto optimizer = TestType::make({.weight_decay = module == &decayed ? 0.5 : 0.0});
    optimizer.update(*module, 0.125);
  }
  const Matrix<Scalar> expected = plain[0].value - Scalar{0.0625} * before;
  CHECK(test::relative_error(decayed[0].value, expected) < test::tolerance<Scalar>);
}

TEMPLATE_LIST_TEST_CASE("optimizers: a NaN stays in its own parameter", "[optim][laws]",
                        test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Linear<Scalar> module({.inputs = 7, .outputs = 13}, 1);
  module.weight.gradient()(2, 11) = std::numeric_limits<Scalar>::quiet_NaN();
  module.bias.gradient().setOnes();
  auto optimizer = TestType::make();
  optimizer.update(module, 0.1);
  CHECK(std::isnan(module.weight.value(2, 11)));
  CHECK(module.bias.value.array().isFinite().all());
}

TEMPLATE_LIST_TEST_CASE("optimizers: the same bits on any number of threads", "[optim][laws]",
                        test::Optimizers) {
  const auto updated = [](int threads) {
    const test::Threads scope(threads);
    Several<typename TestType::Scalar> module;
    auto optimizer = TestType::make({.weight_decay = 0.01});
    for (int step = 0; step < 3; ++step) optimizer.update(module, 0.1);
    return module;
  };
  const auto expected = updated(1);
  for (const int threads : {2, 3, 8}) CHECK(same_values(updated(threads), expected));
}

TEMPLATE_LIST_TEST_CASE("optimizers: a parameter fares alike alone and among others",
                        "[optim][laws]", test::Optimizers) {
  Several<typename TestType::Scalar> module;
  auto optimizer = TestType::make();
  optimizer.update(module, 0.1);
  Several<typename TestType::Scalar> alone;
  for (auto& parameter : alone.parts) {
    auto own = TestType::make();
    own.update(parameter, 0.1);
  }
  CHECK(same_values(alone, module));
}

TEMPLATE_LIST_TEST_CASE("optimizers: an update takes no memory after the first", "[optim][laws]",
                        test::Optimizers) {
  for (const int threads : {1, 3}) {
    const test::Threads scope(threads);
    Several<typename TestType::Scalar> module;
    auto optimizer = TestType::make();
    optimizer.update(module, 0.1);
    CHECK(test::allocations_in([&] { optimizer.update(module, 0.1); }) == 0);
  }
}

TEMPLATE_LIST_TEST_CASE("optimizers: go on from what was saved", "[optim][laws]",
                        test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Several<Scalar> whole;
  auto optimizer = TestType::make({.weight_decay = 0.01});
  for (int step = 0; step < 2; ++step) optimizer.update(whole, 0.1);
  const test::SavedState<Scalar> saved(optimizer, whole);
  CHECK(saved.matrices.empty() != TestType::remembers);
  if (saved.numbers.contains("steps")) CHECK(saved.numbers.at("steps") == std::vector<Index>{2});

  Several<Scalar> resumed = whole;
  auto resumed_optimizer = TestType::make({.weight_decay = 0.01});
  saved.restore(resumed_optimizer, resumed);
  optimizer.update(whole, 0.1);
  resumed_optimizer.update(resumed, 0.1);
  CHECK(same_values(resumed, whole));
}

TEMPLATE_LIST_TEST_CASE("optimizers: parameters without elements", "[optim][laws]",
                        test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  std::vector<Parameter<Scalar>> parts;
  for (const auto& [rows, columns] :
       {std::pair<Index, Index>{0, 0}, {0, 5}, {2, 3}, {5, 0}, {1, 1}}) {
    parts.emplace_back(rows, columns);
    parts.back().gradient().setOnes();
  }
  auto optimizer = TestType::make();
  optimizer.update(parts, 0.25);
  optimizer.update(parts, 0.25);
  const auto expected = static_cast<Scalar>(-0.25 * TestType::two_moves);
  CHECK(parts[2].value.isConstant(expected, Scalar{1e-6f}));
  CHECK(parts[4].value.isConstant(expected, Scalar{1e-6f}));
  for (const auto& [name, matrix] : test::SavedState<Scalar>(optimizer, parts).matrices) {
    INFO(name);
    CHECK(matrix.allFinite());
  }

  std::vector<Parameter<Scalar>> none(1);
  auto idle = TestType::make();
  CHECK_NOTHROW(idle.update(none, 0.1));
}

TEMPLATE_LIST_TEST_CASE("optimizers: a parameter that is not trained stays", "[optim][laws]",
                        test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Linear<Scalar> module({.inputs = 3, .outputs = 2}, 1);
  const Linear<Scalar> before = module;
  module.weight.trained = false;
  module.weight.gradient().setOnes();
  module.bias.gradient().setOnes();
  auto optimizer = TestType::make({.weight_decay = 0.5});
  optimizer.update(module, 0.1);
  CHECK(same_bits(module.weight.value, before.weight.value));
  CHECK((module.bias.value.array() < before.bias.value.array()).all());
}

TEMPLATE_LIST_TEST_CASE(
    "optimizers: of a parameter nothing is remembered until it is trained, and then as of a new "
    "one",
    "[optim][laws]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  const auto gradients = [](Linear<Scalar>& module, int seed) {
    module.weight.gradient() = test::scattered<Scalar>(3, 2, seed);
    module.bias.gradient() = test::scattered<Scalar>(1, 2, seed + 1);
  };
  const auto remembered = [](auto& optimizer, const auto& module) {
    Index weight = 0;
    Index bias = 0;
    for (const auto& [name, matrix] : test::SavedState<Scalar>(optimizer, module).matrices) {
      (name.ends_with("weight") ? weight : bias) += matrix.size();
    }
    return std::pair(weight, bias);
  };
  Linear<Scalar> module({.inputs = 3, .outputs = 2}, 1);
  module.weight.trained = false;
  auto optimizer = TestType::make({.weight_decay = 0.01});
  for (int step = 0; step < 3; ++step) {
    gradients(module, step);
    optimizer.update(module, 0.1);
    CHECK(remembered(optimizer, module).first == 0);
    CHECK((remembered(optimizer, module).second > 0) == TestType::remembers);
  }

  // Thawed, its next two updates are the first two of another optimizer.
  Linear<Scalar> fresh = module;
  auto fresh_optimizer = TestType::make({.weight_decay = 0.01});
  module.weight.trained = true;
  fresh.weight.trained = true;
  for (int step = 3; step < 5; ++step) {
    gradients(module, step);
    gradients(fresh, step);
    optimizer.update(module, 0.1);
    fresh_optimizer.update(fresh, 0.1);
  }
  CHECK(same_bits(module.weight.value, fresh.weight.value));
  CHECK((remembered(optimizer, module).first > 0) == TestType::remembers);

  // Frozen once more, what is remembered of it stays.
  const test::SavedState<Scalar> before(optimizer, module);
  module.weight.trained = false;
  gradients(module, 5);
  optimizer.update(module, 0.1);
  for (const auto& [name, matrix] : test::SavedState<Scalar>(optimizer, module).matrices) {
    INFO(name);
    CHECK(same_bits(matrix, before.matrices.at(name)) == name.ends_with("weight"));
  }
}

TEMPLATE_LIST_TEST_CASE("optimizers: tell the shapes of what they do not remember yet",
                        "[optim][laws]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Linear<Scalar> module({.inputs = 3, .outputs = 2}, 1);
  module.weight.trained = false;
  module.bias.trained = false;
  auto optimizer = TestType::make();
  optimizer.for_each_state(
      module, [&](const std::string& name, auto&& state, const auto&... shape) {
        INFO(name);
        if constexpr (sizeof...(shape) == 1) {
          const StateShape due = (shape, ...);
          CHECK(state.size() == 0);
          CHECK(due.rows == (name == "row_means.weight" || name == "first_moment.weight" ||
                                     name == "second_moment.weight" || name == "velocity.weight"
                                 ? 3
                                 : 1));
          CHECK(due.columns == (name.starts_with("row_means") ? 1 : 2));
        } else {
          CHECK((name == "steps" || name == "updates"));
        }
      });
}

TEMPLATE_LIST_TEST_CASE("optimizers: what is wrong is named and changes nothing", "[optim][laws]",
                        test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  const std::string name = TestType::name;
  CHECK_THROWS_WITH(TestType::make({.weight_decay = -1}),
                    "moe: " + name + "::Config.weight_decay = -1, must be finite and at least 0");
  CHECK_THROWS_AS(TestType::make({.weight_decay = std::numeric_limits<double>::infinity()}),
                  std::invalid_argument);

  Linear<Scalar> module({.inputs = 3, .outputs = 2}, 1);
  module.weight.gradient().setOnes();
  auto optimizer = TestType::make();
  optimizer.update(module, 0.1);
  const Linear<Scalar> before = module;
  CHECK_THROWS_WITH(optimizer.update(module, -1),
                    "moe: " + name + "::update: learning_rate = -1, must be finite and at least 0");
  CHECK_THROWS_AS(optimizer.update(module, std::nan("")), std::invalid_argument);
  CHECK_THROWS_AS(optimizer.update(module, std::numeric_limits<double>::infinity()),
                  std::invalid_argument);
  module.bias.gradient() = Matrix<Scalar>::Ones(1, 5);
  CHECK_THROWS_WITH(optimizer.update(module, 0.1), "moe: bias is 1 x 2, its gradient 1 x 5");
  module.bias.gradient() = Matrix<Scalar>::Zero(1, 2);
  CHECK(same_values(module, before));

  if (TestType::remembers) {
    Linear<Scalar> other({.inputs = 3, .outputs = 4}, 1);
    CHECK_THROWS_WITH(optimizer.update(other, 0.1),
                      "moe: " + name + ": weight is 3 x 4, was 3 x 2 at the first update");
    Linear<Scalar> less({.inputs = 3, .outputs = 2, .bias = false}, 1);
    less.weight.gradient().setOnes();
    const Matrix<Scalar> untouched = less.weight.value;
    CHECK_THROWS_WITH(optimizer.update(less, 0.1),
                      "moe: " + name + ": the module has 1 parameters, had 2 at the first update");
    CHECK(same_bits(less.weight.value, untouched));
  }

  // None of the failures counted as an update.
  Linear<Scalar> twin({.inputs = 3, .outputs = 2}, 1);
  twin.weight.gradient().setOnes();
  auto unharmed = TestType::make();
  unharmed.update(twin, 0.1);
  unharmed.update(twin, 0.1);
  optimizer.update(module, 0.1);
  CHECK(same_bits(module.weight.value, twin.weight.value));
}

TEMPLATE_LIST_TEST_CASE("optimizers: a value of another shape than its gradient is refused",
                        "[optim][laws]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Linear<Scalar> module({.inputs = 2, .outputs = 3, .bias = false}, 0);
  module.weight.value = Matrix<Scalar>::Ones(5, 3);  // a checkpoint of another model
  auto optimizer = TestType::make();
  CHECK_THROWS_WITH(optimizer.update(module, 0.1), "moe: weight is 5 x 3, its gradient 2 x 3");
  CHECK(module.weight.value == Matrix<Scalar>::Ones(5, 3));

  // Nor does it count as an update.
  module.weight.gradient() = Matrix<Scalar>::Ones(5, 3);
  optimizer.update(module, 0.1);
  CHECK_THAT(static_cast<double>(module.weight.value(4, 2)), Catch::Matchers::WithinAbs(0.9, 1e-6));
}

TEMPLATE_LIST_TEST_CASE("optimizers: lazy, an idle parameter stays as it is", "[optim][laws][lazy]",
                        test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Mixture<Scalar> before;
  auto once = test::trained<TestType>(Updates::lazy, to_some, 1);
  auto lazy = test::trained<TestType>(Updates::lazy, to_some);
  CHECK(same_bits(lazy[1].value, before[1].value));
  CHECK_FALSE(same_bits(lazy[2].value, before[2].value));
  CHECK(same_bits(lazy[2].value, once[2].value));
  CHECK_FALSE(same_bits(lazy[3].value, before[3].value));
  // Where a dense update decays it.
  auto dense = test::trained<TestType>(Updates::dense, to_some);
  CHECK_FALSE(same_bits(dense[1].value, before[1].value));
  CHECK_FALSE(same_bits(dense[2].value, lazy[2].value));
}

TEMPLATE_LIST_TEST_CASE("optimizers: lazy is dense where nothing is idle", "[optim][laws][lazy]",
                        test::Optimizers) {
  CHECK(same_values(test::trained<TestType>(Updates::lazy, to_all),
                    test::trained<TestType>(Updates::dense, to_all)));
}

TEMPLATE_LIST_TEST_CASE("optimizers: what was zeroed lazily is zero to a dense update",
                        "[optim][laws][lazy]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Mixture<Scalar> lazily;
  Mixture<Scalar> densely;
  auto first = TestType::make({.weight_decay = 0.01});
  auto second = TestType::make({.weight_decay = 0.01});
  for (Index t = 0; t < 4; ++t) {
    zero_gradients(lazily, Updates::lazy);
    zero_gradients(densely);
    for (auto* mixture : {&lazily, &densely}) mixture->backward(t, to_some);
    const double norm = gradient_norm(densely);
    CHECK(gradient_norm(lazily) == norm);
    CHECK(gradient_norm(lazily, Updates::lazy) == norm);
    if (t % 2 == 1) {
      clip_gradients(lazily, 1.0);
      clip_gradients(densely, 1.0);
    }
    first.update(lazily, 0.1);
    second.update(densely, 0.1);
  }
  CHECK(same_values(lazily, densely));
}

TEMPLATE_LIST_TEST_CASE("optimizers: lazy is dense of the updates at which there were tokens",
                        "[optim][laws][lazy]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  Mixture<Scalar> mixture;
  auto optimizer = TestType::make({.weight_decay = 0.01, .updates = Updates::lazy});
  Mixture<Scalar> expected;
  std::vector own(mixture.experts.size(), TestType::make({.weight_decay = 0.01}));
  auto of_gate = TestType::make({.weight_decay = 0.01});
  for (Index t = 0; t < 6; ++t) {
    const double learning_rate = 0.1 / static_cast<double>(t + 1);
    zero_gradients(mixture, Updates::lazy);
    mixture.backward(t, to_some);
    optimizer.update(mixture, learning_rate);
    zero_gradients(expected);
    expected.backward(t, to_some);
    of_gate.update(expected.gate, learning_rate);
    for (Index e = 0; e < expected.size(); ++e) {
      if (to_some(e, t)) own[detail::to_size(e)].update(expected[e], learning_rate);
    }
  }
  CHECK(same_values(mixture, expected));
}

TEMPLATE_LIST_TEST_CASE("optimizers: gradients by hand, a dense update misses none",
                        "[optim][laws][lazy]", test::Optimizers) {
  using Scalar = typename TestType::Scalar;
  for (const Updates updates : {Updates::dense, Updates::lazy}) {
    Mixture<Scalar> before;
    Mixture<Scalar> mixture;
    auto optimizer = TestType::make({.weight_decay = 0.01, .updates = updates});
    mixture.gate.gradient().setOnes();
    mixture[5].gradient().setOnes();
    optimizer.update(mixture, 0.1);
    // Far more than the decay.
    CHECK((before.gate.value - mixture.gate.value).minCoeff() > Scalar(0.05));
    // A lazy one misses them only where somebody keeps track.
    if (updates == Updates::dense) {
      CHECK((before[5].value - mixture[5].value).minCoeff() > Scalar(0.05));
    } else {
      CHECK(same_bits(before[5].value, mixture[5].value));
    }
  }
}

TEMPLATE_LIST_TEST_CASE("optimizers: lazy, the same bits on any number of threads",
                        "[optim][laws][lazy]", test::Optimizers) {
  const auto expected = test::trained<TestType>(Updates::lazy, to_some);
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    CHECK(same_values(test::trained<TestType>(Updates::lazy, to_some), expected));
  }
}

TEMPLATE_LIST_TEST_CASE("optimizers: lazy, an update takes no memory after the first",
                        "[optim][laws][lazy]", test::Optimizers) {
  for (const int threads : {1, 3}) {
    const test::Threads scope(threads);
    Mixture<typename TestType::Scalar> mixture;
    auto optimizer = TestType::make({.weight_decay = 0.01, .updates = Updates::lazy});
    const auto update = [&] {
      clip_gradients(mixture, 1.0, Updates::lazy);
      optimizer.update(mixture, 0.1);
      zero_gradients(mixture, Updates::lazy);
    };
    mixture.backward(0, to_some);
    update();
    for (Index t = 1; t < 4; ++t) {
      mixture.backward(t, to_some);
      CHECK(test::allocations_in(update) == 0);
    }
  }
}
