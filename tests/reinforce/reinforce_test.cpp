#include "moe/reinforce/reinforce.hpp"

#include <limits>
#include <span>
#include <vector>

#include "moe/nn/softmax_cross_entropy.hpp"
#include "moe/optim/sgd.hpp"
#include "policies.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using test::gradients_of;
using test::same_bits;
using test::SmallPolicy;
using test::update_gradients;

namespace {

template <class Scalar = double>
using Helper = Reinforce<SmallPolicy<Scalar>>;
using AnyBaseline = Helper<>::Baseline;
using References = std::vector<std::vector<Index>>;

const std::vector<Index> inputs{2, 0, 3};
const References references{{1, 2}, {}, {2, 2, 1}};

/// By step and symbol, so that all sequences earn different sums.
double reward(Index input, std::span<const Index> sequence, bool done) {
  return 0.7 * static_cast<double>(sequence.back()) - 0.2 * static_cast<double>(sequence.size()) +
         0.1 * static_cast<double>(input) + (done ? 1 : 0);
}

double no_reward(Index, std::span<const Index>, bool) { return 0; }

template <class H>
RunningMean running_mean(const H& helper) {
  return std::get<RunningMeanBaseline>(helper.baseline()).mean;
}

}  // namespace

// ---- Gradients.

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

TEST_CASE("reinforce: padding filled with NaN changes nothing", "[reinforce]") {
  const auto baseline =
      GENERATE(as<AnyBaseline>(), NoBaseline{}, RunningMeanBaseline{},
               LinearBaseline<double>({.hidden = 5}), GreedyBaseline{}, LeaveOneOutBaseline{});
  const Objective objective =
      GENERATE(Objective{0, 0}, Objective{0.4, 0}, Objective{1, 0}, Objective{1, 2});
  const NoiseKey key{.step = 5};
  Helper<>::Tape tape;
  const auto run = [&](bool nan, Vector<double>& of_helper) {
    SmallPolicy<double> policy({.nan_in_padding = nan});
    Helper<> helper(
        {.max_length = 6, .baseline = baseline, .samples = 3, .entropy_bonus = 0.1, .seed = 4});
    const Vector<double> gradients =
        update_gradients(helper, policy, inputs, references, reward, objective, key, tape);
    of_helper = gradients_of(helper);
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

// ---- Replay.

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
  CHECK((balance - gradients_of(policy)).cwiseAbs().maxCoeff() < 1e-12);
}

// ---- Baselines.

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

// ---- Errors: clear, and nothing is lost.

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
  CHECK(gradients_of(policy).isZero(0));
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
  CHECK(gradients_of(policy).isZero(0));
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
  CHECK(gradients_of(policy).isZero(0));
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
  CHECK(gradients_of(policy).isZero(0));
  Helper<> helper({.max_length = 3});
  CHECK_THROWS_WITH(
      helper.set_baseline(RunningMeanBaseline{.mean = {.sum = std::nan(""), .weight = 1}}),
      Contains("sum = "));
  CHECK_THROWS_WITH(helper.set_baseline(RunningMeanBaseline{.mean = {.sum = 0, .weight = -1}}),
                    Contains("weight = -1"));
}
