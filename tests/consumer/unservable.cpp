#include <moe/moe.hpp>
#include <moe/weights/serving_layer.hpp>

// A layer is served, not what is built around it.
using Block = moe::Residual<moe::MoELayer<moe::Expert<moe::FeedForward>>>;

moe::ServingLayer<Block, moe::Int8> served(const Block& block) {
  return moe::ServingLayer<Block, moe::Int8>(block);
}
