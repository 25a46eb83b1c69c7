#include <cmath>
#include <vector>

#include "moe/nn/softmax_cross_entropy.hpp"
#include "sequences.hpp"

/// \file
/// The gradients that one update adds, case by case.

using namespace moe;
using namespace moe::test;

TEMPLATE_TEST_CASE("reinforce: a forced reference with advantage 1 is cross-entropy, to the bit",
                   "[reinforce]", float, double) {
  using Small = SmallPolicy<TestType>;
  Small policy({.mixture = GENERATE(true, false)});
  const NoiseKey key{.step = 3};
  const std::vector<Index> input{1};
  typename Helper<TestType>::Tape tape;

  // The sequence that the dice of a seed write is made the reference.
  Helper<TestType> helper({.max_length = 5, .baseline = NoBaseline{}, .seed = 11});
  const auto earned = [](Index, std::span<const Index>, bool done) { return done ? 1.0 : 0.0; };
  const Vector<double> sampled =
      update_gradients(helper, policy, input, {}, earned, {.reinforce = 1}, key, tape);
  const auto sequence = tape.rollout.sequence(0);
  REQUIRE(sequence.size() >= 2);
  REQUIRE(tape.rollout.truncated[0] == 0);
  const References reference{{sequence.begin(), sequence.end() - 1}};
  const Matrix<TestType> dlogits = tape.dlogits;

  const Vector<double> forced =
      update_gradients(helper, policy, input, reference, no_reward, {.reinforce = 0}, key, tape);
  CHECK(same_bits(tape.dlogits, dlogits));
  CHECK(same_bits(forced, sampled));
  // The whole sequence as a prefix is the same again.
  const Vector<double> prefix = update_gradients(helper, policy, input, reference, no_reward,
                                                 {.reinforce = 1, .prefix = 9}, key, tape);
  CHECK(same_bits(prefix, sampled));
}

TEMPLATE_TEST_CASE("reinforce: its cross-entropy is SoftmaxCrossEntropy's", "[reinforce]", float,
                   double) {
  // Two symbols a sequence, so that the mean over symbols is half of that over sequences, to the bit.
  SmallPolicy<TestType> policy({.mixture = false});
  Helper<TestType> helper({.max_length = 5});
  typename Helper<TestType>::Tape tape;
  const References two{{1}, {2}, {1}};
  const auto statistics =
      helper.add_gradients(policy, inputs, two, no_reward, {}, {.step = 0}, tape);
  typename SmallPolicy<TestType>::Tape policy_tape;
  const std::vector<Index> previous{0, 0, 0, 1, 2, 1};
  const std::vector<Index> targets{1, 2, 1, 0, 0, 0};
  SoftmaxCrossEntropy<TestType> loss;
  typename SoftmaxCrossEntropy<TestType>::Tape loss_tape;
  const auto mean =
      loss.forward(policy.forward(inputs, 1, previous, {}, policy_tape), targets, loss_tape);
  const Matrix<TestType> expected = TestType{2} * loss.backward(loss_tape);
  CHECK(same_bits(tape.dlogits, expected));
  CHECK(std::abs(statistics.cross_entropy - static_cast<double>(mean)) < 1e-6);
  CHECK(statistics.forced_steps == 6);
  CHECK(statistics.sampled_steps == 0);
}

TEST_CASE("reinforce: cross-entropy's gradients agree with differences", "[reinforce]") {
  SmallPolicy<double> policy({.mixture = false});
  Helper<> helper({.max_length = 5});
  Helper<>::Tape tape;
  zero_gradients(policy);
  helper.add_gradients(policy, inputs, references, no_reward, {}, {.step = 2}, tape);
  test::check_parameter_gradients(policy, [&] {
    SmallPolicy<double> copy = policy;
    Helper<>::Tape other;
    const auto s =
        helper.add_gradients(copy, inputs, references, no_reward, {}, {.step = 2}, other);
    return s.cross_entropy * static_cast<double>(s.forced_steps) / 3;
  });
}

TEST_CASE("reinforce: a reward at one step gives no credit after it", "[reinforce]") {
  SmallPolicy<double> policy({.mixture = false});
  Helper<> helper({.max_length = 6, .baseline = NoBaseline{}, .seed = GENERATE(1u, 2u, 3u)});
  Helper<>::Tape tape;
  const std::size_t only = 2;  // the reward of the second symbol
  const auto once = [](Index, std::span<const Index> sequence, bool) {
    return sequence.size() == only ? 1.0 : 0.0;
  };
  helper.add_gradients(policy, inputs, {}, once, {.reinforce = 1}, {.step = 1}, tape);
  for (Index row = 0; row < 3; ++row) {
    const bool reached = tape.rollout.length[detail::to_size(row)] >= 2;
    for (Index t = 0; t < tape.rollout.steps; ++t) {
      CHECK(tape.dlogits.row(t * 3 + row).isZero(0) == (t >= 2 || !reached));
    }
  }
}

