#include "../naive_layer.hpp"
#include "moe/adapt/lora.hpp"

using namespace moe;
using namespace moe::test;

TEST_CASE("lora: the products of an adapted layer are in bfloat16 where the layer's are",
          "[adapt]") {
  const auto make = [](Precision products) {
    return MoELayer<Expert<FeedForward>>(
        {.width = 16,
         .expert = {.hidden = 24, .activation = Activation::silu, .products = products},
         .gate = {.experts = 3, .top_k = 2},
         .seed = 1});
  };
  auto layer = make(Precision::bfloat16);
  auto full = make(Precision::full);
  auto adapted = adapt(layer, LoraConfig{.rank = 4}, Seed{2});
  const auto x = random_matrix<float>(40, 16, 2);
  decltype(layer)::Tape tape;
  decltype(full)::Tape full_tape;
  decltype(adapted)::Tape adapted_tape;
  // An adapter adds nothing at its start.
  const Matrix<float> y = layer.forward(x, tape, {.step = 0});
  CHECK(adapted.forward(x, adapted_tape, {.step = 0}) == y);
  CHECK(full.forward(x, full_tape, {.step = 0}) != y);
  const Matrix<float> dx = layer.backward(x, tape);
  CHECK(relative_error(adapted.backward(x, adapted_tape), dx) < 1e-6);
  CHECK(relative_error(full.backward(x, full_tape), dx) > 1e-4);
}
