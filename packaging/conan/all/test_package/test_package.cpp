#include <moe/moe.hpp>
#ifdef WITH_IO
#include <moe/io/safetensors.hpp>
#endif

int main() {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
  const Layer layer(
      {.width = 8, .expert = {.hidden = 16}, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
#ifdef WITH_IO
  moe::save_module("layer.safetensors", layer);
#endif
  const moe::Matrix<float> x = moe::Matrix<float>::Ones(3, 8);
  return layer.evaluate(x).rows() == 3 ? 0 : 1;
}
