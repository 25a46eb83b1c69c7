#include "moe/optim/adam.hpp"

#include "../support.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;
using test::random_matrix;

TEST_CASE("adam: two updates worked by hand", "[optim][adam]") {
  Linear<double> module({.inputs = 1, .outputs = 1, .bias = false}, 0);
  double& w = module.weight.value(0, 0);
  double& g = module.weight.gradient()(0, 0);
  w = 1;
  Adam<double> adam({.beta1 = 0.5, .beta2 = 0.75, .epsilon = 0.5, .weight_decay = 0.25});
  // m = 1, v = 1, m̂ = 2, v̂ = 4: w = 1·(1 - 0.025) - 0.1·2/2.5
  g = 2;
  adam.update(module, 0.1);
  CHECK_THAT(w, Catch::Matchers::WithinAbs(0.895, 1e-14));
  // m = 0.5 - 0.5 = 0, v = 0.75 + 0.25 = 1: only the decay is left.
  g = -1;
  adam.update(module, 0.1);
  CHECK_THAT(w, Catch::Matchers::WithinAbs(0.872625, 1e-14));
  // m = 0.5·3, v = 0.75 + 2.25 = 3, m̂ = 1.5/0.875, v̂ = 3/0.578125.
  g = 3;
  adam.update(module, 0.1);
  const double moved = 0.1 * (1.5 / 0.875) / (std::sqrt(3 / 0.578125) + 0.5);
  CHECK_THAT(w, Catch::Matchers::WithinAbs(0.872625 * 0.975 - moved, 1e-14));
}

TEMPLATE_TEST_CASE("adam: the first update moves by the learning rate, however small the gradient",
                   "[optim][adam]", float, double) {
  Linear<TestType> module({.inputs = 37, .outputs = 1, .bias = false}, 0);
  for (Index i = 0; i < 37; ++i) {
    const double size = std::pow(10.0, static_cast<double>(-i % 4));
    module.weight.gradient()(i, 0) = static_cast<TestType>(i % 2 ? size : -size);
  }
  module.weight.value.setZero();
  Adam<TestType> adam({.epsilon = 1e-12});
  adam.update(module, 0.01);
  for (Index i = 0; i < 37; ++i) {
    CHECK_THAT(static_cast<double>(module.weight.value(i, 0)),
               Catch::Matchers::WithinAbs(i % 2 ? -0.01 : 0.01, 1e-7));
  }
}

TEMPLATE_TEST_CASE("adam: follows the formula over many updates", "[optim][adam]", float, double) {
  Linear<TestType> module({.inputs = 5, .outputs = 7}, 1);
  Adam<TestType> adam({.weight_decay = 0.1});
  Matrix<double> w = module.weight.value.template cast<double>();
  Matrix<double> m = Matrix<double>::Zero(5, 7);
  Matrix<double> v = m;
  for (int t = 1; t <= 50; ++t) {
    module.weight.gradient() = random_matrix<TestType>(5, 7, static_cast<std::uint64_t>(t));
    const Matrix<double> g = module.weight.gradient().template cast<double>();
    m = 0.9 * m + 0.1 * g;
    v = 0.999 * v + 0.001 * g.cwiseAbs2();
    const Matrix<double> m_hat = m / (1 - std::pow(0.9, t));
    const Matrix<double> v_hat = v / (1 - std::pow(0.999, t));
    w = (1 - 0.01 * 0.1) * w - 0.01 * m_hat.cwiseQuotient((v_hat.array().sqrt() + 1e-8).matrix());
    adam.update(module, 0.01);
  }
  CHECK(test::relative_error(module.weight.value.template cast<double>(), w) <
        test::tolerance<TestType>);
}

TEST_CASE("adam: NaN reaches its own parameter only", "[optim][adam]") {
  Linear<float> module({.inputs = 1, .outputs = 40}, 1);
  module.weight.gradient()(0, 21) = std::numeric_limits<float>::quiet_NaN();
  Adam<float> adam;
  adam.update(module, 0.1);
  for (Index i = 0; i < 40; ++i) CHECK(std::isnan(module.weight.value(0, i)) == (i == 21));
}

TEST_CASE("adam: what is wrong is named", "[optim][adam]") {
  CHECK_THROWS_WITH(Adam<float>({.beta1 = 1}), "moe: Adam::Config.beta1 = 1, must be in [0, 1)");
  CHECK_THROWS_WITH(Adam<float>({.beta2 = -1}), "moe: Adam::Config.beta2 = -1, must be in [0, 1)");
  CHECK_THROWS_WITH(Adam<float>({.epsilon = 0}),
                    "moe: Adam::Config.epsilon = 0, must be finite and above 0");
}

TEST_CASE("adam: lazy, the bias is corrected by a parameter's own updates", "[optim][adam][lazy]") {
  // β1 = β2 = ½ and a gradient of 1: at its own update t both moments over their corrections are 1.
  std::vector<Parameter<double>> experts(2, Parameter<double>(1, 1));
  detail::track_gradients(experts);
  Adam<double> adam({.beta1 = 0.5, .beta2 = 0.5, .epsilon = 1e-12, .updates = Updates::lazy});
  for (int t = 1; t <= 6; ++t) {
    zero_gradients(experts, Updates::lazy);
    auto& routed = experts[t % 3 == 0 ? 1 : 0];
    detail::accumulate(routed);
    routed.gradient()(0, 0) = 1;
    adam.update(experts, 0.25);
  }
  CHECK_THAT(experts[0].value(0, 0), Catch::Matchers::WithinAbs(-4 * 0.25, 1e-11));
  CHECK_THAT(experts[1].value(0, 0), Catch::Matchers::WithinAbs(-2 * 0.25, 1e-11));
}
