#include "moe/optim/sgd.hpp"

#include "../support.hpp"
#include "lazy_updates.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;
using test::random_matrix;

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

TEMPLATE_TEST_CASE("sgd: the same bits on any number of threads", "[optim][sgd]", float, double) {
  Matrix<TestType> expected;
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    Linear<TestType> module({.inputs = 131, .outputs = 127}, 1);
    module.weight.gradient() = random_matrix<TestType>(131, 127, 2);
    SGD<TestType> sgd({.momentum = 0.9, .weight_decay = 0.01});
    for (int step = 0; step < 3; ++step) sgd.update(module, 0.1);
    if (threads == 1) expected = module.weight.value;
    CHECK(test::same_bits(module.weight.value, expected));
  }
}

TEST_CASE("sgd: what is wrong is named and changes nothing", "[optim][sgd]") {
  CHECK_THROWS_WITH(SGD<float>({.momentum = 1}),
                    "moe: SGD::Config.momentum = 1, must be in [0, 1)");
  CHECK_THROWS_WITH(SGD<float>({.weight_decay = -1}),
                    "moe: SGD::Config.weight_decay = -1, must be finite and at least 0");
  auto module = scalar_module(1.0);
  module.weight.gradient()(0, 0) = 1;
  SGD<double> sgd;
  CHECK_THROWS_WITH(sgd.update(module, -1),
                    "moe: SGD::update: learning_rate = -1, must be finite and at least 0");
  CHECK_THROWS_AS(sgd.update(module, std::nan("")), std::invalid_argument);
  CHECK(module.weight.value(0, 0) == 1);
}

TEMPLATE_TEST_CASE("sgd: lazy updates", "[optim][sgd][lazy]", float, double) {
  for (const double momentum : {0.0, 0.9}) {
    INFO("momentum " << momentum);
    test::check_lazy_updates<TestType>([&](Updates updates) {
      return SGD<TestType>({.momentum = momentum, .weight_decay = 0.01, .updates = updates});
    });
  }
}
