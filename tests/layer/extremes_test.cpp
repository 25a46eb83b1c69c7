#include <vector>

#include "../experts/passes.hpp"
#include "layers.hpp"

using namespace moe;
using namespace moe::test;
using Indices = std::vector<Index>;

TEMPLATE_TEST_CASE("layer: no tokens are no work", "[layer]", float, double) {
  using S = TestType;
  Layer<S> layer({.width = 3,
                  .expert = {.hidden = 4},
                  .gate = {.experts = 4, .top_k = 2},
                  .output = Activation::sigmoid,
                  .seed = 5});
  test::randomize(layer, 1);
  const Matrix<S> none(0, 3);
  typename Layer<S>::Tape tape;
  CHECK(layer.forward(none, tape, {.step = 0}).rows() == 0);
  CHECK(tape.y.cols() == 3);
  CHECK(tape.routing().slots() == 0);
  CHECK(tape.balance().loss == 0);
  CHECK(tape.balance().unused_experts() == 4);
  const Matrix<S>& dx = layer.backward(none, tape);
  CHECK(dx.rows() == 0);
  CHECK(dx.cols() == 3);
  for (const auto& [name, gradient] : test::gradients_of(layer)) {
    INFO(name);
    CHECK(gradient.cwiseAbs().maxCoeff() == 0);
  }
  CHECK(layer.evaluate(none).rows() == 0);
  CHECK(layer.evaluate(none).cols() == 3);
}

TEMPLATE_TEST_CASE("layer: a single expert is that expert", "[layer]", float, double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 1, .top_k = 1}, .seed = 5});
  test::randomize(layer, 1);
  const Matrix<S> x = random_matrix<S>(300, 3, 1);
  test::Passes<S> passes(layer.experts()[0], GatheredRows<S>(x));
  const Matrix<S> expected = passes.evaluate(layer.experts()[0]);
  typename Layer<S>::Tape tape;
  CHECK(same_bits(layer.forward(x, tape, {.step = 0}), expected));
  CHECK(tape.balance().loss == 0);
  CHECK(tape.balance().load[0] == 300);
  CHECK(tape.balance().importance[0] == 300);
  layer.backward(x, tape);
  CHECK(test::gradients_of(layer)["gate.weight"].cwiseAbs().maxCoeff() == 0);
  CHECK(test::gradients_of(layer)["gate.noise_weight"].cwiseAbs().maxCoeff() == 0);
}

TEMPLATE_TEST_CASE("layer: all tokens can go to one expert", "[layer]", float, double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 5, .top_k = 1}, .seed = 5});
  collapse(layer, 2);
  const Matrix<S> x = with_positive_first_entry(random_matrix<S>(300, 3, 1));
  typename Layer<S>::Tape tape;
  layer.forward(x, tape, {.step = 0});
  CHECK(tape.dispatch.offsets == Indices{0, 0, 0, 300, 300, 300});
  CHECK(tape.balance().unused_experts() == 4);
  CHECK_THAT(static_cast<double>(tape.balance().cv_importance()),
             Catch::Matchers::WithinAbs(2, 1e-6));
  CHECK_THAT(static_cast<double>(tape.balance().max_over_mean_load()),
             Catch::Matchers::WithinAbs(5, 1e-5));
  const NaiveLayer::Result expected =
      NaiveLayer(layer).forward(x.template cast<double>(), {.step = 0});
  CHECK(relative_error(tape.y.template cast<double>().eval(), expected.y) < test::tolerance<S>);
}

TEMPLATE_TEST_CASE("layer: equal scores go to the first experts", "[layer]", float, double) {
  const Layer<TestType> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 5, .top_k = 3}, .seed = 5});
  typename Layer<TestType>::Tape tape;
  layer.evaluate(random_matrix<TestType>(4, 3, 1), tape);
  CHECK(tape.dispatch.offsets == Indices{0, 4, 8, 12, 12, 12});
  CHECK(tape.balance().unused_experts() == 2);
}

TEMPLATE_TEST_CASE("layer: NaN and infinity reach their own token and no other", "[layer]", float,
                   double) {
  using S = TestType;
  for (const S bad : {std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::infinity(),
                      -std::numeric_limits<S>::infinity()}) {
    for (const bool gated : {false, true}) {
      Layer<S> layer({.width = 3,
                      .expert = {.hidden = 4, .gated = gated},
                      .gate = {.experts = 6, .top_k = 2},
                      .output = gated ? Activation::sigmoid : Activation::identity,
                      .seed = 5});
      test::randomize(layer, 1);
      const Matrix<S> x = random_matrix<S>(150, 3, 1);
      Matrix<S> spoilt = x;
      spoilt(70, 1) = bad;
      typename Layer<S>::Tape tape;
      const auto check = [&](const Matrix<S>& y, const Matrix<S>& expected) {
        CHECK(y.row(70).array().isNaN().all());
        CHECK(same_bits(y.topRows(70), expected.topRows(70)));
        CHECK(same_bits(y.bottomRows(79), expected.bottomRows(79)));
      };
      const Matrix<S> trained = layer.forward(x, tape, {.step = 0});
      check(layer.forward(spoilt, tape, {.step = 0}), trained);
      CHECK(std::isnan(tape.balance().loss));
      CHECK(tape.routing().slots() == 300);
      const Matrix<S> dx = layer.backward(x, tape);
      CHECK(dx.row(70).array().isNaN().any());
      check(layer.evaluate(spoilt, tape), layer.evaluate(x));
      CHECK(std::isnan(tape.balance().loss));
    }
  }
}
