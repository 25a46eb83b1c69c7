/// Puts a gate of one's own (nearest_gate.hpp) into a layer, checks its gradient and trains it for a
/// second. See README.md beside this file.

#include <cstdint>
#include <cstdio>
#include <exception>
#include <moe/moe.hpp>
#include <moe/testing/check_gradients.hpp>

#include "../common/clouds.hpp"
#include "nearest_gate.hpp"

namespace custom_gate {

template <class Scalar>
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward, Scalar>, NearestGate<Scalar>>;

/// The largest error of the gradients of a layer with the gate, in double, against differences.
moe::GradientCheck check_gate() {
  Layer<double> layer({.width = 3,
                       .expert = {.hidden = 4, .activation = moe::Activation::gelu},
                       .gate = {.experts = 4},
                       .seed = 1});
  moe::Matrix<double> x(5, 3);
  moe::fill_normal(x, 1.0, 2);
  return moe::check_layer_gradients(layer, x, {.step = 0});
}

int run() {
  const moe::GradientCheck check = check_gate();
  std::printf("%s\n\n", check.text().c_str());

  Layer<float> layer({.width = examples::Clouds::width,
                      .expert = {.hidden = 32},
                      .gate = {.experts = 8},
                      .seed = 3});
  const examples::Clouds clouds;
  moe::Matrix<float> x;
  moe::Matrix<float> y;
  Layer<float>::Tape tape;
  moe::Adam<float> adam;
  const Index tokens = 240;
  const std::uint64_t updates = 600;
  std::printf("update     loss   slots of each expert\n");
  for (std::uint64_t update = 0; update < updates; ++update) {
    clouds.draw(tokens, 100 + update, x, y);
    const moe::Matrix<float> dy = layer.forward(x, tape, {.step = 0}) - y;
    moe::zero_gradients(layer);
    layer.backward(2 * dy / static_cast<float>(tokens), tape);
    adam.update(layer, 0.01);
    if (update % 100 == 0) {
      std::printf("%6d %8.4f  ", static_cast<int>(update),
                  static_cast<double>(dy.squaredNorm()) / static_cast<double>(tokens));
      for (Index e = 0; e < 8; ++e)
        std::printf(" %4d", static_cast<int>(tape.dispatch.slots_of(e)));
      std::printf("\n");
    }
  }
  const double left = examples::unexplained(layer, clouds);
  std::printf("\non tokens never seen, %.1f %% of y's squares are left unexplained\n", 100 * left);
  const bool good = check.error < 1e-7 && left < 0.05;
  std::printf("%s\n", good ? "The gate has learned." : "The gate has not learned.");
  return good ? 0 : 1;
}

}  // namespace custom_gate

int main() {
  try {
    return custom_gate::run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "custom_gate: %s\n", error.what());
    return 1;
  }
}
