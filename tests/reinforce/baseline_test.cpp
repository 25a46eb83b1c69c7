#include <cmath>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "sequences.hpp"

/// \file
/// Baselines: what each subtracts, what it learns, and one that is not the library's.

using namespace moe;
using namespace moe::test;

namespace {

template <class H>
RunningMean running_mean(const H& helper) {
  return std::get<RunningMeanBaseline>(helper.baseline()).mean;
}

/// What a user may write: a constant, and a count of what it is told.
struct ConstantBaseline {
  double value = 0;
  int learned = 0;
  double last = 0;

  static constexpr bool needs_greedy_rollout = false;
  void check(Index samples) const {
    if (samples == 7) throw std::invalid_argument("seven samples");
  }
  template <Policy P>
  void predict(const SampledSteps<P>&, std::span<double> b) const {
    for (double& each : b) each = value;
  }
  template <Policy P>
  void learn(const SampledSteps<P>& steps, std::span<const double> b) {
    ++learned;
    last = steps.return_at(steps.count() - 1) - b.back();
  }
};
static_assert(BaselineFor<ConstantBaseline, SmallPolicy<float>>);
static_assert(BaselineFor<LinearBaseline<float>, SmallPolicy<float>>);
static_assert(!BaselineFor<LinearBaseline<float>, SmallPolicy<double>>);
static_assert(!BaselineFor<RunningMean, SmallPolicy<float>>);

}  // namespace

TEST_CASE("reinforce: the linear baseline and the policy do not train each other", "[reinforce]") {
  const NoiseKey key{.step = 3};
  SmallPolicy<double> policy({});
  Helper<> linear({.max_length = 6, .baseline = LinearBaseline<double>({.hidden = 5}), .seed = 1});
  Helper<> mean({.max_length = 6,
                 .baseline = RunningMeanBaseline{.mean = {.sum = 0.6, .weight = 1}},
                 .seed = 1});
  for_each_parameter(linear, [](const std::string& name, Parameter<double>& p) {
    if (name == "baseline.bias") p.value(0, 0) = 0.6;
  });
  Helper<>::Tape tape;
  // The same constant subtracted either way: a gradient of the squared error would show.
  const Vector<double> by_mean =
      update_gradients(mean, policy, inputs, {}, reward, {.reinforce = 1}, key, tape);
  const Vector<double> by_linear =
      update_gradients(linear, policy, inputs, {}, reward, {.reinforce = 1}, key, tape);
  CHECK(same_bits(by_mean, by_linear));

  // Its own gradient is that of the mean squared error, and of nothing else.
  for_each_parameter(linear, [](const std::string&, Parameter<double>& p) {
    p.value = test::random_matrix(p.value.rows(), p.value.cols(), 5);
  });
  update_gradients(linear, policy, inputs, {}, reward, {.reinforce = 1}, key, tape);
  test::check_parameter_gradients(linear, [&] {
    Helper<> copy = linear;
    SmallPolicy<double> same = policy;
    Helper<>::Tape other;
    const auto s = copy.add_gradients(same, inputs, {}, reward, {.reinforce = 1}, key, other);
    return s.baseline_error * s.baseline_error;
  });
}

TEST_CASE("reinforce: the running mean is that of batches before", "[reinforce]") {
  SmallPolicy<double> policy({});
  Helper<> helper({.max_length = 5, .baseline = RunningMeanBaseline{.rate = 0.25}, .samples = 2});
  Helper<>::Tape tape;
  const auto first =
      helper.add_gradients(policy, inputs, {}, reward, {.reinforce = 1}, {.step = 1}, tape);
  for (const double b : tape.baselines) CHECK(b == 0);
  CHECK(running_mean(helper).mean() == first.mean_return);
  helper.add_gradients(policy, inputs, references, reward, {.reinforce = 0}, {.step = 2}, tape);
  CHECK(running_mean(helper).mean() == first.mean_return);  // cross-entropy leaves it alone
  const auto second =
      helper.add_gradients(policy, inputs, {}, reward, {.reinforce = 1}, {.step = 3}, tape);
  for (const double b : tape.baselines) CHECK(b == first.mean_return);
  const double expected =
      (0.25 * 0.75 * first.mean_return + 0.25 * second.mean_return) / (0.25 * 0.75 + 0.25);
  CHECK(std::abs(running_mean(helper).mean() - expected) < 1e-12);
}

