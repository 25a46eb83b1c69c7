#include "moe/optim/learning_rate.hpp"

#include "../support.hpp"

using namespace moe;
using Catch::Matchers::WithinRel;

TEST_CASE("learning rate: warm-up, then the inverse square root", "[optim][learning_rate]") {
  const WarmUpInverseSquareRoot rate{.peak = 0.8, .warm_up = 4};
  CHECK_THAT(rate(1), WithinRel(0.2, 1e-14));
  CHECK_THAT(rate(3), WithinRel(0.6, 1e-14));
  CHECK_THAT(rate(4), WithinRel(0.8, 1e-14));
  CHECK_THAT(rate(5), WithinRel(0.8 * std::sqrt(0.8), 1e-14));
  CHECK_THAT(rate(16), WithinRel(0.4, 1e-14));
  CHECK_THAT(rate(400), WithinRel(0.08, 1e-14));
}

TEST_CASE("learning rate: warm-up, then a line to zero", "[optim][learning_rate]") {
  const WarmUpLinearDecay rate{.peak = 0.8, .warm_up = 4, .total = 12};
  CHECK_THAT(rate(1), WithinRel(0.2, 1e-14));
  CHECK_THAT(rate(4), WithinRel(0.8, 1e-14));
  CHECK_THAT(rate(5), WithinRel(0.7, 1e-14));
  CHECK_THAT(rate(11), WithinRel(0.1, 1e-14));
  CHECK(rate(12) == 0);
  CHECK(rate(1000) == 0);
  CHECK_THAT((WarmUpLinearDecay{.peak = 1, .warm_up = 0, .total = 4})(1), WithinRel(0.75, 1e-14));
}

TEST_CASE("learning rate: what is wrong is named", "[optim][learning_rate]") {
  CHECK_THROWS_AS(WarmUpLinearDecay{}(0), std::invalid_argument);
  CHECK_THROWS_WITH(WarmUpInverseSquareRoot{}(0),
                    "moe: learning rate: step = 0, must be at least 1");
  CHECK_THROWS_WITH((WarmUpInverseSquareRoot{.peak = 1, .warm_up = 0})(1),
                    "moe: WarmUpInverseSquareRoot.warm_up = 0, must be at least 1");
  CHECK_THROWS_WITH((WarmUpLinearDecay{.peak = 1, .warm_up = -1, .total = 5})(1),
                    "moe: WarmUpLinearDecay.warm_up = -1, must be at least 0");
  CHECK_THROWS_WITH((WarmUpLinearDecay{.peak = 1, .warm_up = 5, .total = 5})(1),
                    "moe: WarmUpLinearDecay.total = 5, must be above warm_up = 5");
}
