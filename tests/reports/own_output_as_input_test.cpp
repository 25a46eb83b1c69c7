// Report: `b.evaluate(a.evaluate(x, t), t)` gives wrong numbers without a word, and
// `evaluate(t.y.bottomRows(8), t)` reads memory that the pass has freed.

#include "../support.hpp"
#include "moe/moe.hpp"

using namespace moe;
using test::is_refused;
using test::random_matrix;

namespace {

template <class Layer>
void check_layer(const typename Layer::Config& config) {
  using Tape = typename Layer::Tape;
  Layer layer(config);
  const Matrix<double> x = random_matrix(16, config.width, 1);
  {
    Tape tape;
    layer.evaluate(x, tape);
    CHECK(is_refused([&] { layer.evaluate(tape.y, tape); }));
    CHECK(is_refused([&] { layer.evaluate(tape.y.bottomRows(8), tape); }));
    CHECK(is_refused([&] { layer.evaluate(tape.y.middleRows(3, 1), tape); }));
  }
  {
    // What forward takes is copied first.
    Tape tape;
    const Matrix<double> y = layer.forward(x, tape, {.step = 1});
    Tape other;
    const Matrix<double> expected = layer.forward(y, other, {.step = 2});
    CHECK(test::same_bits(layer.forward(tape.y, tape, {.step = 2}), expected));
  }
  {
    Tape tape;
    const Matrix<double> y = layer.forward(x, tape, {.step = 1});
    Tape other;
    const Matrix<double> expected = layer.forward(y.bottomRows(8), other, {.step = 2});
    CHECK(test::same_bits(layer.forward(tape.y.bottomRows(8), tape, {.step = 2}), expected));
    CHECK(is_refused([&] { layer.forward(tape.x.bottomRows(4), tape, {.step = 3}); }));
  }
  {
    Tape tape;
    layer.forward(x, tape, {.step = 1});
    layer.backward(tape.y, tape);  // the gradient of half the squared norm
    CHECK(is_refused([&] { layer.backward(tape.dx, tape); }));
  }
}

}  // namespace

TEST_CASE("report: a layer refuses a tape's own output, or gives the right numbers", "[reports]") {
  using E = Expert<FeedForward, double>;
  const auto expert = FeedForward<double>::Config{.hidden = 6};
  for (const Activation output : {Activation::identity, Activation::sigmoid}) {
    check_layer<MoELayer<E>>({.width = 4,
                              .expert = expert,
                              .gate = {.experts = 4, .top_k = 2},
                              .output = output,
                              .seed = 1});
  }
  check_layer<MoELayer<E, TopKGate<double>>>(
      {.width = 4, .expert = expert, .gate = {.experts = 4, .top_k = 2, .jitter = 0.1}, .seed = 1});
  check_layer<MoELayer<E, BalancedGate<double>>>(
      {.width = 4, .expert = expert, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
  check_layer<MoELayer<E, ExpertChoiceGate<double>>>(
      {.width = 4, .expert = expert, .gate = {.experts = 4}, .seed = 1});
  check_layer<MoELayer<E, HierarchicalGate<double>>>(
      {.width = 4,
       .expert = expert,
       .gate = {.groups = 2, .group_experts = 2, .top_k_groups = 1, .top_k = 1},
       .seed = 1});
  check_layer<MoELayer<E, ProductKeyGate<double>>>(
      {.width = 4,
       .expert = expert,
       .gate = {.row_keys = 2, .column_keys = 2, .top_k = 2},
       .seed = 1});
  check_layer<MoELayer<E, SharedExpertGate<NoisyTopKGate<double>>>>(
      {.width = 4,
       .expert = expert,
       .gate = {.shared = 1, .gated = true, .routed = {.experts = 4, .top_k = 2}},
       .seed = 1});
}

TEST_CASE("report: nn modules refuse a tape's own output, or give the right numbers", "[reports]") {
  const Matrix<double> x = random_matrix(16, 5, 1);
  // Linear, LSTM and Dropout are in nn/laws_test.cpp.
  {
    LSTM<double> lstm({.inputs = 5, .hidden = 5}, 1);
    LSTM<double>::Tape tape;
    auto state = lstm.initial_state(2);
    lstm.forward(x, state, tape);
    CHECK(is_refused([&] { lstm.evaluate(tape.cell.bottomRows(8), state, tape); }));
  }
  {
    const SoftmaxCrossEntropy<double> loss;
    SoftmaxCrossEntropy<double>::Tape tape;
    const std::vector<Index> targets(16, 2);
    loss.forward(x, targets, tape);
    CHECK(is_refused([&] { loss.forward(tape.dlogits, targets, tape); }));
    CHECK(is_refused([&] {
      loss.forward(tape.dlogits.topRows(4), std::span<const Index>(targets).first(4), tape);
    }));
  }
  {
    Embedding<double> embedding({.vocabulary = 9, .width = 3}, 1);
    Embedding<double>::Tape tape;
    embedding.forward(std::vector<Index>{1, 2, 3, 4}, tape);
    CHECK(is_refused([&] { embedding.forward(std::span<const Index>(tape.ids).first(2), tape); }));
  }
}
