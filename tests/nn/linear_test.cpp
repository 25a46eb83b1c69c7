#include "moe/nn/linear.hpp"

#include "../support.hpp"

using namespace moe;
using test::random_matrix;

TEST_CASE("linear: worked by hand", "[nn][linear]") {
  Linear<float> layer({.inputs = 2, .outputs = 3}, 0);
  layer.weight.value << 1, 2, 3, 4, 5, 6;
  layer.bias.value << 10, 20, 30;
  Matrix<float> x(1, 2);
  x << 1, -1;
  Linear<float>::Tape tape;
  Matrix<float> y(1, 3);
  y << 7, 17, 27;
  CHECK(layer.forward(x, tape) == y);

  Matrix<float> dy(1, 3);
  dy << 1, 0, 2;
  Matrix<float> dx(1, 2);
  dx << 7, 16;
  Matrix<float> dweight(2, 3);
  dweight << 1, 0, 2, -1, 0, -2;
  CHECK(layer.backward(dy, tape) == dx);
  CHECK(layer.weight.gradient() == dweight);
  CHECK(layer.bias.gradient() == dy);
  layer.backward(dy, tape);  // gradients add up
  CHECK(layer.weight.gradient() == 2 * dweight);
  CHECK(layer.bias.gradient() == 2 * dy);
}

TEST_CASE("linear: gradients agree with differences", "[nn][linear]") {
  const bool bias = GENERATE(true, false);
  const double scale = GENERATE(0.1, 1.0, 10.0);
  const auto [rows, inputs, outputs] = GENERATE(
      std::array<Index, 3>{1, 1, 1}, std::array<Index, 3>{5, 3, 7}, std::array<Index, 3>{2, 17, 4});
  Linear<double> layer({.inputs = inputs, .outputs = outputs, .bias = bias}, 3);
  Matrix<double> x = random_matrix(rows, inputs, 1, scale);
  const Matrix<double> dy = random_matrix(rows, outputs, 2);
  const auto loss = [&] { return layer.evaluate(x).cwiseProduct(dy).sum(); };

  Linear<double>::Tape tape;
  layer.forward(x, tape);
  const Matrix<double> dx = layer.backward(dy, tape);
  CHECK(test::relative_error(dx, test::difference_gradient(x, loss)) < 1e-7);
  test::check_parameter_gradients(layer, loss);
}

TEMPLATE_TEST_CASE("linear: the same bits from evaluate and on any number of threads",
                   "[nn][linear]", float, double) {
  const auto x = random_matrix<TestType>(203, 71, 1);
  const auto dy = random_matrix<TestType>(203, 130, 2);
  Matrix<TestType> y, dx, dweight, dbias;
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    Linear<TestType> layer({.inputs = 71, .outputs = 130}, 9);
    typename Linear<TestType>::Tape tape;
    layer.forward(x, tape);
    layer.backward(dy, tape);
    if (threads == 1) {
      y = tape.y;
      dx = tape.dx;
      dweight = layer.weight.gradient();
      dbias = layer.bias.gradient();
    }
    CHECK(test::same_bits(layer.evaluate(x), y));
    CHECK(test::same_bits(tape.y, y));
    CHECK(test::same_bits(tape.dx, dx));
    CHECK(test::same_bits(layer.weight.gradient(), dweight));
    CHECK(test::same_bits(layer.bias.gradient(), dbias));
  }
}

TEST_CASE("linear: starts uniform in 1/sqrt(inputs), from the seed", "[nn][linear]") {
  const Linear<float>::Config config{.inputs = 100, .outputs = 40};
  const Linear<float> layer(config, 1);
  CHECK(layer.weight.value.cwiseAbs().maxCoeff() <= 0.1f);
  CHECK(layer.weight.value.cwiseAbs().maxCoeff() > 0.099f);
  CHECK(layer.bias.value.cwiseAbs().maxCoeff() > 0.05f);
  CHECK(test::same_bits(Linear<float>(config, 1).weight.value, layer.weight.value));
  CHECK_FALSE(test::same_bits(Linear<float>(config, 2).weight.value, layer.weight.value));
}

