#include "moe/nn/rms_norm.hpp"

#include <cmath>
#include <limits>

#include "../support.hpp"

using namespace moe;

TEST_CASE("rms norm: worked by hand", "[nn][rms_norm]") {
  // The mean square is (9 + 16 + 0 + 3)/4 = 7 and epsilon 2, so the scale is 1/3.
  RMSNorm<double> norm({.width = 4, .epsilon = 2});
  norm.gain.value << 3, 6, 1, 0;
  Matrix<double> x(1, 4);
  x << 3, -4, 0, std::sqrt(3.0);
  RMSNorm<double>::Tape tape;
  Matrix<double> y(1, 4);
  y << 3, -8, 0, 0;
  CHECK(test::relative_error(norm.forward(x, tape), y) < 1e-15);

  // n = (1, -4/3, 0, 1/√3), g = (3, 12, 1, 0), mean of g·n = (3 - 16)/4 = -13/4.
  Matrix<double> dy(1, 4);
  dy << 1, 2, 1, 5;
  Matrix<double> dx(1, 4);
  dx << (3 + 3.25) / 3, (12 - 13.0 / 3) / 3, 1.0 / 3, 3.25 / std::sqrt(3.0) / 3;
  CHECK(test::relative_error(norm.backward(dy, tape), dx) < 1e-15);
  Matrix<double> dgain(1, 4);
  dgain << 1, -8.0 / 3, 0, 5 / std::sqrt(3.0);
  CHECK(test::relative_error(norm.gain.gradient(), dgain) < 1e-15);
}

TEST_CASE("rms norm: agrees with PyTorch", "[nn][rms_norm]") {
  // x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight, in double, with PyTorch 1.13.
  RMSNorm<double> norm({.width = 3});
  norm.gain.value << 1, 2, -1;
  Matrix<double> x(2, 3), dy(2, 3);
  x << 0.5, -1.5, 2, 1e-3, 2e-3, -1e-3;
  dy << 1, -1, 0.5, 2, 0, 1;
  RMSNorm<double>::Tape tape;
  Matrix<double> y(2, 3), dx(2, 3), dgain(1, 3);
  y << 0.3396823263619916, -2.0380939581719497, -1.3587293054479663, 0.28867513459481287,
      1.1547005383792515, 0.28867513459481287;
  dx << 0.5487182071068123, -0.9667899685964538, -0.862268108830675, 553.2940079733913,
      -48.11252243246879, -264.6188733785784;
  dgain << 0.9170325955516173, 1.0190469790859749, 0.3906895181291703;
  CHECK(test::relative_error(norm.forward(x, tape), y) < 1e-14);
  CHECK(test::relative_error(norm.backward(dy, tape), dx) < 1e-14);
  CHECK(test::relative_error(norm.gain.gradient(), dgain) < 1e-14);
}

TEST_CASE("rms norm: a token of zeros stays zero and has a gradient", "[nn][rms_norm]") {
  RMSNorm<double> norm({.width = 3, .epsilon = 0.25});
  RMSNorm<double>::Tape tape;
  CHECK(norm.forward(Matrix<double>::Zero(1, 3), tape).isZero(0));
  CHECK(norm.backward(Matrix<double>::Ones(1, 3), tape) == Matrix<double>::Constant(1, 3, 2));
}

TEST_CASE("rms norm: NaN stays in its token", "[nn][rms_norm]") {
  const RMSNorm<float> norm({.width = 3});
  Matrix<float> x = Matrix<float>::Ones(2, 3);
  x(0, 1) = std::numeric_limits<float>::quiet_NaN();
  const Matrix<float> y = norm.evaluate(x);
  CHECK(y.row(0).array().isNaN().all());
  CHECK_FALSE(y.row(1).array().isNaN().any());
}

TEST_CASE("rms norm: what is wrong is named", "[nn][rms_norm]") {
  CHECK_THROWS_WITH(RMSNorm<float>({.width = 0}),
                    "moe: RMSNorm::Config.width = 0, must be at least 1");
  CHECK_THROWS_WITH(RMSNorm<float>({.width = 1, .epsilon = 0}),
                    "moe: RMSNorm::Config.epsilon = 0, must be finite and above 0");
  CHECK_THROWS_AS(RMSNorm<float>({.width = 1, .epsilon = 1e-60}), std::invalid_argument);
  const RMSNorm<float> norm({.width = 3});
  RMSNorm<float>::Tape tape;
  CHECK_THROWS_WITH(norm.forward(Matrix<float>::Ones(1, 2), tape),
                    "moe: RMSNorm: x has 2 columns, the norm's width is 3");
  CHECK_THROWS_WITH(norm.evaluate(Matrix<float>::Ones(1, 4)),
                    "moe: RMSNorm: x has 4 columns, the norm's width is 3");
}
