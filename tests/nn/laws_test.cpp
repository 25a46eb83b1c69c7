#include "laws.hpp"

#include <string>
#include <vector>

#include "../allocation.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// The gradient with respect to x, or nothing where x has none.
template <class Law>
Matrix<typename Law::Scalar> backward(typename Law::Module& module,
                                      const MatrixRef<typename Law::Scalar>& dy,
                                      typename Law::Tape& tape) {
  if constexpr (has_dx<Law>) {
    return module.backward(dy, tape);
  } else {
    module.backward(dy, tape);
    return {};
  }
}

/// What a pass forward and backward by a module of its own gives.
template <class Law>
struct Result {
  using Scalar = typename Law::Scalar;

  Result(const Shape& shape, const typename Law::Input& x, const Matrix<Scalar>& dy)
      : module(Law::make(shape)) {
    typename Law::Tape tape;
    y = Law::forward(module, x, tape);
    dx = backward<Law>(module, dy, tape);
    gradients = test::gradients_of<Scalar>(module);
  }

  typename Law::Module module;
  Matrix<Scalar> y, dx;
  std::map<std::string, Matrix<Scalar>> gradients;
};

template <class Law>
bool same_result(const Result<Law>& a, const Result<Law>& b) {
  return same_bits(a.y, b.y) && same_bits(a.dx, b.dx) && same_bits(a.gradients, b.gradients);
}

template <class Law>
Matrix<typename Law::Scalar> random_dy(const Shape& shape, std::uint64_t seed) {
  return random_matrix<typename Law::Scalar>(shape.rows, shape.outputs, seed);
}

constexpr Shape small{4, 3, 5};
constexpr Shape square{6, 5, 5};

}  // namespace

TEMPLATE_LIST_TEST_CASE("nn modules: gradients agree with differences", "[nn][laws]",
                        test::NNModulesInDouble) {
  for (const Shape& shape :
       {Shape{1, 1, 1}, {5, 3, 7}, {2, 17, 4}, {8, 3, 5}, {6, 2, 19}, {9, 4, 16}}) {
    for (const double scale : {0.1, 1.0, TestType::largest_scale}) {
      INFO(shape.rows << " x " << shape.inputs << " to " << shape.outputs << ", scale " << scale);
      auto module = TestType::make(shape);
      auto x = TestType::input(shape, 1, scale);
      if constexpr (!has_dx<TestType>) module.weight.value *= scale;
      const Matrix<double> dy = random_dy<TestType>(shape, 2);
      const auto loss = [&] {
        typename TestType::Tape other;
        return TestType::forward(module, x, other).cwiseProduct(dy).sum();
      };
      typename TestType::Tape tape;
      TestType::forward(module, x, tape);
      const Matrix<double> dx = backward<TestType>(module, dy, tape);
      if constexpr (has_dx<TestType>) {
        CHECK(test::relative_error(dx, test::difference_gradient(x, loss)) < 1e-7);
      }
      test::check_parameter_gradients(module, loss);
    }
  }
}

TEMPLATE_LIST_TEST_CASE("nn modules: gradients add up", "[nn][laws]", test::NNModules) {
  using Scalar = typename TestType::Scalar;
  auto module = TestType::make(small);
  const auto dy = random_dy<TestType>(small, 2);
  typename TestType::Tape tape;
  TestType::forward(module, TestType::input(small, 1), tape);
  const Matrix<Scalar> dx = backward<TestType>(module, dy, tape);
  const auto once = test::gradients_of<Scalar>(module);
  CHECK(same_bits(backward<TestType>(module, dy, tape), dx));
  for (const auto& [name, gradient] : test::gradients_of<Scalar>(module)) {
    INFO(name);
    CHECK(once.at(name).cwiseAbs().maxCoeff() > 0);
    CHECK(test::relative_error(gradient, Matrix<Scalar>(2 * once.at(name))) <
          test::tolerance<Scalar>);
  }
}

TEMPLATE_LIST_TEST_CASE("nn modules: the same bits from evaluate and on any number of threads",
                        "[nn][laws]", test::NNModules) {
  const Shape shape = TestType::large;
  const auto x = TestType::input(shape, 1);
  const auto dy = random_dy<TestType>(shape, 2);
  const auto on = [&](int threads) {
    const test::Threads scope(threads);
    return Result<TestType>(shape, x, dy);
  };
  const auto expected = on(1);
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    const Result<TestType> actual(shape, x, dy);
    CHECK(same_result(actual, expected));
    if (!TestType::evaluates_as_trained) continue;
    typename TestType::Tape tape;
    CHECK(same_bits(TestType::evaluate(actual.module, x, tape), expected.y));
  }
}

