#include "../allocation.hpp"
#include "../gates/law_runs.hpp"

// A layer with every gate.

using namespace moe;
using namespace moe::test;

namespace {

template <class Law>
MoELayer<Expert<FeedForward, typename Law::Scalar>, typename Law::Gate> make_layer() {
  auto gate = Law::config();
  gate.width = 0;  // stands for the layer's
  return MoELayer<Expert<FeedForward, typename Law::Scalar>, typename Law::Gate>(
      {.width = 5, .expert = {.hidden = 6}, .gate = gate, .seed = 4});
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("layer: with any gate takes no memory after its first call",
                        "[layer][allocation]", test::GateLawsOf<float>) {
  using Scalar = typename TestType::Scalar;
  for (const int threads : {1, 3}) {
    const test::Threads scope(threads);
    auto layer = make_layer<TestType>();
    test::randomize(layer, 3, 0.7);
    const Matrix<Scalar> x = random_matrix<Scalar>(300, 5, 1);
    typename decltype(layer)::Tape training;
    typename decltype(layer)::Tape serving;
    const auto pass = [&] {
      layer.forward(x, training, {.step = 0});
      layer.backward(x, training);
      layer.evaluate(x, serving);
    };
    pass();
    CHECK(test::allocations_in([&] {
            for (int i = 0; i < 3; ++i) pass();
          }) == 0);
  }
}

TEMPLATE_TEST_CASE("layer: new loss weights are those of the passes after", "[layer]",
                   test::NoisyTopKLaw<double>, test::SoftmaxLaw<double>,
                   (test::SharedExpertLaw<test::NoisyTopKLaw<double>, true>)) {
  auto layer = make_layer<TestType>();
  test::randomize(layer, 3, 0.7);
  const Matrix<double> x = random_matrix(12, 5, 1);
  typename decltype(layer)::Tape tape;
  layer.forward(x, tape, {.step = 3});
  const double before = tape.balance().loss;
  CHECK(before > 0);
  auto changed = layer;
  const Matrix<double> dx = layer.backward(x, tape);
  changed.set_loss_weights({});
  CHECK(same_bits(changed.backward(x, tape), dx));  // of the forward pass before
  changed.forward(x, tape, {.step = 3});
  CHECK(tape.balance().loss == 0);
  const auto [name, member] = TestType::loss_weights[0];
  typename decltype(layer)::LossWeights weights;
  weights.*member = std::nan("");
  CHECK_THROWS_WITH(changed.set_loss_weights(weights), std::string("moe: ") + TestType::loss_name +
                                                           "::LossWeights." + name +
                                                           " = nan, must be finite and at least 0");
  weights.*member = 2;
  changed.set_loss_weights(weights);
  changed.forward(x, tape, {.step = 3});
  CHECK(tape.balance().loss > 0);
  CHECK(tape.balance().loss == tape.balance().losses.sum());
  layer.forward(x, tape, {.step = 3});  // the other layer has its own
  CHECK(tape.balance().loss == before);
}

TEST_CASE("layer: its configuration has the new loss weights, those of a gate within a gate too",
          "[layer]") {
  MoELayer<Expert<FeedForward>> plain(
      {.width = 5, .expert = {.hidden = 4}, .gate = {.experts = 3, .top_k = 1}, .seed = 1});
  plain.set_loss_weights({.importance = 0.5, .load = 0.25});
  CHECK(plain.config().gate.importance_weight == 0.5);
  CHECK(plain.config().gate.load_weight == 0.25);

  MoELayer<Expert<FeedForward>, SharedExpertGate<NoisyTopKGate<>>> shared(
      {.width = 5,
       .expert = {.hidden = 4},
       .gate = {.routed = {.experts = 3, .top_k = 1}},
       .seed = 1});
  shared.set_loss_weights({.importance = 0.5, .load = 0.25});
  CHECK(shared.config().gate.routed.importance_weight == 0.5);
  CHECK(shared.config().gate.routed.load_weight == 0.25);
}
