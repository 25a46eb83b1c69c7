#include "moe/reinforce/rollout.hpp"

#include <limits>
#include <vector>

#include "policies.hpp"

using namespace moe;
using test::random_matrix;
using test::SmallPolicy;

namespace {

/// No recurrence: the same logits at every step, a row an input.
struct FixedLogits {
  using Scalar = double;
  using Input = Index;
  struct State {
    Matrix<double> logits;
  };
  using Tape = State;

  Matrix<double> table;

  Index symbols() const { return table.cols(); }
  void begin(std::span<const Index> inputs, Index samples, const std::optional<NoiseKey>&,
             State& state) const {
    state.logits.resize(static_cast<Index>(inputs.size()) * samples, table.cols());
    for (Index row = 0; row < state.logits.rows(); ++row) {
      state.logits.row(row) = table.row(inputs[detail::to_size(row / samples)]);
    }
  }
  const Matrix<double>& step(std::span<const Index>, State& state) const { return state.logits; }
  const Matrix<double>& forward(std::span<const Index>, Index, std::span<const Index>,
                                const std::optional<NoiseKey>&, Tape& tape) const {
    return tape.logits;
  }
  void backward(const Matrix<double>&, Tape&) {}
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}
};
static_assert(Policy<FixedLogits> && !PolicyWithHidden<FixedLogits>);
static_assert(PolicyWithHidden<SmallPolicy<double>>);

}  // namespace

TEST_CASE("rollout: samples have the stored probabilities", "[reinforce]") {
  constexpr Index symbols = 8;
  constexpr Index rows = 40000;
  const double temperature = GENERATE(0.5, 1.0, 2.0);
  FixedLogits policy{random_matrix(1, symbols, 3, 1.5)};
  const std::vector<Index> inputs(detail::to_size(rows), 0);
  Reinforce<FixedLogits> helper({.max_length = 1, .temperature = temperature, .seed = 17});
  Reinforce<FixedLogits>::Tape tape;
  helper.sample(policy, inputs, {.step = 5}, tape);
  std::vector<double> count(symbols, 0.0);
  std::vector<double> probability(symbols, 0.0);
  for (Index row = 0; row < rows; ++row) {
    const Index symbol = tape.rollout.sequence(row)[0];
    count[detail::to_size(symbol)] += 1;
    probability[detail::to_size(symbol)] =
        std::exp(tape.rollout.log_probability[tape.rollout.at(row, 0)]);
  }
  double sum = 0;
  for (Index v = 0; v < symbols; ++v) {
    const double weight = std::exp(policy.table(0, v) / temperature);
    sum += weight;
  }
  double chi_squared = 0;
  for (Index v = 0; v < symbols; ++v) {
    const double p = std::exp(policy.table(0, v) / temperature) / sum;
    CHECK(std::abs(probability[detail::to_size(v)] - p) < 1e-12);
    const double expected = p * static_cast<double>(rows);
    chi_squared += std::pow(count[detail::to_size(v)] - expected, 2) / expected;
  }
  CHECK(chi_squared < 24.3);  // the 99.9th percentile with 7 degrees of freedom
  CHECK(chi_squared > 0.59);  // the 0.1th: too good is as suspicious
}