TEMPLATE_LIST_TEST_CASE("nn modules: several passes may be in flight, each on its tape",
                        "[nn][laws]", test::NNModules) {
  using Scalar = typename TestType::Scalar;
  // Of another shape, too.
  const Shape longer{2 * small.rows, small.inputs, small.outputs};
  const auto x = TestType::input(small, 1);
  const auto longer_x = TestType::input(longer, 2);
  const auto dy = random_dy<TestType>(small, 3);
  const auto longer_dy = random_dy<TestType>(longer, 4);
  const Result<TestType> first(small, x, dy);
  const Result<TestType> second(longer, longer_x, longer_dy);

  auto module = TestType::make(small);
  const auto& for_passes = module;  // which change nothing but their tapes
  typename TestType::Tape tape;
  typename TestType::Tape other;
  CHECK(same_bits(TestType::forward(for_passes, x, tape), first.y));
  CHECK(same_bits(TestType::forward(for_passes, longer_x, other), second.y));
  CHECK(same_bits(backward<TestType>(module, dy, tape), first.dx));
  CHECK(same_bits(test::gradients_of<Scalar>(module), first.gradients));
  CHECK(same_bits(backward<TestType>(module, longer_dy, other), second.dx));
  for (const auto& [name, gradient] : test::gradients_of<Scalar>(module)) {
    INFO(name);
    const Matrix<Scalar> sum = first.gradients.at(name) + second.gradients.at(name);
    CHECK(test::relative_error(gradient, sum) < test::tolerance<Scalar>);
  }

  // And a tape may be used again, whatever its last pass was.
  auto again = TestType::make(small);
  CHECK(same_bits(TestType::forward(again, x, other), first.y));
  CHECK(same_bits(backward<TestType>(again, dy, other), first.dx));
  CHECK(same_bits(test::gradients_of<Scalar>(again), first.gradients));
}

TEMPLATE_LIST_TEST_CASE("nn modules: no rows", "[nn][laws]", test::NNModules) {
  using Scalar = typename TestType::Scalar;
  const Shape none{0, 3, 5};
  auto module = TestType::make(none);
  typename TestType::Tape tape;
  const auto x = TestType::input(none, 1);
  CHECK(TestType::evaluate(module, x, tape).cols() == 5);
  const Matrix<Scalar> y = TestType::forward(module, x, tape);
  CHECK(y.rows() == 0);
  CHECK(y.cols() == 5);
  const Matrix<Scalar> dx = backward<TestType>(module, Matrix<Scalar>(0, 5), tape);
  if constexpr (has_dx<TestType>) {
    CHECK(dx.rows() == 0);
    CHECK(dx.cols() == x.cols());
  }
  CHECK(test::gradients_are_zero(module));
}

TEMPLATE_LIST_TEST_CASE("nn modules: a pass takes no memory after the first of its shape",
                        "[nn][laws]", test::NNModules) {
  for (const int threads : {1, 3}) {
    const test::Threads scope(threads);
    auto module = TestType::make(TestType::large);
    const auto x = TestType::input(TestType::large, 1);
    const auto dy = random_dy<TestType>(TestType::large, 2);
    typename TestType::Tape tape;
    typename TestType::Tape serving;
    [[maybe_unused]] auto state = [&] {
      if constexpr (requires { TestType::state(module, 0); }) {
        return TestType::state(module, TestType::large.rows);
      } else {
        return 0;
      }
    }();
    const auto pass = [&] {
      zero_gradients(module);
      if constexpr (requires { TestType::state(module, 0); }) {
        module.forward(x, state, tape);
        module.backward(dy, tape);
        module.evaluate(x, state, serving);
      } else {
        TestType::forward(module, x, tape);
        module.backward(dy, tape);
        TestType::evaluate(module, x, serving);
      }
    };
    pass();
    CHECK(test::allocations_in(pass) == 0);
  }
}

TEMPLATE_LIST_TEST_CASE("nn modules: a frozen parameter gets no gradient, the others theirs",
                        "[nn][laws]", test::NNModules) {
  const auto x = TestType::input(small, 1);
  const auto dy = random_dy<TestType>(small, 2);
  const Result<TestType> all(small, x, dy);
  std::vector<std::string> choices{""};  // every parameter
  for (const auto& [name, gradient] : all.gradients) choices.push_back(name);
  for (const std::string& frozen : choices) {
    INFO("frozen: " << frozen);
    auto module = TestType::make(small);
    for_each_parameter(module, [&](const std::string& name, auto& parameter) {
      parameter.trained = !frozen.empty() && name != frozen;
    });
    typename TestType::Tape tape;
    TestType::forward(module, x, tape);
    CHECK(same_bits(backward<TestType>(module, dy, tape), all.dx));
    for_each_parameter(std::as_const(module), [&](const std::string& name, const auto& parameter) {
      INFO(name);
      if (parameter.trained) {
        CHECK(same_bits(parameter.gradient(), all.gradients.at(name)));
      } else {
        CHECK(parameter.stored.memory.size() == 0);
      }
    });
  }
}

