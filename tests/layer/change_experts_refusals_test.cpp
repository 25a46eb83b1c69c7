// Changes of a layer's experts that are refused, and what they make of a tape.

#include <string>

#include "change_experts.hpp"

using namespace moe;
using namespace moe::test;
using namespace moe::test::change;

TEMPLATE_LIST_TEST_CASE("experts come and go: what cannot be changes nothing", "[layer][change]",
                        Laws) {
  using Law = TestType;
  auto layer = make_layer<Law>(3);
  const Values before = values_of(layer);
  const Index all = layer.gate().experts();
  CHECK_THROWS_WITH(
      layer.remove_experts({all}),
      Catch::Matchers::Contains("MoELayer::remove_experts: expert = " + std::to_string(all) +
                                ", must be at least 0 and below " + std::to_string(all)));
  CHECK_THROWS_WITH(layer.remove_experts({2, 2}),
                    Catch::Matchers::Contains("MoELayer::remove_experts: expert 2 is named twice"));
  CHECK(test::is_refused([&] { layer.remove_experts({}); }));
  CHECK(test::is_refused([&] { layer.remove_experts(experts_of<Law>({0, 1, 2})); }));
  CHECK_THROWS_WITH(
      layer.copy_experts({-1}, {.seed = 1}),
      Catch::Matchers::Contains("MoELayer::copy_experts: expert = -1, must be at least 0"));
  CHECK_THROWS_WITH(layer.copy_experts({0}, {.noise_stddev = -0.5, .seed = 1}),
                    Catch::Matchers::Contains("noise_stddev = -0.5, must be"));
  CHECK_THROWS_WITH(layer.add_experts(0, 1), Catch::Matchers::Contains("count = 0"));
  if constexpr (requires { layer.config().gate.top_k; }) {  // a token needs two of them
    if (Law::unit == 1) {
      CHECK_THROWS_WITH(layer.remove_experts({0, 1}), Catch::Matchers::Contains("top_k = 2"));
    }
  }
  CHECK(same_values(values_of(layer), before));
  CHECK(layer.gate().experts() == all);
  CHECK(layer.experts().size() == detail::to_size(all));
}

TEMPLATE_TEST_CASE("experts come and go: only in whole groups, or in whole rows of product keys",
                   "[layer][change]", change::HierarchicalLaw, change::ProductKeyLaw) {
  auto layer = make_layer<TestType>(3);
  const Values before = values_of(layer);
  const auto whole = Catch::Matchers::Contains("only whole groups");
  CHECK_THROWS_WITH(layer.add_experts(2, 1), whole);
  CHECK_THROWS_WITH(layer.remove_experts({3}), whole);
  CHECK_THROWS_WITH(layer.remove_experts({2, 3, 4}), whole);
  CHECK_THROWS_WITH(layer.copy_experts({3, 5, 4}, {.seed = 1}), whole);
  CHECK_THROWS_WITH(layer.copy_experts({1, 2, 3}, {.seed = 1}), whole);
  CHECK(same_values(values_of(layer), before));
}

TEST_CASE("experts come and go: shared ones stay", "[layer][change]") {
  auto layer = make_layer<SharedLaw>(4);
  const Values before = values_of(layer);
  const auto shared = Catch::Matchers::Contains("of 2 shared experts");
  CHECK_THROWS_WITH(layer.remove_experts({1}), shared);
  CHECK_THROWS_WITH(layer.copy_experts({0}, {.seed = 1}),
                    Catch::Matchers::Contains("one of 2 shared experts"));
  CHECK(same_values(values_of(layer), before));
}

TEST_CASE("experts come and go: groups of a top-k gate must divide them", "[layer][change]") {
  LayerOf<TopK> layer({.width = width,
                       .expert = {.hidden = 3},
                       .gate = {.experts = 6, .top_k = 2, .groups = 3, .top_k_groups = 2},
                       .seed = 3});
  CHECK_THROWS_WITH(
      layer.add_experts(1, 1),
      Catch::Matchers::Contains("groups = 3, must be at least 1 and divide experts = 7"));
  layer.add_experts(3, 1);
  CHECK(layer.config().gate.experts == 9);
}

TEST_CASE("experts come and go: a tape of before is refused, and can be used again",
          "[layer][change]") {
  auto layer = make_layer<NoisyLaw>(4);
  LayerOf<Noisy>::Tape tape;
  const auto x = random_matrix(6, width, 8);
  layer.forward(x, tape, {.step = 1});
  layer.remove_experts({3});
  CHECK_THROWS_AS(layer.backward(x, tape), std::invalid_argument);
  layer.forward(x, tape, {.step = 1});
  layer.backward(x, tape);
  layer.forward(x, tape, {.step = 1});
  layer.add_experts(1, 1);
  layer.remove_experts({0});  // as many as before
  CHECK_THROWS_WITH(layer.backward(x, tape),
                    Catch::Matchers::Contains("the tape is of other experts"));
  layer.forward(x, tape, {.step = 1});
  layer.backward(x, tape);
}

namespace {

/// A user's gate without the verb.
struct FixedGate : NoisyTopKGate<float> {
  using NoisyTopKGate<float>::NoisyTopKGate;
  void change_experts() = delete;
};
template <class Layer>
concept CanChange = requires(Layer& layer) {
  layer.add_experts(Index{1}, Seed{1});
}
|| requires(Layer& layer) { layer.remove_experts(Sources{}); }
|| requires(Layer& layer) { layer.copy_experts(Sources{}, CopyNoise{.seed = 1}); };
static_assert(CanChange<MoELayer<Expert<FeedForward>>>);
static_assert(Gate<FixedGate> && !CanChange<MoELayer<Expert<FeedForward>, FixedGate>>);
static_assert(!CanChange<MoELayer<Expert<FeedForward>, SharedExpertGate<FixedGate>>>);

}  // namespace
