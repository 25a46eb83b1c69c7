#include <vector>

#include "layers.hpp"
#include "moe/optim/adam.hpp"
#include "moe/optim/gradient_clipping.hpp"
#include "user_parts.hpp"

using namespace moe;
using namespace moe::test;

TEST_CASE("layer: experts without a token are neither run nor trained", "[layer]") {
  MoELayer<Expert<SineMap, double>> layer(
      {.width = 3, .gate = {.experts = 5, .top_k = 2, .noise = false}, .seed = 5});
  const Matrix<double> x = random_matrix(40, 3, 1);
  MoELayer<Expert<SineMap, double>>::Tape tape;
  layer.forward(x, tape, {.step = 0});  // equal scores: experts 0 and 1
  layer.backward(x, tape);
  layer.evaluate(x, tape);
  for (Index e = 0; e < 5; ++e) {
    const SineMap<double>& network = layer.experts()[detail::to_size(e)].network();
    CHECK(network.calls == (e < 2 ? 3 : 0));
    CHECK(network.rows_forward == (e < 2 ? 80 : 0));
    CHECK(network.rows_backward == (e < 2 ? 40 : 0));
    CHECK((network.w.gradient().cwiseAbs().maxCoeff() == 0) == (e >= 2));
  }
}

TEMPLATE_TEST_CASE("layer: lazy updates leave the experts without tokens alone", "[layer]", float,
                   double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 4, .expert = {.hidden = 6}, .gate = {.experts = 5, .top_k = 1}, .seed = 2});
  collapse(layer, 3);
  const test::Named before = test::values_of(layer);
  Adam<S> adam({.weight_decay = 0.1, .updates = Updates::lazy});
  typename Layer<S>::Tape tape;
  const Matrix<S> x = with_positive_first_entry(random_matrix<S>(9, 4, 1));
  for (std::uint64_t step = 1; step <= 3; ++step) {
    zero_gradients(layer, Updates::lazy);
    layer.forward(x, tape, {.step = step});
    REQUIRE(tape.dispatch.slots_of(3) == 9);
    layer.backward(x, tape);
    clip_gradients(layer, 1e-3, Updates::lazy);
    adam.update(layer, 1e-3);
  }
  for (const auto& [name, value] : test::values_of(layer)) {
    INFO(name);
    if (!name.starts_with("experts.")) continue;
    CHECK(same_bits(value, before.at(name)) == !name.starts_with("experts.3."));
  }
}

/// Gradients of some updates of different batches, cleared before each.
template <class L>
std::vector<test::Named> gradients_of_updates(L layer, Updates zeroing) {
  using S = typename L::Scalar;
  std::vector<test::Named> gradients;
  typename L::Tape tape;
  // Many rows an expert, then few, then experts without any.
  for (const Index tokens : {420, 20, 300, 3, 250}) {
    const auto step = static_cast<std::uint64_t>(tokens);
    const Matrix<S> x = random_matrix<S>(tokens, layer.config().width, step);
    zero_gradients(layer, zeroing);
    layer.forward(x, tape, {.step = step});
    layer.backward(random_matrix<S>(tokens, layer.config().width, step + 1), tape);
    // A copy is looked at, so that looking puts no zeros where the next update finds old numbers.
    L shown = layer;
    gradients.push_back(test::gradients_of(shown));
  }
  return gradients;
}

TEMPLATE_TEST_CASE("layer: gradients cleared lazily are written over", "[layer]", float, double) {
  using S = TestType;
  const auto check = [](const auto& layer) {
    const auto expected = gradients_of_updates(layer, Updates::dense);
    for (const int count : {1, 3}) {
      const Threads threads(count);
      const auto gradients = gradients_of_updates(layer, Updates::lazy);
      for (std::size_t update = 0; update < expected.size(); ++update) {
        INFO("update " << update << ", " << count << " threads");
        for (const auto& [name, gradient] : expected[update]) {
          INFO(name);
          CHECK(same_bits(gradients[update].at(name), gradient));
        }
      }
    }
  };
  for (const bool gated : {false, true}) {
    // The hidden rows are so long that one worker takes a slice in two groups.
    Layer<S> layer({.width = 8,
                    .expert = {.hidden = gated ? 520 : 1040,
                               .gated = gated,
                               .bias = true,
                               .weighted_input = gated,
                               .recompute = gated},
                    .gate = {.experts = 3, .top_k = 2},
                    .seed = 5});
    test::randomize(layer, 7, 0.1);
    check(layer);
  }
  MoELayer<Expert<SineMap, S>> plain({.width = 6, .gate = {.experts = 5, .top_k = 2}, .seed = 5});
  test::randomize(plain, 7, 0.3);
  check(plain);
}

TEMPLATE_TEST_CASE(
    "layer: computing the pre-activations again gives the same bits, and save nothing", "[layer]",
    float, double) {
  using S = TestType;
  for (const bool gated : {false, true}) {
    const auto layer_that = [&](bool recomputes) {
      Layer<S> layer({.width = 24,
                      .expert = {.hidden = 70,
                                 .activation = gated ? Activation::silu : Activation::relu,
                                 .gated = gated,
                                 .bias = true,
                                 .weighted_input = gated,
                                 .recompute = recomputes},
                      .gate = {.experts = 3, .top_k = 2},
                      .seed = 5});
      test::randomize(layer, 7, 0.1);
      return layer;
    };
    Layer<S> keeping = layer_that(false);
    Layer<S> recomputing = layer_that(true);
    const Matrix<S> x = random_matrix<S>(400, 24, 1);
    const Matrix<S> r = random_matrix<S>(400, 24, 2);
    CHECK(Everything<S>(recomputing, x, r).same_as(Everything<S>(keeping, x, r)));
    typename Layer<S>::Tape tape;
    recomputing.forward(x, tape, {.step = 0});
    CHECK(tape.experts.saved.size() == 0);
    keeping.forward(x, tape, {.step = 0});
    CHECK(tape.experts.saved.size() >= 800 * 70);
  }
}
