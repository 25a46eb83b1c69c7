#include <moe/io/serving.hpp>
#include <moe/moe.hpp>

// Types next to the right ones.
#if defined(NETWORK)
using Layer = moe::MoELayer<moe::FeedForward<float>>;
void evaluate(const moe::Matrix<float>& x) {
  const Layer layer(
      {.width = 8, .expert = {.hidden = 16}, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
  Layer::Tape tape;
  layer.evaluate(x, tape);
}
#elif defined(UNSERVED)
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
auto load() { return moe::load_serving<Layer>("layer.safetensors"); }
#elif defined(FACTORED)
void update(moe::MoELayer<moe::Expert<moe::FeedForward>>& layer, moe::FactoredAdam<double>& adam) {
  adam.update(layer, 1e-3);
}
#elif defined(OPTIMIZER)
void update(moe::MoELayer<moe::Expert<moe::FeedForward>>& layer, moe::Adam<double>& adam) {
  adam.update(layer, 1e-3);
}
#else
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
auto load() { return moe::load_serving<moe::ServingLayer<Layer, moe::Int8>>("layer.safetensors"); }
#endif
