#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "sequences.hpp"

/// \file
/// Errors: clear, and nothing is lost.

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;

namespace {

template <class H>
RunningMean running_mean(const H& helper) {
  return std::get<RunningMeanBaseline>(helper.baseline()).mean;
}

}  // namespace

TEST_CASE("reinforce: errors leave everything as it was", "[reinforce]") {
  SmallPolicy<double> policy({});
  Helper<> helper({.max_length = 4,
                   .baseline = RunningMeanBaseline{.mean = {.sum = 1, .weight = 1}},
                   .samples = 2});
  Helper<>::Tape tape;
  for_each_parameter(policy, [](const std::string&, auto& p) { p.gradient().setConstant(0.5); });
  const SmallPolicy<double> before = policy;
  const auto fails = [&](const std::vector<Index>& in, const References& refs, auto&& r,
                         const Objective& objective, const std::string& message) {
    CHECK_THROWS_WITH(helper.add_gradients(policy, in, refs, r, objective, {.step = 1}, tape),
                      Contains(message));
    CHECK(running_mean(helper).sum == 1);
    std::vector<Matrix<double>> expected;
    for_each_parameter(before, [&](const std::string&, const auto& p) {
      expected.push_back(p.value);
      expected.push_back(p.gradient());
    });
    std::size_t i = 0;
    for_each_parameter(policy, [&](const std::string&, const auto& p) {
      CHECK(same_bits(p.value, expected[i++]));
      CHECK(same_bits(p.gradient(), expected[i++]));
    });
  };
  const auto nan_reward = [](Index input, std::span<const Index>, bool done) {
    return done && input == 0 ? std::numeric_limits<double>::quiet_NaN() : 0.0;
  };
  const auto infinite = [](Index, std::span<const Index> s, bool) {
    return s.size() == 1 ? std::numeric_limits<double>::infinity() : 0.0;
  };
  const auto throws = [](Index, std::span<const Index>, bool) -> double {
    throw std::runtime_error("the scorer is out of order");
  };
  fails(inputs, {}, nan_reward, {.reinforce = 1}, "the reward of row 2 at step");
  fails(inputs, {}, infinite, {.reinforce = 1}, "the reward of row 0 at step 0 is inf");
  const auto overflows = [](Index, std::span<const Index>, bool) {
    return std::numeric_limits<double>::max();
  };
  fails({0, 1, 2, 3, 0, 1, 2, 3}, {}, overflows, {.reinforce = 1}, "has the return inf");
  fails(inputs, {}, throws, {.reinforce = 1}, "the scorer is out of order");
  fails({}, {}, reward, {.reinforce = 1}, "the batch is empty");
  fails({}, {}, reward, {}, "the batch is empty");
  fails(inputs, {{1}, {2}}, reward, {}, "2 references for 3 inputs");
  fails(inputs, {}, reward, {.reinforce = 0.5}, "0 references for 3 inputs");
  fails(inputs, {}, reward, {.reinforce = 1, .prefix = 1}, "0 references for 3 inputs");
  fails(inputs, {{1}, {3}, {1}}, reward, {}, "reference 1 has symbol 3");
  fails(inputs, {{1}, {1}, {1, -1}}, reward, {}, "reference 2 has symbol -1");
  fails(inputs, {{0}, {1}, {1}}, reward, {}, "reference 0 has symbol 0");
  fails(inputs, {{1, 1, 1, 1}, {1}, {1}}, reward, {}, "reference 0 has 4 symbols and an end");
  fails(inputs, references, reward, {.reinforce = 1.5}, "Objective.reinforce = 1.5");
  fails(inputs, references, reward, {.reinforce = std::nan("")}, "Objective.reinforce = ");
  fails(inputs, references, reward, {.reinforce = 1, .prefix = -1}, "Objective.prefix = -1");
  fails({99}, {}, reward, {.reinforce = 1}, "99");  // the policy's own complaint
}

