// A user's program: saves a layer and loads it again.

#include <cstdio>
#include <moe/io/safetensors.hpp>
#include <moe/moe.hpp>

int main() {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
  const Layer::Config config{
      .width = 8, .expert = {.hidden = 16}, .gate = {.experts = 4, .top_k = 2}, .seed = 1};
  const Layer saved(config);
  moe::save_parameters("saves.safetensors", saved);
  Layer::Config other = config;
  other.seed = 2;
  Layer loaded(other);
  moe::load_parameters("saves.safetensors", loaded);
  moe::Matrix<float> x(5, 8);
  moe::fill_normal(x, 1.0f, 2);
  const bool same = loaded.evaluate(x) == saved.evaluate(x);
  std::puts(same ? "saved and loaded" : "what was loaded is not what was saved");
  return same ? 0 : 1;
}