TEST_CASE("reinforce: advantages by hand", "[reinforce]") {
  // One input, two samples; the reward of each symbol is the symbol.
  SmallPolicy<double> policy({.mixture = false});
  const auto symbol = [](Index, std::span<const Index> sequence, bool) {
    return static_cast<double>(sequence.back());
  };
  Helper<>::Config config{
      .max_length = 4, .discount = 0.5, .baseline = LeaveOneOutBaseline{}, .samples = 2};
  Helper<>::Tape tape;
  const std::vector<Index> input{1};
  // Dice that write sequences of different lengths, the first of three symbols at least.
  for (;; ++config.seed) {
    Helper<>(config).sample(policy, input, {.step = 0}, tape);
    if (tape.rollout.length[0] >= 3 && tape.rollout.length[1] == 2) break;
  }
  Helper<> helper(config);
  helper.add_gradients(policy, input, {}, symbol, {.reinforce = 1}, {.step = 0}, tape);
  const auto a = tape.rollout.sequence(0);
  const auto b = tape.rollout.sequence(1);
  REQUIRE(a.size() >= 3);
  REQUIRE(b.size() == 2);
  const auto value = [](Index s) { return static_cast<double>(s); };
  double of_a = 0;
  for (std::size_t t = a.size(); t-- > 0;) of_a = value(a[t]) + 0.5 * of_a;
  const double of_b = value(b[0]) + 0.5 * value(b[1]);
  // Time-major: a's first, b's first, a's second, b's second.
  CHECK(std::abs(tape.advantages[0] - (of_a - of_b)) < 1e-14);
  CHECK(std::abs(tape.advantages[1] - (of_b - of_a)) < 1e-14);
  CHECK(std::abs(tape.advantages[3] - 0.5 * (value(b[1]) - of_a)) < 1e-14);
}

TEST_CASE("reinforce: the entropy bonus has the entropy's gradient", "[reinforce]") {
  // With nothing to be earned only the bonus is left, of the sequences that were written.
  SmallPolicy<double> policy({.mixture = false});
  Helper<> helper({.max_length = 5,
                   .temperature = 0.8,
                   .baseline = NoBaseline{},
                   .samples = 2,
                   .entropy_bonus = 0.3,
                   .seed = 6});
  Helper<>::Tape tape;
  zero_gradients(policy);
  const double weight = GENERATE(1.0, 0.25);
  helper.add_gradients(policy, inputs, references, no_reward, {.reinforce = weight}, {.step = 1},
                       tape);
  const Rollout rollout = tape.rollout;
  test::check_parameter_gradients(
      policy,
      [&] {
        SmallPolicy<double>::Tape other;
        const Matrix<double>& z =
            policy.forward(inputs, rollout.samples, rollout.previous, {}, other);
        double loss = 0;
        for (Index row = 0; row < rollout.rows(); ++row) {
          for (Index t = 0; t < rollout.length[detail::to_size(row)]; ++t) {
            const Vector<double> x = z.row(t * rollout.rows() + row);
            const bool forced = t < rollout.forced[detail::to_size(row)];
            const Vector<double> e = (forced ? x : Vector<double>(x / 0.8)).array().exp();
            const Vector<double> p = e / e.sum();
            if (forced) {
              loss -= (1 - weight) / 3 * std::log(p[rollout.symbols[rollout.at(row, t)]]);
            } else {
              loss += weight * 0.3 / 6 * (p.array() * p.array().log()).sum();
            }
          }
        }
        return loss;
      },
      1e-6);
}

TEST_CASE("reinforce: a blend is the weighted sum of its parts", "[reinforce]") {
  SmallPolicy<double> policy({.mixture = false});
  // Neither the dice nor a baseline know of the reference's row.
  const auto baseline =
      GENERATE(as<AnyBaseline>(), NoBaseline{}, LinearBaseline<double>({.hidden = 5}),
               GreedyBaseline{}, LeaveOneOutBaseline{});
  Helper<> helper({.max_length = 6, .baseline = baseline, .samples = 3, .seed = 5});
  Helper<>::Tape tape;
  const NoiseKey key{.step = 1};
  const auto part = [&](double share) {
    return update_gradients(helper, policy, inputs, references, reward, {.reinforce = share}, key,
                            tape);
  };
  const Vector<double> blend = part(0.3);
  CHECK(tape.rollout.rows() == 12);
  Helper<>::Tape sampled;
  helper.sample(policy, inputs, key, sampled);
  for (Index input = 0; input < 3; ++input) {
    for (Index sample = 0; sample < 3; ++sample) {
      const auto a = tape.rollout.sequence(4 * input + sample);
      const auto b = sampled.rollout.sequence(3 * input + sample);
      CHECK(std::equal(a.begin(), a.end(), b.begin(), b.end()));
    }
  }
  CHECK(test::relative_error(blend, Vector<double>(0.7 * part(0) + 0.3 * part(1))) < 1e-12);
}

TEST_CASE("reinforce: after a prefix only the rest is sampled", "[reinforce]") {
  SmallPolicy<double> policy({});
  const auto baseline =
      GENERATE(as<AnyBaseline>(), GreedyBaseline{}, LeaveOneOutBaseline{}, RunningMeanBaseline{});
  Helper<> helper({.max_length = 6, .baseline = baseline, .samples = 2, .seed = 5});
  Helper<>::Tape tape;
  const auto s = helper.add_gradients(policy, inputs, references, reward,
                                      {.reinforce = 1, .prefix = 2}, {.step = 1}, tape);
  CHECK(tape.rollout.forced == std::vector<Index>{2, 2, 1, 1, 2, 2});
  CHECK(tape.rollout.sequence(0)[0] == 1);
  CHECK(tape.rollout.sequence(1)[1] == 2);
  // The second reference is nothing but the end, so its rows have nothing to sample.
  CHECK(tape.rollout.length[2] == 1);
  CHECK(tape.rollout.truncated[2] == 0);
  CHECK(s.forced_steps == 10);
  CHECK(s.sampled_steps == tape.sampled.count());
  // At forced steps the gradient is that of cross-entropy.
  const Index rows = 6;
  const double p = std::exp(tape.log_probability[tape.rollout.at(0, 0)]);
  CHECK(std::abs(tape.dlogits(0 * rows + 0, 1) - (p - 1) / 6) < 1e-12);
}
