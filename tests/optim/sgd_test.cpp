#include "moe/optim/sgd.hpp"

#include "../support.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;

namespace {

/// One weight, its gradient set by hand.
Linear<double> scalar_module(double value) {
  Linear<double> module({.inputs = 1, .outputs = 1, .bias = false}, 0);
  module.weight.value(0, 0) = value;
  return module;
}

}  // namespace

TEST_CASE("sgd: momentum and decay worked by hand", "[optim][sgd]") {
  auto module = scalar_module(1.0);
  double& w = module.weight.value(0, 0);
  double& g = module.weight.gradient()(0, 0);
  SGD<double> sgd({.momentum = 0.5, .weight_decay = 0.25});
  const auto near = [](double value) { return Catch::Matchers::WithinAbs(value, 1e-14); };
  g = 2;
  sgd.update(module, 0.1);  // v = 2:    w = 1·(1 - 0.025) - 0.2
  CHECK_THAT(w, near(0.775));
  g = -4;
  sgd.update(module, 0.2);  // v = -3:   w = 0.775·(1 - 0.05) + 0.6
  CHECK_THAT(w, near(1.33625));
  g = 0;
  sgd.update(module, 0.2);  // v = -1.5: w = 1.33625·0.95 + 0.3
  CHECK_THAT(w, near(1.5694375));
  CHECK(g == 0);
}

TEST_CASE("sgd: plain by default", "[optim][sgd]") {
  auto module = scalar_module(1.0);
  SGD<double> sgd;
  for (int step = 0; step < 2; ++step) {
    module.weight.gradient()(0, 0) = 1;
    sgd.update(module, 0.25);
  }
  CHECK(module.weight.value(0, 0) == 0.5);
}

TEST_CASE("sgd: what is wrong is named", "[optim][sgd]") {
  CHECK_THROWS_WITH(SGD<float>({.momentum = 1}),
                    "moe: SGD::Config.momentum = 1, must be in [0, 1)");
}
