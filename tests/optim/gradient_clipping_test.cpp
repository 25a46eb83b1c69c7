#include "moe/optim/gradient_clipping.hpp"

#include "../support.hpp"
#include "laws.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;
using Catch::Matchers::WithinAbs;
using Catch::Matchers::WithinRel;

namespace {

/// Gradients 3 and 4 in two parameters, so the norm is 5.
Linear<float> three_and_four() {
  Linear<float> module({.inputs = 1, .outputs = 2}, 0);
  module.weight.gradient() << 3, 0;
  module.bias.gradient() << 0, -4;
  return module;
}

}  // namespace

TEST_CASE("gradient clipping: worked by hand", "[optim][gradient_clipping]") {
  auto module = three_and_four();
  CHECK(gradient_norm(module) == 5);
  CHECK(clip_gradients(module, 5.0) == 5);
  CHECK(module.weight.gradient()(0, 0) == 3);
  CHECK(clip_gradients(module, 2.5) == 5);
  CHECK(module.weight.gradient()(0, 0) == 1.5f);
  CHECK(module.bias.gradient()(0, 1) == -2);
  CHECK(gradient_norm(module) == 2.5);
  CHECK(clip_gradients(module, std::numeric_limits<double>::infinity()) == 2.5);
  CHECK(module.bias.gradient()(0, 1) == -2);
}

TEMPLATE_TEST_CASE("gradient clipping: large modules, any number of threads",
                   "[optim][gradient_clipping]", float, double) {
  Linear<TestType> module({.inputs = 701, .outputs = 503}, 0);
  module.weight.gradient() = test::random_matrix<TestType>(701, 503, 1);
  const Matrix<TestType> gradient = module.weight.gradient();
  const double expected = gradient.template cast<double>().norm();
  double norm = 0;
  Matrix<TestType> clipped;
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    module.weight.gradient() = gradient;
    const double now = clip_gradients(module, 1.0);
    if (threads == 1) {
      norm = now;
      clipped = module.weight.gradient();
      CHECK_THAT(norm, WithinRel(expected, 1e-12));
      CHECK_THAT(gradient_norm(module), WithinRel(1.0, 1e-6));
    }
    CHECK(now == norm);
    CHECK(test::same_bits(module.weight.gradient(), clipped));
  }
}

TEST_CASE("gradient clipping: squares that no float holds", "[optim][gradient_clipping]") {
  auto module = three_and_four();
  module.weight.gradient() *= 1e30f;
  module.bias.gradient() *= 1e30f;
  CHECK_THAT(gradient_norm(module), WithinRel(5e30, 1e-6));
  CHECK_THAT(clip_gradients(module, 1.0), WithinRel(5e30, 1e-6));
  CHECK_THAT(static_cast<double>(module.weight.gradient()(0, 0)), WithinAbs(0.6, 1e-6));
}

TEST_CASE("gradient clipping: a norm that is not finite leaves the gradients",
          "[optim][gradient_clipping]") {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    auto module = three_and_four();
    module.bias.gradient()(0, 0) = bad;
    CHECK_FALSE(std::isfinite(clip_gradients(module, 1.0)));
    CHECK(module.weight.gradient()(0, 0) == 3);
  }
}

TEST_CASE("gradient clipping: nothing to clip", "[optim][gradient_clipping]") {
  Linear<float> module({.inputs = 2, .outputs = 2}, 0);
  CHECK(clip_gradients(module, 1.0) == 0);
  CHECK(module.weight.gradient().isZero(0));
}

TEST_CASE("gradient clipping: what is wrong is named", "[optim][gradient_clipping]") {
  auto module = three_and_four();
  CHECK_THROWS_WITH(clip_gradients(module, 0),
                    "moe: clip_gradients: max_norm = 0, must be above 0");
  CHECK_THROWS_AS(clip_gradients(module, std::nan("")), std::invalid_argument);
  CHECK(module.weight.gradient()(0, 0) == 3);
}

TEMPLATE_TEST_CASE("gradient clipping: the same bits lazy and dense",
                   "[optim][gradient_clipping][lazy]", float, double) {
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    test::Mixture<TestType> dense;
    test::Mixture<TestType> lazy;
    for (Index t = 0; t < 12; ++t) {  // another dealing of blocks does not change every norm
      zero_gradients(dense);
      dense.backward(t, test::to_some);
      zero_gradients(lazy, Updates::lazy);
      lazy.backward(t, test::to_some);
      const double norm = clip_gradients(dense, 1.0);
      CHECK(gradient_norm(lazy, Updates::lazy) == norm);
      CHECK(clip_gradients(lazy, 1.0, Updates::lazy) == norm);
      bool same = test::same_bits(lazy.gate.gradient(), dense.gate.gradient());
      for (Index e = 0; e < lazy.size(); ++e) {
        Parameter<TestType> shown = lazy[e];
        same = same && test::same_bits(shown.gradient(), dense[e].gradient());
      }
      CHECK(same);
    }
  }
}

TEST_CASE("gradient clipping: gradients written by hand", "[optim][gradient_clipping][lazy]") {
  std::vector<Parameter<float>> parameters(2, Parameter<float>(1, 1));
  detail::track_gradients(parameters[1]);
  parameters[0].gradient()(0, 0) = 3;
  parameters[1].gradient()(0, 0) = 4;
  CHECK(gradient_norm(parameters) == 5);
  CHECK(gradient_norm(parameters, Updates::lazy) == 3);
  CHECK(clip_gradients(parameters, 1.5, Updates::lazy) == 3);
  CHECK(parameters[0].gradient()(0, 0) == 1.5f);
  CHECK(parameters[1].gradient()(0, 0) == 4);
  CHECK(clip_gradients(parameters, 1e-3) > 4);
  CHECK(parameters[1].gradient()(0, 0) < 1e-3f);
}
