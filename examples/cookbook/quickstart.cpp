/// A mixture learns a function, says how evenly its experts are used, and is applied to new tokens.

#include <cstdint>
#include <cstdio>
#include <moe/moe.hpp>

int main() {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
  Layer layer({.width = 8,
               .expert = {.hidden = 32},
               .gate = {.experts = 8, .top_k = 2},
               .seed = 1});  // of the initial weights and the gate's noise

  Layer::Tape tape;  // what backward needs, and all scratch memory
  moe::Adam<float> adam;
  moe::Matrix<float> x(256, 8);  // 256 tokens, one a row
  for (std::uint64_t step = 1; step <= 600; ++step) {
    moe::fill_normal(x, 1.0f, step);  // new tokens at each update
    const moe::Matrix<float> error = layer.forward(x, tape, {.step = step}) - x.cwiseAbs();
    moe::zero_gradients(layer);
    layer.backward(error / 128, tape);  // the gradient of the balance losses is part of it
    adam.update(layer, 5e-3);
    if (step % 200 == 0) {
      std::printf("update %d: error %.3f\n%s\n", static_cast<int>(step),
                  static_cast<double>(error.squaredNorm()) / 256,
                  to_string(tape.balance()).c_str());
    }
  }

  moe::fill_normal(x, 1.0f, 12345);
  const moe::Matrix<float> y = layer.evaluate(x);  // without noise and without a tape
  const double left =
      static_cast<double>((y - x.cwiseAbs()).squaredNorm() / x.cwiseAbs().squaredNorm());
  std::printf("on new tokens %.1f %% of the squares are left unexplained\n", 100 * left);
  return left < 0.1 ? 0 : 1;
}
