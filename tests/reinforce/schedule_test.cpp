#include "moe/reinforce/schedule.hpp"

#include "../support.hpp"

using namespace moe;

TEST_CASE("alternation: the share is kept exactly at every update", "[reinforce]") {
  const auto schedule = GENERATE(Alternation{.warm_up = 10, .rise = 100, .highest = 0.5},
                                 Alternation{.warm_up = 0, .rise = 7, .highest = 1},
                                 Alternation{.warm_up = 3, .rise = 1, .highest = 0.3},
                                 Alternation{.warm_up = 0, .rise = 1000, .highest = 0.9});
  Index updates = 0;
  double sum = 0;
  for (Index step = 1; step <= 2000; ++step) {
    const Index i = step - schedule.warm_up;
    if (i > 0) {
      sum += schedule.highest *
             std::min(1.0, static_cast<double>(i) / static_cast<double>(schedule.rise));
    }
    const Objective objective = schedule(step);
    CHECK((objective.reinforce == 0 || objective.reinforce == 1));
    CHECK(objective.prefix == 0);
    if (step <= schedule.warm_up) CHECK(objective.reinforce == 0);
    updates += objective.reinforce == 1;
    REQUIRE(std::abs(static_cast<double>(updates) - sum) < 1);
  }
  // Whoever resumes in the middle sees the same.
  Index later = 0;
  const Alternation resumed = schedule;
  for (Index step = 1001; step <= 2000; ++step) later += resumed(step).reinforce == 1;
  Index before = 0;
  for (Index step = 1; step <= 1000; ++step) before += schedule(step).reinforce == 1;
  CHECK(before + later == updates);
}

TEST_CASE("alternation: by hand", "[reinforce]") {
  // p = 1/4, 2/4, 3/4, 1, 1, ...: sums 0.25, 0.75, 1.5, 2.5, 3.5, 4.5
  const Alternation schedule{.warm_up = 2, .rise = 4, .highest = 1};
  const std::vector<double> expected{0, 0, 0, 0, 1, 1, 1, 1};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(schedule(static_cast<Index>(i) + 1).reinforce == expected[i]);
  }
  CHECK(schedule.sum(2) == 0);
  CHECK(schedule.sum(4) == 0.75);
  CHECK(schedule.sum(8) == 4.5);
}

TEST_CASE("shrinking prefix: by hand", "[reinforce]") {
  const ShrinkingPrefix schedule{.warm_up = 2, .max_length = 5, .shrink = 2, .stage = 3};
  const std::vector<Index> prefix{3, 3, 3, 1, 1, 1, 0, 0, 0, 0};
  CHECK(schedule(1).reinforce == 0);
  CHECK(schedule(2).reinforce == 0);
  for (std::size_t i = 0; i < prefix.size(); ++i) {
    const Objective objective = schedule(static_cast<Index>(i) + 3);
    CHECK(objective.reinforce == 1);
    CHECK(objective.prefix == prefix[i]);
  }
  CHECK(schedule(1000000000).prefix == 0);
}

TEST_CASE("blend: by hand", "[reinforce]") {
  const Blend schedule{.warm_up = 1, .rise = 4, .highest = 0.5};
  CHECK(schedule(1).reinforce == 0);
  CHECK(schedule(2).reinforce == 0.125);
  CHECK(schedule(5).reinforce == 0.5);
  CHECK(schedule(50).reinforce == 0.5);
}

TEST_CASE("schedules: in words", "[reinforce]") {
  CHECK(to_string(Alternation{.warm_up = 10, .rise = 20, .highest = 0.5}) ==
        "alternation: 10 updates of cross-entropy, then a share of REINFORCE up to 0.5 within 20");
  CHECK(to_string(ShrinkingPrefix{.warm_up = 10, .max_length = 20, .shrink = 2, .stage = 5}) ==
        "shrinking prefix: 10 updates of cross-entropy, then 20 symbols less 2 every 5 updates");
  CHECK(to_string(Blend{.warm_up = 10, .rise = 20, .highest = 0.5}) ==
        "blend: 10 updates of cross-entropy, then a weight of REINFORCE up to 0.5 within 20");
}

TEST_CASE("schedules: what is out of range", "[reinforce]") {
  using Catch::Matchers::Contains;
  CHECK_THROWS_WITH(Alternation{}(0), Contains("step = 0"));
  CHECK_THROWS_WITH(Alternation{.warm_up = -1}(1), Contains("warm_up = -1"));
  CHECK_THROWS_WITH(Alternation{.rise = 0}(1), Contains("rise = 0"));
  CHECK_THROWS_WITH(Alternation{.highest = 1.5}(1), Contains("highest = 1.5"));
  CHECK_THROWS_WITH(Blend{.highest = -0.5}(1), Contains("highest = -0.5"));
  CHECK_THROWS_WITH(Blend{.rise = 0}(1), Contains("rise = 0"));
  CHECK_THROWS_WITH((ShrinkingPrefix{.max_length = 0}(1)), Contains("max_length = 0"));
  CHECK_THROWS_WITH((ShrinkingPrefix{.max_length = 4, .shrink = 0}(1)), Contains("shrink = 0"));
  CHECK_THROWS_WITH((ShrinkingPrefix{.max_length = 4, .stage = 0}(1)), Contains("stage = 0"));
}
