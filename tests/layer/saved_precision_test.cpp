#include "layers.hpp"

using namespace moe;
using namespace moe::test;

TEMPLATE_TEST_CASE("layer: pre-activations in bfloat16 take half the tape, in double a quarter",
                   "[layer]", float, double) {
  using S = TestType;
  for (const bool gated : {false, true}) {
    // Hidden rows of several panels, so that every way of splitting the work happens.
    const Index hidden = 8 * detail::panel_columns<S>;
    const auto layer_that = [&](Precision saved) {
      Layer<S> layer({.width = 24,
                      .expert = {.hidden = hidden,
                                 .activation = gated ? Activation::silu : Activation::relu,
                                 .gated = gated,
                                 .bias = true,
                                 .weighted_input = gated,
                                 .saved = saved},
                      .gate = {.experts = 3, .top_k = 2},
                      .seed = 5});
      randomize(layer, 7, 0.1);
      return layer;
    };
    Layer<S> full = layer_that(Precision::full);
    Layer<S> narrow = layer_that(Precision::bfloat16);
    const Matrix<S> x = random_matrix<S>(400, 24, 1);
    const Matrix<S> r = random_matrix<S>(400, 24, 2);

    // 800 slots, their rows padded by a few cache lines.
    typename Layer<S>::Tape tape;
    full.forward(x, tape, {.step = 0});
    const double whole = static_cast<double>(tape.experts.saved.size());
    narrow.forward(x, tape, {.step = 0});
    const double part = static_cast<double>(tape.experts.saved.size());
    CHECK(tape.experts.saved.rows() == 800);
    CHECK(part * sizeof(S) >= 800.0 * 2.0 * static_cast<double>(hidden * (gated ? 2 : 1)));
    CHECK(part / whole < 1.05 * 2 / static_cast<double>(sizeof(S)));

    const auto run = [&](int count) {
      const Threads threads(count);
      return Everything<S>(narrow, x, r);
    };
    const Everything<S> one = run(1);
    for (const int count : {2, 3, 8}) CHECK(run(count).same_as(one));

    const Everything<S> expected(full, x, r);
    CHECK(same_bits(one.y, expected.y));
    CHECK(one.loss == expected.loss);
    CHECK(relative_error(one.dx, expected.dx) < 0.02);
    CHECK(gradient_error(one.gradients, expected.gradients) < 0.02);
    CHECK(!same_bits(one.dx, expected.dx));
  }
}
