// Reports that are a line or two each.

#include <array>
#include <cmath>
#include <span>
#include <type_traits>
#include <vector>

#include "../support.hpp"
#include "moe/moe.hpp"

using namespace moe;
using Catch::Matchers::WithinAbs;

TEST_CASE("report: an optimizer is made from empty braces", "[reports]") {
  const Adam<float> adam({});
  CHECK(adam.config().beta1 == 0.9);
  const SGD<float> sgd({});
  CHECK(sgd.config().momentum == 0);
  const FactoredAdam<float> factored({});
  CHECK(factored.config().beta2 == 0.999);
}

TEST_CASE("report: nothing that draws numbers is made without a seed", "[reports]") {
  using Layer = MoELayer<Expert<FeedForward>>;
  STATIC_REQUIRE_FALSE(std::is_default_constructible_v<Layer::Config>);
  STATIC_REQUIRE(std::is_constructible_v<Linear<>, Linear<>::Config, int>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<Linear<>, Linear<>::Config>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<LSTM<>, LSTM<>::Config>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<Embedding<>, Embedding<>::Config>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<Dropout<>, Dropout<>::Config>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<FeedForward<>, FeedForward<>::Config>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<NoisyTopKGate<>, NoisyTopKGate<>::Config>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<TopKGate<>, TopKGate<>::Config>);
}

TEST_CASE("report: targets are any contiguous numbers of type Index", "[reports]") {
  const SoftmaxCrossEntropy<> loss;
  const Matrix<float> logits = Matrix<float>::Zero(2, 4);
  const std::array<Index, 2> array{1, 2};
  const std::vector<Index> vector{1, 2};
  Index plain[] = {1, 2};
  CHECK_THAT(loss.evaluate(logits, array), WithinAbs(std::log(4.0), 1e-6));
  CHECK_THAT(loss.evaluate(logits, vector), WithinAbs(std::log(4.0), 1e-6));
  CHECK_THAT(loss.evaluate(logits, plain), WithinAbs(std::log(4.0), 1e-6));
  CHECK_THAT(loss.evaluate(logits, std::span(plain)), WithinAbs(std::log(4.0), 1e-6));
}

namespace {

/// The sum of a token's weights, all logits being `logit`.
template <class Scalar>
Scalar weight_sum(double epsilon, Scalar logit) {
  TopKGate<Scalar> gate({.width = 1,
                         .experts = 4,
                         .top_k = 2,
                         .score = Score::sigmoid,
                         .renormalise = true,
                         .renormalise_epsilon = epsilon},
                        0);
  for_each_parameter(gate, [](const std::string&, auto& p) { p.value.setOnes(); });
  const Routing<Scalar> routing = gate.evaluate(Matrix<Scalar>::Constant(1, 1, logit));
  return routing.weight[0] + routing.weight[1];
}

}  // namespace

TEST_CASE("report: renormalised sigmoids add up to one at logits of -60", "[reports]") {
  // sigmoid(-60) = e^-60 = 8.7565e-27, twice that is 1.7513e-26, and over 1e-20 more 1.7513e-6.
  CHECK(std::abs(weight_sum<double>(0, -60) - 1) < 1e-12);
  CHECK(std::abs(weight_sum<float>(0, -60) - 1) < 1e-6f);
  CHECK(std::abs(weight_sum<double>(1e-20, -60) - 1.7513e-6) < 1e-9);
  CHECK(weight_sum<float>(0, -200) == 0);  // all sigmoids are 0
  CHECK_THROWS_AS(weight_sum<double>(-1, 0), std::invalid_argument);
}
