#include <algorithm>
#include <cmath>
#include <cstdint>
#include <variant>
#include <vector>

#include "moe/nn/softmax_cross_entropy.hpp"
#include "sequences.hpp"

/// \file
/// Sequences of unequal length in one batch: what pads the shorter ones takes no part in anything.

using namespace moe;
using namespace moe::test;

TEST_CASE("reinforce: padding filled with NaN changes nothing", "[reinforce]") {
  const auto baseline =
      GENERATE(as<AnyBaseline>(), NoBaseline{}, RunningMeanBaseline{},
               LinearBaseline<double>({.hidden = 5}), GreedyBaseline{}, LeaveOneOutBaseline{});
  const Objective objective =
      GENERATE(Objective{0, 0}, Objective{0.4, 0}, Objective{1, 0}, Objective{1, 2});
  const bool normalise = GENERATE(false, true);
  const NoiseKey key{.step = 5};
  Helper<>::Tape tape;
  const auto run = [&](bool nan, Vector<double>& of_helper) {
    SmallPolicy<double> policy({.nan_in_padding = nan});
    Helper<> helper({.max_length = 6,
                     .baseline = baseline,
                     .samples = 3,
                     .normalise = normalise,
                     .entropy_bonus = 0.1,
                     .seed = 4});
    const Vector<double> gradients =
        update_gradients(helper, policy, inputs, references, reward, objective, key, tape);
    of_helper = joined_gradients(helper);
    return gradients;
  };
  Vector<double> helper_clean;
  Vector<double> helper_nan;
  const Vector<double> clean = run(false, helper_clean);
  const Vector<double> nan = run(true, helper_nan);
  REQUIRE(tape.sampled.count() + static_cast<Index>(inputs.size()) <
          tape.rollout.steps * tape.rollout.rows());
  CHECK(nan.allFinite());
  CHECK(same_bits(nan, clean));
  CHECK(same_bits(helper_nan, helper_clean));
}

TEST_CASE("reinforce: a batch is the sum of its singles", "[reinforce]") {
  const auto baseline = GENERATE(as<AnyBaseline>(), NoBaseline{},
                                 RunningMeanBaseline{.mean = {.sum = 0.4, .weight = 0.8}},
                                 GreedyBaseline{}, LeaveOneOutBaseline{});
  const Objective objective =
      GENERATE(Objective{0, 0}, Objective{0.3, 0}, Objective{1, 0}, Objective{1, 1});
  SmallPolicy<double> policy({.mixture = false});
  const Helper<>::Config config{
      .max_length = 6, .discount = 0.9, .baseline = baseline, .samples = 2, .seed = 3};
  Helper<> helper(config);
  Helper<>::Tape tape;
  const Vector<double> batch =
      update_gradients(helper, policy, inputs, references, reward, objective, {.step = 9}, tape);
  Vector<double> sum = Vector<double>::Zero(batch.size());
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    Helper<> single(config);
    sum += update_gradients(single, policy, {inputs[i]}, {references[i]}, reward, objective,
                            {.step = 9, .first_token = static_cast<std::uint32_t>(2 * i)}, tape);
  }
  CHECK(test::relative_error(batch, Vector<double>(sum / 3)) < 1e-12);
}

TEST_CASE("reinforce: the end is trained, and nothing after it", "[reinforce]") {
  SmallPolicy<double> policy({});
  Helper<> helper({.max_length = 6, .baseline = NoBaseline{}, .seed = 2});
  Helper<>::Tape tape;
  const double share = GENERATE(0.0, 1.0);
  helper.add_gradients(policy, inputs, references, reward, {.reinforce = share}, {.step = 4}, tape);
  bool padding = false;
  for (Index row = 0; row < 3; ++row) {
    const Index length = tape.rollout.length[detail::to_size(row)];
    for (Index t = 0; t < tape.rollout.steps; ++t) {
      CHECK(tape.dlogits.row(t * 3 + row).isZero(0) == (t >= length));
      padding = padding || t >= length;
    }
  }
  CHECK(padding);
}

TEMPLATE_TEST_CASE("reinforce: its cross-entropy is SoftmaxCrossEntropy's with a mask",
                   "[reinforce]", float, double) {
  SmallPolicy<TestType> policy({.mixture = false, .nan_in_padding = true});
  Helper<TestType> helper({.max_length = 5});
  typename Helper<TestType>::Tape tape;
  const auto statistics =
      helper.add_gradients(policy, inputs, references, no_reward, {}, {.step = 0}, tape);
  std::vector<std::uint8_t> valid;
  mark_valid(tape.rollout.previous, valid);
  // Of {1, 2}, {} and {2, 2, 1}, each with its end; padding has a target that does not exist.
  CHECK(valid == std::vector<std::uint8_t>{1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1});
  const std::vector<Index> targets{1, 0, 2, 2, 99, 2, 0, 99, 1, -1, 99, 0};
  typename SmallPolicy<TestType>::Tape policy_tape;
  const SoftmaxCrossEntropy<TestType> loss;
  typename SoftmaxCrossEntropy<TestType>::Tape loss_tape;
  const auto mean = loss.forward(policy.forward(inputs, 1, tape.rollout.previous, {}, policy_tape),
                                 targets, loss_tape, valid);
  // The mean over 8 symbols to one over 3 sequences.
  const Matrix<TestType> expected = TestType{8} / TestType{3} * loss.backward(loss_tape);
  CHECK(test::relative_error(tape.dlogits, expected) < test::tolerance<TestType>);
  CHECK(std::abs(statistics.cross_entropy - static_cast<double>(mean)) < test::tolerance<TestType>);
  CHECK(statistics.forced_steps == 8);
}

