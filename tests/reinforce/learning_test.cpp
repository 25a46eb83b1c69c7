#include <vector>

#include "moe/optim/adam.hpp"
#include "policies.hpp"

/// \file
/// What REINFORCE is for: it learns from a score without a derivative, and after cross-entropy also where it
/// does not find a good sequence from random weights.

using namespace moe;
using test::SmallPolicy;

namespace {

using Small = SmallPolicy<float>;
using Helper = Reinforce<Small>;

}  // namespace

TEST_CASE("learning: a two-armed bandit", "[reinforce][learning]") {
  // Symbol 1 earns 1 with probability 0.4, symbol 2 with 0.6; the end earns nothing.
  const auto baseline =
      GENERATE(as<Helper::Baseline>(), NoBaseline{}, RunningMeanBaseline{},
               LinearBaseline<float>({.hidden = 5}), GreedyBaseline{}, LeaveOneOutBaseline{});
  Small policy({.inputs = 1, .scale = 0.3});
  Helper helper({.max_length = 1, .baseline = baseline, .samples = 2, .seed = 2});
  std::uint64_t pull = 0;
  const auto arm = [&](Index, std::span<const Index> sequence, bool) {
    const double luck = static_cast<double>(uniform(philox({0, 0, 0, 0}, ++pull)[0]));
    const Index symbol = sequence[0];
    return symbol == 0 ? 0.0 : luck < (symbol == 1 ? 0.4 : 0.6) ? 1.0 : 0.0;
  };
  Adam<float> adam;
  Adam<float> baseline_adam;
  Helper::Tape tape;
  const std::vector<Index> inputs(16, 0);
  for (std::uint64_t step = 1; step <= 400; ++step) {
    zero_gradients(policy);
    zero_gradients(helper);
    helper.add_gradients(policy, inputs, {}, arm, {.reinforce = 1}, {.step = step}, tape);
    adam.update(policy, 0.02);
    if (parameter_count(helper) > 0) baseline_adam.update(helper, 0.02);
  }
  helper.sample(policy, std::vector<Index>(500, 0), {.step = 1000}, tape);
  double best = 0;
  for (Index row = 0; row < 1000; ++row) best += tape.rollout.sequence(row)[0] == 2 ? 1 : 0;
  INFO("baseline " << baseline.index());
  CHECK(best / 1000 > 0.8);
}

TEST_CASE("learning: copying, unsolvable from scratch, is solved with annealing",
          "[reinforce][learning]") {
  // Four of six symbols are read at once and are to be written one by one. Nothing earns anything but
  // exactly this: by chance one sequence in 7^5 = 16,807.
  using Copier = SmallPolicy<float, std::vector<Index>>;
  constexpr Index length = 4;
  constexpr Index words = 16;
  const auto make_batch = [](std::uint64_t step, std::vector<std::vector<Index>>& inputs,
                             std::vector<std::vector<Index>>& references) {
    inputs.assign(words, {});
    references.assign(words, {});
    for (Index i = 0; i < words; ++i) {
      const auto dice = philox({static_cast<std::uint32_t>(i), 0, 0, 0}, step);
      for (Index t = 0; t < length; ++t) {
        const auto symbol = static_cast<Index>(dice[detail::to_size(t)] % 6);
        inputs[detail::to_size(i)].push_back(6 * t + symbol);  // a number for each place and symbol
        references[detail::to_size(i)].push_back(1 + symbol);
      }
    }
  };
  const auto exact = [](const std::vector<Index>& input, std::span<const Index> sequence,
                        bool done) {
    if (!done || sequence.size() != length + 1 || sequence.back() != 0) return 0.0;
    for (std::size_t t = 0; t < length; ++t) {
      if (sequence[t] != 1 + input[t] % 6) return 0.0;
    }
    return 1.0;
  };
  const auto share_solved = [&](auto&& schedule, bool mixture = false) {
    Copier policy(
        {.inputs = 6 * length, .symbols = 7, .hidden = 32, .mixture = mixture, .scale = 0.4});
    Reinforce<Copier> helper({.max_length = length + 2, .samples = 4, .seed = 3});
    Reinforce<Copier>::Tape tape;
    Adam<float> adam;
    std::vector<std::vector<Index>> inputs;
    std::vector<std::vector<Index>> references;
    constexpr Index steps = 800;
    for (Index step = 1; step <= steps; ++step) {
      const auto number = static_cast<std::uint64_t>(step);
      make_batch(number, inputs, references);
      zero_gradients(policy);
      helper.add_gradients(policy, inputs, references, exact, schedule(step), {.step = number},
                           tape);
      clip_gradients(policy, 1.0);
      adam.update(policy, 0.01);
    }
    double reward = 0;
    constexpr std::uint64_t batches = 8;  // that were not trained on
    for (std::uint64_t batch = 0; batch < batches; ++batch) {
      make_batch((1u << 20) + batch, inputs, references);
      helper.decode(policy, inputs, tape);
      for (Index row = 0; row < words; ++row) {
        reward += exact(inputs[detail::to_size(row)], tape.rollout.sequence(row), true);
      }
    }
    return reward / static_cast<double>(words * batches);
  };
  CHECK(share_solved([](Index) { return Objective{1, 0}; }) < 0.05);
  CHECK(share_solved(Alternation{.warm_up = 300, .rise = 200, .highest = 0.8}, true) > 0.7);
  CHECK(share_solved(ShrinkingPrefix{.warm_up = 200, .max_length = 5, .stage = 100}) > 0.7);
  CHECK(share_solved(Blend{.warm_up = 300, .rise = 200, .highest = 0.5}) > 0.7);
}