TEST_CASE("linear: parameters", "[nn][linear]") {
  CHECK(parameter_count(Linear<float>({.inputs = 3, .outputs = 2}, 0)) == 8);
  CHECK(parameter_count(Linear<float>({.inputs = 3, .outputs = 2, .bias = false}, 0)) == 6);
}

TEST_CASE("linear: no rows", "[nn][linear]") {
  Linear<float> layer({.inputs = 3, .outputs = 2}, 0);
  Linear<float>::Tape tape;
  CHECK(layer.forward(Matrix<float>(0, 3), tape).rows() == 0);
  CHECK(layer.backward(Matrix<float>(0, 2), tape).cols() == 3);
  CHECK(layer.weight.gradient().isZero(0));
}

TEST_CASE("linear: what is wrong is named and changes nothing", "[nn][linear]") {
  CHECK_THROWS_AS(Linear<float>({.inputs = 0, .outputs = 1}, 0), std::invalid_argument);
  CHECK_THROWS_WITH(Linear<float>({.inputs = 0, .outputs = 1}, 0),
                    "moe: Linear::Config.inputs = 0, must be at least 1");
  CHECK_THROWS_WITH(Linear<float>({.inputs = 1, .outputs = -2}, 0),
                    "moe: Linear::Config.outputs = -2, must be at least 1");
  Linear<float> layer({.inputs = 3, .outputs = 2}, 0);
  Linear<float>::Tape tape;
  layer.forward(Matrix<float>::Ones(4, 3), tape);
  CHECK_THROWS_WITH(layer.forward(Matrix<float>::Ones(5, 2), tape),
                    "moe: Linear: x has 2 columns, the layer 3 inputs");
  CHECK(tape.y.rows() == 4);
  CHECK_THROWS_WITH(layer.backward(Matrix<float>::Ones(5, 2), tape),
                    "moe: Linear::backward: dy has 5 rows, x had 4");
  CHECK_THROWS_WITH(layer.backward(Matrix<float>::Ones(4, 3), tape),
                    "moe: Linear::backward: dy has 3 columns, the layer 2 outputs");
  CHECK(layer.weight.gradient().isZero(0));
}

TEST_CASE("linear: NaN stays in its row", "[nn][linear]") {
  const Linear<float> layer({.inputs = 3, .outputs = 2}, 0);
  Matrix<float> x = Matrix<float>::Ones(2, 3);
  x(0, 1) = std::numeric_limits<float>::quiet_NaN();
  const Matrix<float> y = layer.evaluate(x);
  CHECK(y.row(0).array().isNaN().all());
  CHECK_FALSE(y.row(1).array().isNaN().any());
}

TEST_CASE("linear: a tape that no forward pass of such a layer left is refused", "[nn][linear]") {
  Linear<double> linear({.inputs = 3, .outputs = 3}, 1);
  Linear<double> wide({.inputs = 5, .outputs = 3}, 1);
  Linear<double>::Tape tape;
  const Matrix<double> x = test::random_matrix(4, 3, 1);
  const char* const refused = "moe: Linear::backward without a forward pass on this tape";
  CHECK_THROWS_WITH(linear.backward(x, tape), refused);
  linear.forward(x, tape);
  linear.evaluate(x, tape);
  CHECK_THROWS_WITH(linear.backward(x, tape), refused);
  wide.forward(test::random_matrix(4, 5, 2), tape);
  CHECK_THROWS_WITH(linear.backward(x, tape), refused);
  CHECK(linear.weight.gradient().isZero(0));
}

TEST_CASE("linear: x may be the tape's y of the pass before, in forward", "[nn][linear]") {
  const Linear<double> linear({.inputs = 3, .outputs = 3}, 1);
  Linear<double>::Tape tape;
  linear.forward(test::random_matrix(4, 3, 1), tape);
  const Matrix<double> x = tape.y;
  CHECK_THROWS_WITH(linear.evaluate(tape.y, tape),
                    "moe: Linear::evaluate: x lies in this tape's own memory, which the pass "
                    "writes to; give it a copy, or a tape of its own");
  CHECK(test::same_bits(tape.y, x));
  CHECK(test::same_bits(linear.forward(tape.y, tape), linear.evaluate(x)));
  CHECK(test::same_bits(tape.x, x));
}