TEST_CASE("reinforce: an update of unequal lengths in plain arithmetic", "[reinforce]") {
  // With a prefix of 2 the rows of the second input have nothing left to sample.
  const Index prefix = GENERATE(0, 2);
  const bool normalise = GENERATE(false, true);
  const double temperature = 0.8;
  const double discount = 0.9;
  const double b = 0.3;
  SmallPolicy<double> policy({.mixture = false, .nan_in_padding = true});
  Helper<> helper({.max_length = 6,
                   .temperature = temperature,
                   .discount = discount,
                   .baseline = RunningMeanBaseline{.mean = {.sum = b, .weight = 1}},
                   .samples = 4,
                   .normalise = normalise,
                   .seed = 7});
  Helper<>::Tape tape;
  const auto s = helper.add_gradients(policy, inputs, references, reward,
                                      {.reinforce = 1, .prefix = prefix}, {.step = 2}, tape);
  const Rollout& rollout = tape.rollout;
  constexpr Index rows = 12;
  REQUIRE(rollout.rows() == rows);

  struct Step {
    Index row, t;
    double advantage;
  };
  std::vector<Step> steps;  // time-major
  std::vector<Step> forced;
  double squared_errors = 0;
  double lengths = 0;
  double sum_of_returns = 0;
  double sequences = 0;
  for (Index t = 0; t < 6; ++t) {
    for (Index row = 0; row < rows; ++row) {
      const std::size_t input = detail::to_size(row / 4);
      const Index first = std::min(prefix, static_cast<Index>(references[input].size()) + 1);
      const auto sequence = rollout.sequence(row);
      const auto length = static_cast<Index>(sequence.size());
      if (t < first) forced.push_back({row, t, 1});
      if (t < first || t >= length) continue;
      double value = 0;
      for (Index u = t; u < length; ++u) {
        value += std::pow(discount, u - t) *
                 reward(inputs[input], sequence.first(detail::to_size(u + 1)), u + 1 == length);
      }
      squared_errors += (value - b) * (value - b);
      steps.push_back({row, t, value - b});
      if (t > first) continue;
      ++sequences;
      lengths += static_cast<double>(length);
      sum_of_returns += value;
    }
  }
  const auto count = static_cast<double>(steps.size());
  REQUIRE(sequences == (prefix == 0 ? 12 : 8));
  REQUIRE(steps.size() + forced.size() < detail::to_size(rows * rollout.steps));
  double mean = 0;
  double variance = 0;
  for (const Step& step : steps) mean += step.advantage / count;
  for (const Step& step : steps) variance += std::pow(step.advantage - mean, 2) / count;

  SmallPolicy<double>::Tape policy_tape;
  const Matrix<double>& logits = policy.forward(inputs, 4, rollout.previous, {}, policy_tape);
  Matrix<double> expected = Matrix<double>::Zero(logits.rows(), 3);
  double entropy = 0;
  REQUIRE(tape.advantages.size() == steps.size());
  for (std::size_t i = 0; i < steps.size(); ++i) {
    auto [row, t, advantage] = steps[i];
    const Index first = std::min(prefix, rollout.length[detail::to_size(row)]);
    if (normalise) advantage = (advantage - mean) / std::sqrt(variance);
    advantage *= std::pow(discount, t - first);
    CHECK(std::abs(tape.advantages[i] - advantage) < 1e-12);
    const Vector<double> e = (logits.row(t * rows + row) / temperature).array().exp();
    Vector<double> p = e / e.sum();
    entropy -= (p.array() * p.array().log()).sum() / count;
    p[rollout.symbols[rollout.at(row, t)]] -= 1;
    expected.row(t * rows + row) = advantage / (static_cast<double>(rows) * temperature) * p;
  }
  for (const auto& [row, t, weight] : forced) {
    const Vector<double> e = logits.row(t * rows + row).array().exp();
    Vector<double> p = e / e.sum();
    p[rollout.symbols[rollout.at(row, t)]] -= 1;
    expected.row(t * rows + row) = weight / static_cast<double>(rows) * p;
  }
  CHECK(test::relative_error(tape.dlogits, expected) < 1e-12);
  CHECK(std::abs(s.entropy - entropy) < 1e-12);
  CHECK(std::abs(s.baseline_error - std::sqrt(squared_errors / count)) < 1e-12);
  CHECK(std::abs(s.mean_length - lengths / sequences) < 1e-12);
  CHECK(std::abs(s.mean_return - sum_of_returns / sequences) < 1e-12);
  CHECK(s.sampled_steps == static_cast<Index>(steps.size()));
  CHECK(s.forced_steps == static_cast<Index>(forced.size()));
  // The baseline has learned the mean return.
  const RunningMean learned = std::get<RunningMeanBaseline>(helper.baseline()).mean;
  CHECK(std::abs(learned.mean() - (0.95 * b + 0.05 * sum_of_returns / sequences)) < 1e-12);
}
