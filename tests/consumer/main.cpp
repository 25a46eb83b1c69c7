// A user's program: trains a small layer for a few updates and checks that the loss fell.

#include <cstdio>
#include <moe/moe.hpp>

int main() {
  moe::MoELayer<moe::Expert<moe::FeedForward>> layer(
      {.width = 8, .expert = {.hidden = 16}, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
  moe::Matrix<float> x(64, 8);
  moe::fill_normal(x, 1.0f, 2);
  const moe::Matrix<float> target = x.cwiseAbs();

  decltype(layer)::Tape tape;
  moe::Adam<float> adam;
  float first = 0;
  float loss = 0;
  for (std::uint64_t step = 1; step <= 200; ++step) {
    const moe::Matrix<float> error = layer.forward(x, tape, {.step = step}) - target;
    loss = error.squaredNorm() / 64;
    if (step == 1) first = loss;
    moe::zero_gradients(layer);
    layer.backward(error / 32, tape);
    adam.update(layer, 1e-2);
  }
  std::printf("moe %d.%d.%d: loss %.3f -> %.3f\n", MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
              MOE_VERSION_PATCH, static_cast<double>(first), static_cast<double>(loss));
  return loss < 0.2f * first ? 0 : 1;
}