TEST_CASE("reinforce: logits that are not finite are reported", "[reinforce]") {
  SmallPolicy<double> policy({.mixture = false});
  for_each_parameter(policy, [](const std::string& name, auto& p) {
    if (name == "logits.bias") p.value(0, 1) = std::numeric_limits<double>::quiet_NaN();
  });
  Helper<> helper({.max_length = 4});
  Helper<>::Tape tape;
  for (const double share : {0.0, 1.0}) {
    CHECK_THROWS_WITH(helper.add_gradients(policy, inputs, references, reward, {.reinforce = share},
                                           {.step = 1}, tape),
                      Contains("the logits of row 0 at step 0 are not finite"));
  }
  CHECK(joined_gradients(policy).isZero(0));
  CHECK_THROWS_WITH(helper.decode(policy, inputs, tape), Contains("are not finite"));
}

TEST_CASE("reinforce: a float policy's numbers end sooner than the reward's", "[reinforce]") {
  SmallPolicy<float> policy({});
  Helper<float> helper({.max_length = 4});
  Helper<float>::Tape tape;
  const auto huge = [](Index, std::span<const Index>, bool) { return 1e39; };
  CHECK_THROWS_WITH(
      helper.add_gradients(policy, inputs, {}, huge, {.reinforce = 1}, {.step = 1}, tape),
      Contains("not finite"));
  CHECK(joined_gradients(policy).isZero(0));
  CHECK(running_mean(helper).weight == 0);
  CHECK_THROWS_WITH(Helper<float>({.max_length = 4, .temperature = 1e-40}),
                    Contains("temperature"));
  CHECK_THROWS_WITH(Helper<float>({.max_length = 4, .temperature = 1e39}), Contains("temperature"));
}

TEST_CASE("reinforce: a reference that the policy forbids is reported", "[reinforce]") {
  SmallPolicy<double> policy({.mixture = false});
  for_each_parameter(policy, [](const std::string& name, auto& p) {
    if (name == "logits.bias") p.value(0, 2) = -std::numeric_limits<double>::infinity();
  });
  Helper<> helper({.max_length = 4});
  Helper<>::Tape tape;
  CHECK_THROWS_WITH(helper.add_gradients(policy, inputs, references, reward, {}, {.step = 0}, tape),
                    Contains("symbol 2 of row 2 at step 0 has probability 0"));
  CHECK(joined_gradients(policy).isZero(0));
}

TEST_CASE("reinforce: configurations out of range", "[reinforce]") {
  using Config = Helper<>::Config;
  const auto fails = [](const Config& config, const std::string& message) {
    CHECK_THROWS_WITH(Helper<>(config), Contains(message));
  };
  fails({.max_length = 0}, "max_length = 0");
  fails({.max_length = Index{1} << 62}, "max_length = ");
  fails({.end = -1, .max_length = 3}, "end = -1");
  fails({.start = -2, .max_length = 3}, "start = -2");
  fails({.max_length = 3, .temperature = 0}, "temperature = 0");
  fails({.max_length = 3, .temperature = std::nan("")}, "temperature = ");
  fails({.max_length = 3, .discount = 1.1}, "discount = 1.1");
  fails({.max_length = 3, .samples = 0}, "samples = 0");
  fails({.max_length = 3, .baseline = LeaveOneOutBaseline{}}, "samples = 1, must be at least 2");
  fails({.max_length = 3, .baseline = RunningMeanBaseline{.rate = 0}}, "rate = 0");
  CHECK_THROWS_WITH(LinearBaseline<double>({}), Contains("hidden = 0"));
  fails({.max_length = 3, .entropy_bonus = -1}, "entropy_bonus = -1");
  // What only the policy can tell.
  SmallPolicy<double> policy({});
  Helper<>::Tape tape;
  Helper<> end_too_large({.end = 3, .max_length = 3});
  CHECK_THROWS_WITH(end_too_large.decode(policy, inputs, tape), Contains("end = 3"));
  Helper<> wrong_width({.max_length = 3, .baseline = LinearBaseline<double>({.hidden = 4})});
  CHECK_THROWS_WITH(
      wrong_width.add_gradients(policy, inputs, {}, reward, {.reinforce = 1}, {.step = 0}, tape),
      Contains("Config.hidden = 4"));
  CHECK(joined_gradients(policy).isZero(0));
  Helper<> helper({.max_length = 3});
  CHECK_THROWS_WITH(
      helper.set_baseline(RunningMeanBaseline{.mean = {.sum = std::nan(""), .weight = 1}}),
      Contains("sum = "));
  CHECK_THROWS_WITH(helper.set_baseline(RunningMeanBaseline{.mean = {.sum = 0, .weight = -1}}),
                    Contains("weight = -1"));
}
