// Report: parameters that are not trained gather gradients for ever, so that the first clipping
// after they are thawed sees hundreds of updates; and a layer that only serves takes the memory of
// its gradients too.

#include <map>

#include "../support.hpp"
#include "moe/moe.hpp"

using namespace moe;
using test::random_matrix;

namespace {

using Layer = MoELayer<Expert<FeedForward>>;

Layer make_layer(bool gated = false) {
  return Layer({.width = 8,
                .expert = {.hidden = 12, .gated = gated, .bias = true, .weighted_input = gated},
                .gate = {.experts = 4, .top_k = 2},
                .seed = 1});
}

/// Without looking at the gradients, which would make them.
Index gradient_numbers(const Layer& layer) {
  Index count = 0;
  for_each_parameter(layer, [&](const std::string&, const Parameter<float>& p) {
    count += p.stored.memory.size();
  });
  return count;
}

void train(Layer& layer, bool trained, std::string_view prefix = "") {
  for_each_parameter(layer, [&](const std::string& name, Parameter<float>& p) {
    if (name.starts_with(prefix)) p.trained = trained;
  });
}

}  // namespace

TEST_CASE("report: a layer that only evaluates has no memory for gradients", "[reports]") {
  Layer layer = make_layer();
  Layer::Tape tape;
  const Matrix<float> x = random_matrix<float>(16, 8, 1);
  layer.evaluate(x, tape);
  layer.forward(x, tape, {.step = 1});
  for_each_parameter(layer, [](const std::string&, Parameter<float>& p) { p.value *= 2; });
  zero_gradients(layer);
  CHECK(gradient_norm(layer) == 0);
  CHECK(gradient_numbers(layer) == 0);
  for_each_parameter(std::as_const(layer), [](const std::string&, const Parameter<float>& p) {
    CHECK(p.gradient().rows() == p.value.rows());
    CHECK(p.gradient().cwiseAbs().sum() == 0);
  });
  CHECK(gradient_numbers(layer) == 0);
  layer.forward(x, tape, {.step = 1});
  layer.backward(x, tape);
  CHECK(gradient_numbers(layer) == parameter_count(layer));
}

TEST_CASE("report: a frozen parameter gathers no gradient until it is thawed", "[reports]") {
  const bool gated = GENERATE(false, true);
  Layer layer = make_layer(gated);
  Layer never = make_layer(gated);
  Layer::Tape tape;
  Layer::Tape never_tape;
  const Matrix<float> x = random_matrix<float>(16, 8, 1);
  train(layer, false);
  for (std::uint64_t step = 0; step < 50; ++step) {
    layer.forward(x, tape, {.step = step});
    layer.backward(x, tape);
  }
  CHECK(gradient_numbers(layer) == 0);
  train(layer, true);
  layer.forward(x, tape, {.step = 99});
  layer.backward(x, tape);
  never.forward(x, never_tape, {.step = 99});
  never.backward(x, never_tape);
  CHECK(gradient_norm(layer) == gradient_norm(never));
  CHECK(gradient_norm(layer) > 0);
}

TEST_CASE("report: what is not frozen keeps its gradients to the bit, and dx too", "[reports]") {
  const bool gated = GENERATE(false, true);
  const std::string frozen = GENERATE("gate", "experts", "experts.0.up", "experts.1.down.weight");
  Layer all = make_layer(gated);
  Layer part = make_layer(gated);
  train(part, false, frozen);
  const Matrix<float> x = random_matrix<float>(16, 8, 1);
  Layer::Tape tapes[2];
  for (std::uint64_t step = 0; step < 3; ++step) {
    Index i = 0;
    for (Layer* layer : {&all, &part}) {
      Layer::Tape& tape = tapes[i++];
      zero_gradients(*layer, step % 2 == 0 ? Updates::lazy : Updates::dense);
      layer->forward(x, tape, {.step = step});
      layer->backward(x, tape);
    }
    CHECK(test::same_bits(tapes[0].dx, tapes[1].dx));
    std::map<std::string, Matrix<float>> expected;
    for_each_parameter(std::as_const(all), [&](const std::string& name, const auto& p) {
      expected[name] = p.gradient();
    });
    for_each_parameter(std::as_const(part), [&](const std::string& name, const auto& p) {
      INFO(name);
      const Matrix<float> gradient = p.gradient();
      if (name.starts_with(frozen)) {
        CHECK(gradient.cwiseAbs().sum() == 0);
      } else {
        CHECK(test::same_bits(gradient, expected[name]));
      }
    });
  }
}

TEST_CASE("report: zeroing releases the gradients of what was frozen", "[reports]") {
  Layer layer = make_layer();
  Layer::Tape tape;
  const Matrix<float> x = random_matrix<float>(16, 8, 1);
  layer.forward(x, tape, {.step = 1});
  layer.backward(x, tape);
  train(layer, false);
  zero_gradients(layer);
  CHECK(gradient_numbers(layer) == 0);
  train(layer, true);
  CHECK(gradient_norm(layer) == 0);
}
