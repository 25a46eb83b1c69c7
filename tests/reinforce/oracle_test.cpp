#include <map>
#include <vector>

#include "policies.hpp"

/// \file
/// REINFORCE against the truth: with three symbols and at most four steps every sequence can be
/// enumerated, so the expected return is a sum, and its gradient known from differences.

using namespace moe;
using test::SmallPolicy;
using test::update_gradients;

namespace {

using Small = SmallPolicy<double>;
using Helper = Reinforce<Small>;
using Sequence = std::vector<Index>;

constexpr Index max_length = 4;
constexpr Index end_symbol = 0;
const std::vector<Index> one_input{2};
const NoiseKey key{.step = 7};

/// Differs by step, symbol, length and ending, and is not 0 before the end.
double step_reward(Index input, std::span<const Index> sequence, bool done) {
  const auto t = static_cast<double>(sequence.size());
  double reward = 0.3 * static_cast<double>(sequence.back()) - 0.1 * t;
  if (done) reward += sequence.back() == end_symbol ? 1.5 : -0.4;
  return reward + 0.05 * static_cast<double>(input);
}

/// Longer sequences earn more, at the end only.
double length_reward(Index, std::span<const Index> sequence, bool done) {
  return done ? static_cast<double>(sequence.size() * sequence.size()) : 0;
}

using Reward = double (*)(Index, std::span<const Index>, bool);

/// Σ discount^t·r_t.
double return_of(const Sequence& sequence, Reward reward, double discount) {
  double sum = 0;
  double factor = 1;
  for (std::size_t t = 0; t < sequence.size(); ++t) {
    sum +=
        factor * reward(one_input[0], std::span(sequence).first(t + 1), t + 1 == sequence.size());
    factor *= discount;
  }
  return sum;
}

/// All that may be written: 1 + 2 + 4 + 8 that end, and 16 that run into the limit.
void enumerate(Sequence& prefix, std::vector<Sequence>& all) {
  for (Index symbol = 0; symbol < 3; ++symbol) {
    prefix.push_back(symbol);
    if (symbol == end_symbol || static_cast<Index>(prefix.size()) == max_length) {
      all.push_back(prefix);
    } else {
      enumerate(prefix, all);
    }
    prefix.pop_back();
  }
}
std::vector<Sequence> all_sequences() {
  Sequence prefix;
  std::vector<Sequence> all;
  enumerate(prefix, all);
  return all;
}

/// Probability of a sequence, by the policy's own logits and a softmax in plain arithmetic.
double probability(const Small& policy, const Sequence& sequence, double temperature) {
  std::vector<Index> previous{end_symbol};
  previous.insert(previous.end(), sequence.begin(), sequence.end() - 1);
  Small::Tape tape;
  const Matrix<double>& logits = policy.forward(one_input, 1, previous, key, tape);
  double result = 1;
  for (std::size_t t = 0; t < sequence.size(); ++t) {
    double sum = 0;
    for (Index v = 0; v < 3; ++v) sum += std::exp(logits(static_cast<Index>(t), v) / temperature);
    result *= std::exp(logits(static_cast<Index>(t), sequence[t]) / temperature) / sum;
  }
  return result;
}

/// The gradient of the expected return, negated since the helper's is to be minimised.
Vector<double> expected_gradient(Small& policy, Reward reward, double temperature,
                                 double discount) {
  const std::vector<Sequence> all = all_sequences();
  Vector<double> gradient(parameter_count(policy));
  Index at = 0;
  for_each_parameter(policy, [&](const ParameterName&, Parameter<double>& p) {
    const Matrix<double> d = test::difference_gradient(
        p.value,
        [&] {
          double sum = 0;
          for (const Sequence& sequence : all) {
            sum -=
                probability(policy, sequence, temperature) * return_of(sequence, reward, discount);
          }
          return sum;
        },
        1e-3);
    for (Index i = 0; i < d.size(); ++i) gradient[at++] = d.data()[i];
  });
  return gradient;
}

std::vector<Sequence> written(const Rollout& rollout) {
  std::vector<Sequence> rows;
  for (Index row = 0; row < rollout.rows(); ++row) {
    const auto sequence = rollout.sequence(row);
    rows.emplace_back(sequence.begin(), sequence.end());
  }
  return rows;
}

/// Σ over what may be sampled of probability times the helper's gradient. What is sampled depends on
/// the seed of the dice, so seeds are tried until each outcome has come up.
Vector<double> weighted_sum(Small& policy, Helper::Config config, Reward reward,
                            const std::vector<double>& baseline_weights) {
  const std::vector<Sequence> all = all_sequences();
  std::size_t outcomes = 1;
  for (Index i = 0; i < config.samples; ++i) outcomes *= all.size();
  std::map<std::vector<Sequence>, std::uint64_t> seed_of;
  Helper::Tape tape;
  for (std::uint64_t seed = 0; seed_of.size() < outcomes; ++seed) {
    if (seed == 400000) FAIL("an outcome never came up");
    config.seed = seed;
    Helper(config).sample(policy, one_input, key, tape);
    seed_of.emplace(written(tape.rollout), seed);
  }
  Vector<double> sum = Vector<double>::Zero(parameter_count(policy));
  double total = 0;
  for (const auto& [sequences, seed] : seed_of) {
    config.seed = seed;
    Helper helper(config);
    Index at = 0;
    for_each_parameter(helper, [&](const ParameterName&, Parameter<double>& p) {
      for (Index i = 0; i < p.size(); ++i) {
        p.value.data()[i] = baseline_weights[detail::to_size(at++)];
      }
    });
    double weight = 1;
    for (const Sequence& sequence : sequences) {
      weight *= probability(policy, sequence, config.temperature);
    }
    total += weight;
    sum += weight *
           update_gradients(helper, policy, one_input, {}, reward, {.reinforce = 1}, key, tape);
  }
  CHECK(std::abs(total - 1) < 1e-12);
  return sum;
}

}  // namespace

