#include <cmath>

#include "sequences.hpp"

/// \file
/// The figures of an update.

using namespace moe;
using namespace moe::test;

TEST_CASE("reinforce: figures by hand", "[reinforce]") {
  SmallPolicy<double> policy({});
  Helper<> helper({.max_length = 2, .baseline = NoBaseline{}, .samples = 4, .seed = 1});
  Helper<>::Tape tape;
  const auto length = [](Index, std::span<const Index> sequence, bool done) {
    return done ? static_cast<double>(sequence.size()) : 0;
  };
  zero_gradients(policy);
  const auto s =
      helper.add_gradients(policy, inputs, {}, length, {.reinforce = 1}, {.step = 1}, tape);
  Index short_ones = 0;  // of 12 sequences
  Index truncated = 0;
  for (Index row = 0; row < 12; ++row) {
    const auto sequence = tape.rollout.sequence(row);
    short_ones += sequence.size() == 1;
    truncated += sequence.back() != 0;
    CHECK((tape.rollout.truncated[detail::to_size(row)] == 1) == (sequence.back() != 0));
  }
  REQUIRE(short_ones > 0);
  REQUIRE(truncated > 0);
  const double q = static_cast<double>(short_ones) / 12;
  CHECK(s.sampled_steps == 24 - short_ones);
  CHECK(s.forced_steps == 0);
  CHECK(std::abs(s.mean_length - (2 - q)) < 1e-12);
  CHECK(std::abs(s.mean_reward - (2 - q)) < 1e-12);
  CHECK(std::abs(s.reward_stddev - std::sqrt(q * (1 - q))) < 1e-12);
  CHECK(std::abs(s.truncated - static_cast<double>(truncated) / 12) < 1e-12);
  CHECK(s.entropy > 0);
  CHECK(s.entropy < std::log(3.0));
  CHECK(s.gradient_norm == gradient_norm(policy));
}
