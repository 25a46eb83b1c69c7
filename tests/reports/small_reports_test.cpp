// Reports that are a line or two each.

#include "../support.hpp"
#include "moe/moe.hpp"

using namespace moe;

TEST_CASE("report: an optimizer is made from empty braces", "[reports]") {
  const Adam<float> adam({});
  CHECK(adam.config().beta1 == 0.9);
  const Sgd<float> sgd({});
  CHECK(sgd.config().momentum == 0);
  const FactoredAdam<float> factored({});
  CHECK(factored.config().beta2 == 0.999);
}

namespace {

/// The sum of a token's weights, all logits being `logit`.
template <class Scalar>
Scalar weight_sum(double epsilon, Scalar logit) {
  SoftmaxTopKGate<Scalar> gate({.width = 1,
                                .experts = 4,
                                .active = 2,
                                .score = Score::sigmoid,
                                .renormalise = true,
                                .renormalise_epsilon = epsilon});
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