TEST_CASE("reinforce: normalised advantages", "[reinforce]") {
  SmallPolicy<double> policy({});
  Helper<> helper({.max_length = 5, .samples = 4, .normalise = true});
  Helper<>::Tape tape;
  helper.add_gradients(policy, inputs, {}, reward, {.reinforce = 1}, {.step = 1}, tape);
  double sum = 0;
  double squares = 0;
  for (const double a : tape.advantages) {
    sum += a;
    squares += a * a;
  }
  CHECK(std::abs(sum) < 1e-12);
  CHECK(std::abs(squares / static_cast<double>(tape.advantages.size()) - 1) < 1e-12);
}

TEST_CASE("reinforce: a baseline that is not the library's", "[reinforce]") {
  SmallPolicy<double> policy({});
  const NoiseKey key{.step = 3};
  Reinforce<SmallPolicy<double>, ConstantBaseline> own(
      {.max_length = 6, .baseline = ConstantBaseline{0.6}, .samples = 2, .seed = 1});
  decltype(own)::Tape own_tape;
  Helper<> mean({.max_length = 6,
                 .baseline = RunningMeanBaseline{.mean = {.sum = 0.6, .weight = 1}},
                 .samples = 2,
                 .seed = 1});
  Helper<>::Tape tape;
  const Objective objective{.reinforce = 0.5};
  CHECK(
      same_bits(update_gradients(own, policy, inputs, references, reward, objective, key, own_tape),
                update_gradients(mean, policy, inputs, references, reward, objective, key, tape)));
  const auto learned = [&] { return std::get<ConstantBaseline>(own.baseline()).learned; };
  CHECK(learned() == 1);
  CHECK(std::get<ConstantBaseline>(own.baseline()).last == tape.advantages.back());
  CHECK(parameter_count(own) == 0);
  // Cross-entropy has nothing to learn from, and neither has an update that fails.
  own.add_gradients(policy, inputs, references, reward, {}, key, own_tape);
  const auto throws = [](Index, std::span<const Index>, bool) -> double {
    throw std::runtime_error("the scorer is out of order");
  };
  CHECK_THROWS(own.add_gradients(policy, inputs, references, throws, objective, key, own_tape));
  CHECK(learned() == 1);
  CHECK_THROWS_WITH((Reinforce<SmallPolicy<double>, NoBaseline, ConstantBaseline>(
                        {.max_length = 6, .baseline = ConstantBaseline{}, .samples = 7})),
                    "seven samples");
}

TEST_CASE("reinforce: a baseline goes on where another stopped", "[reinforce]") {
  const AnyBaseline baseline =
      GENERATE(as<AnyBaseline>(), NoBaseline{}, RunningMeanBaseline{.rate = 0.3},
               LinearBaseline<double>({.hidden = 5}), GreedyBaseline{}, LeaveOneOutBaseline{});
  const Helper<>::Config config{.max_length = 6, .baseline = baseline, .samples = 2, .seed = 4};
  SmallPolicy<double> policy({});
  Helper<>::Tape tape;
  Helper<> whole(config);
  const auto update = [&](Helper<>& helper, std::uint64_t step) {
    const Vector<double> gradients = update_gradients(helper, policy, inputs, {}, reward,
                                                      {.reinforce = 1}, {.step = step}, tape);
    for_each_parameter(
        helper, [](const std::string&, Parameter<double>& p) { p.value -= 0.1 * p.gradient(); });
    return gradients;
  };
  for (std::uint64_t step = 0; step < 3; ++step) update(whole, step);
  Helper<> resumed(config);
  resumed.set_baseline(whole.baseline());
  const Vector<double> expected = update(whole, 3);
  CHECK(same_bits(update(resumed, 3), expected));
  if (std::holds_alternative<LinearBaseline<double>>(baseline)) {
    std::vector<std::string> names;
    for_each_parameter(resumed,
                       [&](const std::string& name, const auto&) { names.push_back(name); });
    CHECK(names == std::vector<std::string>{"baseline.weight", "baseline.bias"});
  }
}
