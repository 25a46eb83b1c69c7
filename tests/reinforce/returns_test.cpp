#include "moe/reinforce/returns.hpp"

#include <array>

#include "../support.hpp"
#include "moe/reinforce/advantages.hpp"
#include "moe/reinforce/baseline.hpp"

using namespace moe;

TEST_CASE("rewards to go: by hand", "[reinforce]") {
  const std::array<double, 4> rewards{1, 0, -2, 4};
  std::array<double, 4> returns{};
  rewards_to_go(rewards, 1, returns);
  CHECK(returns == std::array<double, 4>{3, 2, 2, 4});
  rewards_to_go(rewards, 0.5, returns);
  CHECK(returns == std::array<double, 4>{1, 0, 0, 4});
  rewards_to_go(rewards, 0, returns);
  CHECK(returns == rewards);
  std::array<double, 4> in_place = rewards;
  rewards_to_go(in_place, 0.5, in_place);
  CHECK(in_place == std::array<double, 4>{1, 0, 0, 4});
  rewards_to_go({}, 1, {});
  CHECK_THROWS_WITH(rewards_to_go(rewards, 1, std::span(returns).first(3)),
                    Catch::Matchers::Contains("4 rewards, room for 3 returns"));
}

TEST_CASE("normalise: mean 0, standard deviation 1", "[reinforce]") {
  std::array<double, 4> values{1, 3, 3, 1};
  detail::normalise(values, 3);
  CHECK(values == std::array<double, 4>{-1, 1, 1, -1});
  // What is left of 0.1 less the mean of three times 0.1 is rounding, not an advantage.
  const double rounding = (0.1 + 0.1 + 0.1) / 3 - 0.1;
  CHECK(rounding != 0);
  std::array<double, 3> same{rounding, 0, rounding};
  detail::normalise(same, 0.1);
  CHECK(same == std::array<double, 3>{0, 0, 0});
  std::array<double, 1> one{7};
  detail::normalise(one, 7);
  CHECK(one[0] == 0);
  detail::normalise({}, 0);
}

TEST_CASE("running mean: by hand", "[reinforce]") {
  RunningMean mean;
  CHECK(mean.mean() == 0);
  mean.add(8, 0.5);
  CHECK(mean.mean() == 8);  // not pulled towards the 0 it starts from
  mean.add(2, 0.5);
  CHECK(mean.weight == 0.75);
  CHECK(mean.mean() == 4);  // (8·0.25 + 2·0.5) / 0.75
}