TEST_CASE("rollout: rows and steps draw independently, and keys replay", "[reinforce]") {
  FixedLogits policy{Matrix<double>::Zero(1, 2)};
  policy.table(0, 0) = -30;  // hardly ever the end
  policy.table.conservativeResize(1, 3);
  policy.table(0, 2) = 0;
  const std::vector<Index> inputs(2000, 0);
  Reinforce<FixedLogits> helper({.max_length = 2, .seed = 1});
  Reinforce<FixedLogits>::Tape a, b, c;
  helper.sample(policy, inputs, {.step = 1}, a);
  helper.sample(policy, inputs, {.step = 1}, b);
  CHECK(a.rollout.symbols == b.rollout.symbols);
  helper.sample(policy, inputs, {.step = 2}, c);
  const auto agreement = [&](auto&& same) {
    double count = 0;
    for (Index row = 1; row < 2000; ++row) count += same(row) ? 1 : 0;
    return count / 1999;
  };
  const auto symbol = [](const Rollout& rollout, Index row, Index t) {
    return rollout.sequence(row)[detail::to_size(t)];
  };
  // Standard deviation of each: 0.5/√1999 = 0.0112.
  CHECK(std::abs(
            agreement([&](Index r) { return symbol(a.rollout, r, 0) == symbol(a.rollout, r, 1); }) -
            0.5) < 0.045);
  CHECK(std::abs(agreement([&](Index r) {
                   return symbol(a.rollout, r, 0) == symbol(a.rollout, r - 1, 0);
                 }) -
                 0.5) < 0.045);
  CHECK(std::abs(
            agreement([&](Index r) { return symbol(a.rollout, r, 0) == symbol(c.rollout, r, 0); }) -
            0.5) < 0.045);
  // A part of a batch draws what it draws in the whole.
  helper.sample(policy, std::vector<Index>(100, 0), {.step = 1, .first_token = 300}, b);
  for (Index row = 0; row < 100; ++row) {
    CHECK(symbol(b.rollout, row, 0) == symbol(a.rollout, 300 + row, 0));
  }
}

TEST_CASE("rollout: a reference beside the samples leaves them their dice", "[reinforce]") {
  SmallPolicy<double> policy({.mixture = false});  // noise is by row
  const std::vector<Index> inputs{0, 1, 0, 1, 0};
  const std::vector<Reinforce<SmallPolicy<double>>::Reference> references(5, {1, 2});
  Reinforce<SmallPolicy<double>> helper({.max_length = 4, .samples = 2, .seed = 1});
  Reinforce<SmallPolicy<double>>::Tape alone, beside;
  helper.sample(policy, inputs, {.step = 1}, alone);
  const auto reward = [](Index, std::span<const Index>, bool) { return 0.0; };
  helper.add_gradients(policy, std::span<const Index>(inputs), std::span(references), reward,
                       {.reinforce = 0.5}, {.step = 1}, beside);
  REQUIRE(beside.rollout.samples == 3);
  for (Index i = 0; i < 5; ++i) {
    for (Index s = 0; s < 2; ++s) {
      const auto one = alone.rollout.sequence(2 * i + s);
      const auto other = beside.rollout.sequence(3 * i + s);
      CHECK(std::vector<Index>(one.begin(), one.end()) ==
            std::vector<Index>(other.begin(), other.end()));
    }
  }
}

TEST_CASE("rollout: who runs into the limit is flagged and gets no end", "[reinforce]") {
  FixedLogits policy{Matrix<double>::Zero(2, 3)};
  policy.table.row(0) << -50, 0, 0;  // never ends
  policy.table.row(1) << 50, 0, 0;   // ends at once
  const std::vector<Index> inputs{0, 1};
  Reinforce<FixedLogits> helper({.max_length = 3});
  Reinforce<FixedLogits>::Tape tape;
  helper.sample(policy, inputs, {.step = 0}, tape);
  CHECK(tape.rollout.steps == 3);
  CHECK(tape.rollout.length == std::vector<Index>{3, 1});
  CHECK(tape.rollout.truncated == std::vector<std::uint8_t>{1, 0});
  for (const Index symbol : tape.rollout.sequence(0)) CHECK(symbol != 0);
  CHECK(tape.rollout.sequence(1)[0] == 0);
  // What was read: the start symbol, then what was written; nothing after the end.
  const Index first = tape.rollout.sequence(0)[0];
  const Index second = tape.rollout.sequence(0)[1];
  CHECK(tape.rollout.previous == std::vector<Index>{0, 0, first, -1, second, -1});
  // An end that is written at the last place is an end.
  helper = Reinforce<FixedLogits>({.max_length = 1});
  helper.sample(policy, std::vector<Index>{1}, {.step = 0}, tape);
  CHECK(tape.rollout.truncated[0] == 0);
}

