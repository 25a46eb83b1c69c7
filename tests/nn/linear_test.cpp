#include "moe/nn/linear.hpp"

#include "../support.hpp"

using namespace moe;

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

TEST_CASE("linear: what is wrong is named", "[nn][linear]") {
  CHECK_THROWS_AS(Linear<float>({.inputs = 0, .outputs = 1}, 0), std::invalid_argument);
  CHECK_THROWS_WITH(Linear<float>({.inputs = 0, .outputs = 1}, 0),
                    "moe: Linear::Config.inputs = 0, must be at least 1");
  CHECK_THROWS_WITH(Linear<float>({.inputs = 1, .outputs = -2}, 0),
                    "moe: Linear::Config.outputs = -2, must be at least 1");
}

TEST_CASE("linear: NaN stays in its row", "[nn][linear]") {
  const Linear<float> layer({.inputs = 3, .outputs = 2}, 0);
  Matrix<float> x = Matrix<float>::Ones(2, 3);
  x(0, 1) = std::numeric_limits<float>::quiet_NaN();
  const Matrix<float> y = layer.evaluate(x);
  CHECK(y.row(0).array().isNaN().all());
  CHECK_FALSE(y.row(1).array().isNaN().any());
}
