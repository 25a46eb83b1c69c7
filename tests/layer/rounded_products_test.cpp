#include <cmath>

#include "../allocation.hpp"
#include "layers.hpp"
#include "moe/optim/adam.hpp"

using namespace moe;
using namespace moe::test;

namespace {

Layer<float> layer_that(Precision products, bool gated, Index hidden) {
  Layer<float> layer({.width = 24,
                      .expert = {.hidden = hidden,
                                 .activation = gated ? Activation::silu : Activation::gelu,
                                 .gated = gated,
                                 .bias = true,
                                 .products = products},
                      .gate = {.experts = 3, .top_k = 2},
                      .seed = 5});
  randomize(layer, 7, 0.1);
  return layer;
}

}  // namespace

TEST_CASE("layer: products in bfloat16 have the same bits on any number of threads", "[layer]") {
  // More rows than a product packs at once, and hidden rows of several panels, so that every way of
  // splitting the work happens.
  const Index hidden = 8 * detail::panel_columns<float>;
  for (const bool gated : {false, true}) {
    CAPTURE(gated);
    Layer<float> full = layer_that(Precision::full, gated, hidden);
    Layer<float> rounded = layer_that(Precision::bfloat16, gated, hidden);
    const Matrix<float> x = random_matrix<float>(501, 24, 1);
    const Matrix<float> r = random_matrix<float>(501, 24, 2);
    const auto run = [&](int count) {
      const Threads threads(count);
      return Everything<float>(rounded, x, r);
    };
    const Everything<float> one = run(1);
    for (const int count : {2, 3, 8}) CHECK(run(count).same_as(one));

    const Everything<float> expected(full, x, r);
    CHECK(one.loss == expected.loss);
    CHECK(relative_error(one.y, expected.y) < 0.01);
    CHECK(relative_error(one.y, expected.y) > 0.0005);
    CHECK(relative_error(one.dx, expected.dx) < 0.02);
    CHECK(gradient_error(one.gradients, expected.gradients) < 0.02);
  }
}

TEST_CASE("layer: products in bfloat16 give a token its bits whatever its batch", "[layer]") {
  const Layer<float> layer = layer_that(Precision::bfloat16, true, 130);
  const Matrix<float> x = random_matrix<float>(300, 24, 1);
  Layer<float>::Tape tape;
  const Matrix<float> all = layer.evaluate(x, tape);
  for (const Index rows : {1, 2, 13, 150}) {
    const Matrix<float> some = layer.evaluate(x.middleRows(20, rows), tape);
    CHECK(same_bits(some, all.middleRows(20, rows)));
  }
}

TEST_CASE("layer: products in bfloat16 allocate nothing after the first step", "[layer]") {
  Layer<float> layer = layer_that(Precision::bfloat16, true, 130);
  const Matrix<float> x = random_matrix<float>(200, 24, 1);
  Layer<float>::Tape tape;
  const auto step = [&](std::uint64_t number) {
    layer.forward(x, tape, {.step = number});
    layer.backward(x, tape);
    zero_gradients(layer);
  };
  step(0);
  const std::size_t before = allocation_count();
  for (std::uint64_t number = 0; number < 3; ++number) step(number);
  CHECK(allocation_count() == before);
}

TEST_CASE("learning: products in bfloat16 teach as well as float", "[layer][learning]") {
  // Two clouds of tokens, and for each another linear map.
  const auto make = [](std::uint64_t seed, Matrix<float>& x, Matrix<float>& y) {
    x = random_matrix<float>(256, 4, seed);
    for (Index t = 0; t < x.rows(); ++t) x(t, 0) += t % 2 == 0 ? 4.0f : -4.0f;
    y = x * random_matrix<float>(4, 4, 99);
    for (Index t = 1; t < x.rows(); t += 2) y.row(t) *= -1;
  };
  const Threads threads(1);
  Matrix<float> held_x;
  Matrix<float> held_y;
  make(2, held_x, held_y);
  double total[2] = {};
  for (std::uint64_t seed = 3; seed < 6; ++seed) {
    Matrix<float> x;
    Matrix<float> y;
    make(10 * seed, x, y);
    double end[2] = {};
    for (const Precision products : {Precision::full, Precision::bfloat16}) {
      Layer<float> layer(
          {.width = 4,
           .expert = {.hidden = 16, .activation = Activation::silu, .products = products},
           .gate = {.experts = 4, .top_k = 2},
           .seed = seed});
      Adam<float> adam;
      Layer<float>::Tape tape;
      for (std::uint64_t step = 0; step < 300; ++step) {
        const Matrix<float>& guess = layer.forward(x, tape, {.step = step});
        layer.backward(2 * (guess - y) / static_cast<float>(x.rows()), tape);
        adam.update(layer, 0.02);
        zero_gradients(layer);
      }
      const Matrix<float> guess = layer.evaluate(held_x, tape);
      end[static_cast<int>(products)] = (guess - held_y).squaredNorm() / held_y.squaredNorm();
      total[static_cast<int>(products)] += end[static_cast<int>(products)];
    }
    INFO("seed " << seed << ": full " << end[0] << ", bfloat16 " << end[1]);
    CHECK(end[0] < 0.005);
    CHECK(end[1] < 0.005);
    CHECK(end[0] != end[1]);
  }
  INFO("over all seeds: full " << total[0] << ", bfloat16 " << total[1]);
  CHECK(std::abs(total[1] / total[0] - 1) < 0.1);
}