TEST_CASE("rollout: the start symbol may be one that is never written", "[reinforce]") {
  FixedLogits policy{Matrix<double>::Zero(1, 3)};
  Reinforce<FixedLogits> helper({.end = 2, .start = 9, .max_length = 1});
  Reinforce<FixedLogits>::Tape tape;
  helper.decode(policy, std::vector<Index>{0}, tape);
  CHECK(tape.rollout.previous == std::vector<Index>{9});
  CHECK(tape.rollout.sequence(0)[0] == 0);  // ties go to the lower number
}

TEST_CASE("rollout: a forbidden symbol is never written and gets no gradient", "[reinforce]") {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  FixedLogits policy{Matrix<double>::Zero(1, 4)};
  policy.table.row(0) << -infinity, 0, -infinity, 1;
  const std::vector<Index> inputs(500, 0);
  Reinforce<FixedLogits> helper({.max_length = 3,
                                 .temperature = GENERATE(1.0, 0.5),
                                 .baseline = NoBaseline{},
                                 .entropy_bonus = GENERATE(0.0, 0.1)});
  Reinforce<FixedLogits>::Tape tape;
  tape.policy.logits = policy.table.row(0).replicate(1500, 1);
  const auto one = [](Index, std::span<const Index>, bool) { return 1.0; };
  const auto s = helper.add_gradients(policy, inputs, {}, one, {.reinforce = 1}, {.step = 0}, tape);
  for (const Index symbol : tape.rollout.symbols) CHECK((symbol == 1 || symbol == 3));
  CHECK(tape.dlogits.allFinite());
  CHECK(tape.dlogits.col(0).cwiseAbs().maxCoeff() < 1e-300);
  CHECK(tape.dlogits.col(2).cwiseAbs().maxCoeff() < 1e-300);
  CHECK(tape.dlogits.col(1).cwiseAbs().maxCoeff() > 0);
  CHECK(s.truncated == 1);
  CHECK(s.entropy > 0);
  CHECK(s.entropy < std::log(2.0));
}

TEST_CASE("rollout: decoding takes the most probable symbol, and no noise", "[reinforce]") {
  SmallPolicy<double> policy({.scale = 2});
  Reinforce<SmallPolicy<double>> helper({.max_length = 5, .samples = 3});
  Reinforce<SmallPolicy<double>>::Tape tape;
  const std::vector<Index> inputs{0, 1, 2, 3};
  helper.decode(policy, inputs, tape);
  CHECK(tape.rollout.rows() == 4);
  SmallPolicy<double>::Tape policy_tape;
  const Matrix<double> logits =
      policy.forward(inputs, 1, tape.rollout.previous, std::nullopt, policy_tape);
  for (Index row = 0; row < 4; ++row) {
    const auto sequence = tape.rollout.sequence(row);
    for (std::size_t t = 0; t < sequence.size(); ++t) {
      Index best = 0;
      logits.row(static_cast<Index>(t) * 4 + row).maxCoeff(&best);
      CHECK(sequence[t] == best);
    }
  }
}

TEST_CASE("draw: the mark at its extremes", "[reinforce]") {
  const std::vector<float> terms{0.0f, 0.25f, 0.0f, 0.75f, 0.0f};
  CHECK(detail::draw(5, terms.data(), 0.0) == 1);
  CHECK(detail::draw(5, terms.data(), 0.2499999) == 1);
  CHECK(detail::draw(5, terms.data(), 0.25) == 3);
  CHECK(detail::draw(5, terms.data(), 1 - 0x1p-53) == 3);
  CHECK(detail::draw(5, terms.data(), 1.0) == 3);  // never one of the zeros
  CHECK(detail::uniform_double(0, 0) == 0);
  CHECK(detail::uniform_double(0xFFFFFFFF, 0xFFFFFFFF) == 1 - 0x1p-53);
}
