// Report: a program that takes an expert out of a layer, or assigns a weight of PyTorch without transposing
// it, reads and writes memory out of bounds.

#include <span>
#include <type_traits>
#include <utility>

#include "../support.hpp"
#include "moe/moe.hpp"

using namespace moe;
using test::random_matrix;

namespace {

using Layer = MoELayer<Expert<FeedForward>>;
const Layer::Config config{
    .width = 3, .expert = {.hidden = 5}, .gate = {.experts = 4, .top_k = 4}, .seed = 1};

/// No verb of a layer runs; a backward pass that could have run leaves the gradients alone.
void check_refused(Layer& layer, Layer::Tape& trained) {
  const Matrix<float> x = random_matrix<float>(6, 3, 1);
  Layer::Tape tape;
  CHECK_THROWS_AS(layer.forward(x, tape, {.step = 1}), std::invalid_argument);
  CHECK_THROWS_AS(layer.evaluate(x, tape), std::invalid_argument);
  CHECK_THROWS_AS(layer.backward(x, trained), std::invalid_argument);
  for_each_parameter(layer, [](const std::string& name, const Parameter<float>& p) {
    INFO(name);
    CHECK(p.gradient().isZero(0));
  });
}

template <class Break>
void check_broken(Break&& break_it) {
  Layer layer(config);
  Layer::Tape trained;
  layer.forward(random_matrix<float>(6, 3, 1), trained, {.step = 1});
  break_it(layer);
  check_refused(layer, trained);
}

}  // namespace

// Experts and the gate cannot be taken out or exchanged but by a verb of the layer.
static_assert(std::is_same_v<decltype(std::declval<Layer&>().experts()),
                             std::span<const Expert<FeedForward>>>);
static_assert(std::is_same_v<decltype(std::declval<Layer&>().gate()), const NoisyTopKGate<>&>);

TEST_CASE("report: a layer whose structure was broken says so", "[reports]") {
  check_broken([](Layer& layer) {
    for_each_parameter(layer, [](const std::string& name, Parameter<float>& p) {
      if (name == "experts.3.up.weight") p.value = Matrix<float>(p.value.transpose());
    });
  });
  check_broken([](Layer& layer) {
    for_each_parameter(layer, [](const std::string& name, Parameter<float>& p) {
      if (name == "gate.weight") p.value = Matrix<float>(p.value.transpose());
    });
  });
  check_broken([](Layer& layer) { const Layer moved = std::move(layer); });
}

TEST_CASE("report: an expert of the same shape may take another's place", "[reports]") {
  Layer layer(config);
  const Matrix<float> x = random_matrix<float>(6, 3, 1);
  const Matrix<float> before = layer.evaluate(x);
  layer.replace_expert(1, layer.experts()[2]);
  CHECK(!test::same_bits(layer.evaluate(x), before));
  const auto replaced = [&](Index e, const Expert<FeedForward>& expert) {
    return [&layer, e, expert] { layer.replace_expert(e, expert); };
  };
  const Expert<FeedForward> high({.width = 3, .hidden = 9}, 1);
  const Expert<FeedForward> wide({.width = 8, .hidden = 5}, 1);
  CHECK_THROWS_WITH(
      replaced(2, high)(),
      "moe: MoELayer::replace_expert: experts.2.up.weight would become 3 x 9, must be 3 x 5");
  CHECK_THROWS_WITH(
      replaced(2, wide)(),
      "moe: MoELayer::replace_expert: experts.2.up.weight would become 8 x 5, must be 3 x 5");
  CHECK_THROWS_WITH(
      replaced(4, layer.experts()[0])(),
      "moe: MoELayer::replace_expert: expert = 4, must be one of this process and below 4");
}

TEST_CASE("report: a weight that was not transposed is named", "[reports]") {
  Linear<float> linear({.inputs = 3, .outputs = 2}, 1);
  const Matrix<float> x = random_matrix<float>(4, 3, 1);
  Linear<float>::Tape tape;
  linear.forward(x, tape);
  linear.weight.value = Matrix<float>(linear.weight.value.transpose());
  const char* const message = "moe: Linear: weight is 2 x 3, must be 3 x 2";
  CHECK_THROWS_WITH(linear.evaluate(x), message);
  CHECK_THROWS_WITH(linear.backward(random_matrix<float>(4, 2, 1), tape), message);
  CHECK_THROWS_WITH(linear.forward(x, tape), message);

  LSTM<float> lstm({.inputs = 3, .hidden = 2}, 1);
  auto state = lstm.initial_state(4);
  lstm.weight_hh.value = Matrix<float>::Zero(8, 2);
  CHECK_THROWS_WITH(lstm.evaluate(x, state), "moe: LSTM: weight_hh is 8 x 2, must be 2 x 8");

  Embedding<float> embedding({.vocabulary = 5, .width = 2}, 1);
  embedding.weight.value.resize(4, 2);
  const std::vector<Index> ids{4};
  CHECK_THROWS_WITH(embedding.evaluate(ids), "moe: Embedding: weight is 4 x 2, must be 5 x 2");

  Layer layer(config);
  for_each_parameter(layer, [](const std::string& name, Parameter<float>& p) {
    if (name == "experts.3.down.bias") p.value = Matrix<float>::Zero(3, 1);
  });
  CHECK_THROWS_WITH(layer.evaluate(x),
                    "moe: MoELayer: an expert: down.bias is 3 x 1, must be 1 x 3");
}
