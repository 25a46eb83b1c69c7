#include <vector>

#include "sequences.hpp"

/// \file
/// The gradient pass repeats the rollout, noise and all.

using namespace moe;
using namespace moe::test;

TEMPLATE_TEST_CASE("reinforce: the gradient pass sees the probabilities of the rollout, to the bit",
                   "[reinforce]", float, double) {
  SmallPolicy<TestType> policy({.scale = 2});
  const Objective objective =
      GENERATE(Objective{1, 0}, Objective{0.5, 0}, Objective{1, 2}, Objective{0.5, 1});
  const test::Threads threads(GENERATE(1, 3));
  Helper<TestType> helper({.max_length = 7, .temperature = 1.3, .samples = 3, .seed = 8});
  typename Helper<TestType>::Tape tape;
  helper.add_gradients(policy, inputs, references, reward, objective, {.step = 6}, tape);
  REQUIRE(tape.rollout.steps >= 4);
  const Rollout& rollout = tape.rollout;
  for (Index row = 0; row < rollout.rows(); ++row) {
    for (Index t = 0; t < rollout.length[detail::to_size(row)]; ++t) {
      const bool forced = t < rollout.forced[detail::to_size(row)];
      const double replayed = tape.log_probability[rollout.at(row, t)];
      // What is forced is trained at temperature 1 and was not drawn.
      if (!forced) CHECK(rollout.log_probability[rollout.at(row, t)] == replayed);
      CHECK(replayed < 0);
    }
  }
  // The noise matters: another step draws other noise.
  typename Helper<TestType>::Tape other;
  helper.add_gradients(policy, inputs, references, reward, objective, {.step = 7}, other);
  CHECK(other.log_probability != tape.log_probability);
}

TEST_CASE("reinforce: the same bits on any number of threads", "[reinforce]") {
  Vector<double> one;
  for (const int count : {1, 2, 5}) {
    const test::Threads threads(count);
    SmallPolicy<float> policy({});
    Helper<float> helper({.max_length = 7,
                          .baseline = LinearBaseline<float>({.hidden = 5}),
                          .samples = 4,
                          .entropy_bonus = 0.01});
    Helper<float>::Tape tape;
    const Vector<double> gradients = update_gradients(helper, policy, inputs, references, reward,
                                                      {.reinforce = 0.5}, {.step = 6}, tape);
    if (count == 1) one = gradients;
    CHECK(same_bits(gradients, one));
  }
}

TEST_CASE("reinforce: balance losses join once and unscaled", "[reinforce]") {
  // With advantage 0 and no cross-entropy, what is left is the balance losses' gradient.
  const Objective objective = GENERATE(Objective{1, 0}, Objective{0.5, 0});
  SmallPolicy<double> policy({.balance = 0.2});
  SmallPolicy<double> without({.balance = 0});
  Helper<> helper({.max_length = 5, .baseline = NoBaseline{}, .samples = 2, .seed = 3});
  Helper<>::Tape tape;
  Vector<double> balance =
      update_gradients(helper, policy, inputs, references, no_reward, objective, {.step = 2}, tape);
  const std::vector<Index> previous = tape.rollout.previous;
  const Index samples = tape.rollout.samples;
  balance -= update_gradients(helper, without, inputs, references, no_reward, objective,
                              {.step = 2}, tape);
  SmallPolicy<double>::Tape policy_tape;
  const Matrix<double>& logits =
      policy.forward(inputs, samples, previous, NoiseKey{.step = 2}, policy_tape);
  zero_gradients(policy);
  policy.backward(Matrix<double>::Zero(logits.rows(), logits.cols()), policy_tape);
  CHECK(balance.cwiseAbs().maxCoeff() > 1e-6);
  CHECK((balance - joined_gradients(policy)).cwiseAbs().maxCoeff() < 1e-12);
}
