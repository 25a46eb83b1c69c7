#include "moe/weights/narrow_linear.hpp"

#include "formats.hpp"

using namespace moe;
using namespace moe::test;  // NOLINT(google-build-using-namespace)

TEMPLATE_TEST_CASE("narrow linear: the Linear with rounded weights", "[weights]",
                   MOE_TEST_FORMATS) {
  const bool bias = GENERATE(false, true);
  Linear<float> linear({.inputs = 50, .outputs = 70, .bias = bias}, 1);
  const NarrowLinear<TestType> served = narrow<TestType>(linear);
  CHECK(served.inputs() == 50);
  CHECK(served.outputs() == 70);
  linear.weight.value = served.weight().decoded();
  const auto x = random_matrix<float>(9, 50, 2);
  CHECK(is_served<TestType>(served.evaluate(x), linear.evaluate(x)));
  const auto dy = random_matrix<float>(9, 70, 3);
  Linear<float>::Tape tape;
  linear.forward(x, tape);
  typename NarrowLinear<TestType>::Tape narrow_tape;
  CHECK(relative_error(served.input_gradient(dy, narrow_tape), linear.backward(dy, tape)) < 1e-6);
}

TEST_CASE("narrow linear: what it refuses", "[weights]") {
  using Catch::Matchers::Contains;
  Linear<float> linear({.inputs = 5, .outputs = 7}, 1);
  const NarrowLinear<Int8> served = narrow<Int8>(linear, {.activations = Activations::int8});
  CHECK_THROWS_WITH(served.evaluate(Matrix<float>(2, 6)),
                    Contains("NarrowLinear: x has 6 columns, the layer has 5 inputs"));
  NarrowLinear<Int8>::Tape tape;
  CHECK_THROWS_WITH(served.input_gradient(Matrix<float>(2, 6), tape),
                    Contains("dy has 6 columns, the layer has 7 outputs"));
  CHECK_THROWS_WITH(narrow<BFloat16>(linear, {.activations = Activations::int8}),
                    Contains("NarrowOptions.activations = int8, bfloat16 has float32 only"));
  CHECK_THROWS_WITH(narrow<Int4>(linear, {.activations = static_cast<Activations>(7)}),
                    Contains("NarrowOptions.activations = 7, int4 has float32 and int8"));
  linear.weight.value(3, 2) = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH(narrow<Int8>(linear), Contains("weight(3, 2) = inf"));
  CHECK(served.evaluate(Matrix<float>(0, 5)).rows() == 0);
  served.evaluate(Matrix<float>::Ones(2, 5), tape);
  CHECK_THROWS_WITH(served.evaluate(tape.y.leftCols(5), tape), Contains("x overlaps memory that"));
}