TEMPLATE_LIST_TEST_CASE("nn modules: a wrong width is named and changes nothing", "[nn][laws]",
                        test::NNModules) {
  using Scalar = typename TestType::Scalar;
  const std::string name = TestType::name;
  auto module = TestType::make(small);
  typename TestType::Tape tape;
  TestType::forward(module, TestType::input(small, 1), tape);
  const Matrix<Scalar> y = tape.y;
  if constexpr (requires { module.config().inputs; }) {
    CHECK_THROWS_WITH(TestType::forward(module, TestType::input({7, 2, 5}, 1), tape),
                      "moe: " + name + ": x has 2 columns, the layer has 3 inputs");
    CHECK_THROWS_WITH(TestType::evaluate(module, TestType::input({7, 2, 5}, 1), tape),
                      "moe: " + name + ": x has 2 columns, the layer has 3 inputs");
  }
  CHECK_THROWS_WITH(backward<TestType>(module, Matrix<Scalar>::Ones(6, 5), tape),
                    "moe: " + name + "::backward: dy has 6 rows, " + TestType::rows_were(4));
  CHECK_THROWS_WITH(
      backward<TestType>(module, Matrix<Scalar>::Ones(4, 2), tape),
      "moe: " + name + "::backward: dy has 2 columns, " + TestType::columns_were(small));
  CHECK(same_bits(tape.y, y));
  CHECK(test::gradients_are_zero(module));
}

TEMPLATE_LIST_TEST_CASE("nn modules: a tape that no forward pass of such a module left is refused",
                        "[nn][laws]", test::NNModules) {
  auto module = TestType::make(small);
  const Shape wide = TestType::other(small);
  const auto dy = random_dy<TestType>(small, 2);
  typename TestType::Tape tape;
  const auto check_refused = [&] {
    if constexpr (std::string_view(TestType::name) == "Dropout") {
      CHECK(is_refused([&] { backward<TestType>(module, dy, tape); }));
    } else {
      CHECK_THROWS_WITH(
          backward<TestType>(module, dy, tape),
          "moe: " + std::string(TestType::name) + "::backward without a forward pass on this tape");
    }
  };
  check_refused();
  TestType::forward(module, TestType::input(small, 1), tape);
  TestType::evaluate(module, TestType::input(small, 1), tape);
  check_refused();
  // Dropout is of any width and has no parameters, so each is such a module.
  if (std::string_view(TestType::name) != "Dropout") {
    const auto wider = TestType::make(wide);
    TestType::forward(wider, TestType::input(wide, 1), tape);
    if (TestType::knows_width) {
      check_refused();
    } else {
      CHECK(is_refused([&] { backward<TestType>(module, dy, tape); }));
    }
  }
  CHECK(test::gradients_are_zero(module));
}

TEMPLATE_LIST_TEST_CASE("nn modules: a tape's own output as input works or is refused",
                        "[nn][laws]", test::NNModulesOfMatrices) {
  using Scalar = typename TestType::Scalar;
  using Rows = MatrixRef<Scalar>;
  const std::string name = TestType::name;
  const auto refused = [&](const char* verb, const char* argument) {
    return "moe: " + name + "::" + verb + ": " + argument +
           " overlaps memory that this call writes to; pass a copy, or use another tape or "
           "another matrix for the result";
  };
  for (const Index rows : {6, 4, 2}) {  // all of it, and its last rows
    INFO(rows << " rows");
    auto module = TestType::make(square);
    typename TestType::Tape tape;
    TestType::forward(module, TestType::input(square, 1), tape);
    const Rows own = tape.y.bottomRows(rows);
    const Matrix<Scalar> copy = own;
    if (TestType::copies_x) {
      CHECK_THROWS_WITH(TestType::evaluate(module, own, tape), refused("evaluate", "x"));
      CHECK(same_bits(own, copy));
      typename TestType::Tape other;
      const Matrix<Scalar> expected = TestType::forward(module, copy, other);
      CHECK(same_bits(TestType::forward(module, own, tape), expected));
      const Matrix<Scalar> dx = module.backward(expected, other);
      CHECK(same_bits(module.backward(expected, tape), dx));
    } else {
      CHECK_THROWS_WITH(TestType::forward(module, own, tape), refused("forward", "x"));
      CHECK(same_bits(own, copy));
      Matrix<Scalar> actual;
      if (!is_refused([&] { actual = TestType::evaluate(module, own, tape); })) {
        CHECK(rows == 6);
        CHECK(same_bits(actual, copy));
      }
    }
  }
  auto module = TestType::make(square);
  typename TestType::Tape tape;
  TestType::forward(module, TestType::input(square, 1), tape);
  const Matrix<Scalar> y = tape.y;
  const Matrix<Scalar> dx = module.backward(y, tape);
  CHECK(same_bits(module.backward(tape.y, tape), dx));  // the gradient of half the squared norm
  CHECK_THROWS_WITH(module.backward(tape.dx, tape), refused("backward", "dy"));
  CHECK(same_bits(tape.dx, dx));
}