namespace {

void check(Small& policy, const Helper::Baseline& baseline, Index samples, double temperature,
           double discount, Reward reward, const Vector<double>& expected) {
  INFO("baseline " << baseline.index() << ", temperature " << temperature);
  const Vector<double> actual = weighted_sum(policy,
                                             {.end = end_symbol,
                                              .max_length = max_length,
                                              .temperature = temperature,
                                              .discount = discount,
                                              .baseline = baseline,
                                              .samples = samples},
                                             reward, {0.3, -0.2, 0.5, 0.1});
  CHECK((actual - expected).cwiseAbs().maxCoeff() < 1e-8);
}

}  // namespace

TEST_CASE("reinforce: expected gradients are those of the expected return", "[reinforce]") {
  const auto [temperature, discount] =
      GENERATE(std::pair(1.0, 1.0), std::pair(0.7, 0.8), std::pair(1.6, 1.0));
  const Reward reward = GENERATE(&step_reward, &length_reward);
  // Without balance losses, which are not part of the return.
  Small policy({.hidden = 3, .experts = 3, .expert_hidden = 2, .balance = 0});
  const Vector<double> expected = expected_gradient(policy, reward, temperature, discount);
  CHECK(expected.cwiseAbs().maxCoeff() > 1e-3);
  for (const Helper::Baseline& baseline : std::initializer_list<Helper::Baseline>{
           NoBaseline{}, RunningMeanBaseline{.mean = {.sum = 0.35, .weight = 0.5}},
           LinearBaseline<double>({.hidden = 3}), GreedyBaseline{}}) {
    check(policy, baseline, 1, temperature, discount, reward, expected);
  }
}

// All pairs of two samples. Without a mixture, since the noise of one sequence's tokens would depend
// on the length of the other's; and the more alike the probabilities, the sooner all pairs are found.
TEST_CASE("reinforce: the same for leave-one-out, over all pairs of samples", "[reinforce]") {
  const auto [temperature, discount] = GENERATE(std::pair(1.0, 1.0), std::pair(0.7, 0.8));
  const Reward reward = GENERATE(&step_reward, &length_reward);
  Small policy({.hidden = 3, .mixture = false, .scale = 0.3});
  const Vector<double> expected = expected_gradient(policy, reward, temperature, discount);
  CHECK(expected.cwiseAbs().maxCoeff() > 1e-3);
  check(policy, LeaveOneOutBaseline{}, 2, temperature, discount, reward, expected);
}
