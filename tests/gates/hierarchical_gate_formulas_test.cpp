#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/noisy_top_k_gate.hpp"
#include "naive_scores.hpp"
#include "token_choice_checks.hpp"

using namespace moe;
using detail::to_size;
using namespace moe::test;
using Config = HierarchicalGate<double>::Config;

namespace {

/// The gate a number at a time from the formulas of [S17].
struct Naive {
  Matrix<double> weight;  ///< T x E, 0 where not chosen
  Vector<double> importance, load;
  double loss = 0;

  Naive(HierarchicalGate<double>& gate, std::uint64_t seed, const Matrix<double>& x,
        const Pass& key) {
    const Config c = gate.config();
    const test::Named p = test::values_of(gate);
    const auto row = [&](const std::string& name, std::uint64_t stream, Index t) {
      return NaiveScores(p.at(name + ".weight"), p.at(name + ".noise_weight"),
                         derive_seed(seed, stream), c.noise, c.noise_floor, x, t, key);
    };

    const Index experts = c.groups * c.group_experts;
    weight.setZero(x.rows(), experts);
    Vector<double> group_load = Vector<double>::Zero(c.groups);
    Vector<double> group_size = Vector<double>::Zero(c.groups);
    Vector<double> member_load = Vector<double>::Zero(experts);
    for (Index t = 0; t < x.rows(); ++t) {
      const NaiveScores groups = row("primary", 0, t);
      const std::vector<double> group_weight = groups.softmax(c.top_k_groups);
      for (Index i = 0; i < c.groups; ++i) {
        if (c.noise) group_load[i] += groups.probability(c.top_k_groups, i);
        if (group_weight[to_size(i)] == 0) continue;
        group_size[i] += 1;
        if (!c.noise) group_load[i] += 1;
        const NaiveScores members =
            row("secondary." + std::to_string(i), static_cast<std::uint64_t>(i) + 1, t);
        const std::vector<double> member_weight = members.softmax(c.top_k);
        for (Index j = 0; j < c.group_experts; ++j) {
          const double g = member_weight[to_size(j)];
          weight(t, i * c.group_experts + j) = group_weight[to_size(i)] * g;
          member_load[i * c.group_experts + j] +=
              c.noise ? members.probability(c.top_k, j) : (g > 0 ? 1 : 0);
        }
      }
    }
    importance = weight.colwise().sum().transpose();
    load.setZero(experts);
    for (Index e = 0; e < experts; ++e) {
      const Index i = e / c.group_experts;
      if (group_size[i] > 0) load[e] = group_load[i] * member_load[e] / group_size[i];
    }
    loss =
        c.importance_weight * naive_cv_squared(importance) + c.load_weight * naive_cv_squared(load);
  }
};

}  // namespace

TEST_CASE("hierarchical gate: what the formulas say", "[routing][gate]") {
  std::uint64_t seed = 1;
  for (const bool noise : {true, false}) {
    for (const Index groups : {1, 2, 5}) {
      for (const Index members : {1, 2, 7}) {
        for (const Index top_k_groups : {Index{1}, groups}) {
          for (const Index top_k : {Index{1}, (members + 1) / 2, members}) {
            for (const Index tokens : {1, 2, 23}) {
              INFO("a " << groups << ", b " << members << ", " << top_k_groups << " groups of "
                        << top_k << " top_k, " << tokens << " tokens, noise " << noise);
              HierarchicalGate<double> gate({.width = 3,
                                             .groups = groups,
                                             .group_experts = members,
                                             .top_k_groups = top_k_groups,
                                             .top_k = top_k,
                                             .noise = noise,
                                             .noise_floor = 0.05,
                                             .importance_weight = 0.7,
                                             .load_weight = 1.3},
                                            ++seed);
              test::randomize(gate, seed);
              const Matrix<double> x = random_matrix(tokens, 3, seed);
              const Pass key{.step = (std::uint64_t{1} << 33) + 2, .first_token = 9};
              HierarchicalGate<double>::Tape tape;
              const Routing<double>& routing = gate.forward(x, tape, key);
              const Naive naive(gate, seed, x, key);
              REQUIRE(routing.tokens() == tokens);
              REQUIRE(routing.slots() == tokens * top_k_groups * top_k);
              CHECK(relative_error(test::dense_weights(routing), naive.weight) < 1e-13);
              CHECK(relative_error(tape.balance.importance, naive.importance) < 1e-13);
              CHECK(relative_error(tape.balance.load, naive.load) < 1e-12);
              CHECK(std::abs(tape.balance.loss - naive.loss) < 1e-12 * std::max(1.0, naive.loss));
            }
          }
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("hierarchical gate: a token of two groups of two worked by hand",
                   "[routing][gate]", float, double) {
  using S = TestType;
  HierarchicalGate<S> gate({.width = 1,
                            .groups = 2,
                            .group_experts = 2,
                            .top_k_groups = 2,
                            .top_k = 2,
                            .noise = false,
                            .importance_weight = 0,
                            .load_weight = 1},
                           0);
  const auto log3 = static_cast<S>(std::log(3.0));
  // Gprimary = (3/4, 1/4), G_0 = (1/2, 1/2), G_1 = (4/5, 1/5).
  parameter(gate, "primary.weight").value << log3, 0;
  parameter(gate, "secondary.1.weight").value << static_cast<S>(std::log(4.0)), 0;
  typename HierarchicalGate<S>::Tape tape;
  const Routing<S>& routing = gate.forward(Matrix<S>{{1}}, tape, {.step = 0});
  const double tolerance = sizeof(S) == 4 ? 1e-6 : 1e-9;
  const auto near = [&](double value) { return Catch::Matchers::WithinAbs(value, tolerance); };
  CHECK(routing.expert == Indices{0, 1, 2, 3});
  const double weights[] = {3.0 / 8, 3.0 / 8, 1.0 / 5, 1.0 / 20};
  for (Index e = 0; e < 4; ++e) {
    CHECK_THAT(static_cast<double>(routing.weight[to_size(e)]), near(weights[e]));
    CHECK_THAT(static_cast<double>(tape.balance.importance[e]), near(weights[e]));
    CHECK(tape.balance.load[e] == 1);
  }
  // Deviations 1/8, 1/8, -1/20, -1/5 from 1/4: squares of sum 59/800, so CV² = 59/3200·16.
  CHECK_THAT(static_cast<double>(cv_squared(tape.balance.importance)), near(59.0 / 200));
  CHECK(tape.balance.loss == 0);

  // Of dL/dG = (1, 0, 0, 0) the primary gate gets (1/2, 0), dh_0 = 3/4·(1/2 − 3/8), and secondary
  // gate 0 gets (3/4, 0), dh_0 = 1/2·(3/4 − 3/8).
  const Matrix<S>& dx = test::gate_dx(gate, Matrix<S>{{1}}, std::vector<S>{1, 0, 0, 0}, tape);
  const auto check = [&](const char* name, double first) {
    const Matrix<S>& gradient = parameter(gate, name).gradient();
    CHECK_THAT(static_cast<double>(gradient(0, 0)), near(first));
    CHECK_THAT(static_cast<double>(gradient(0, 1)), near(-first));
  };
  check("primary.weight", 3.0 / 32);
  check("secondary.0.weight", 3.0 / 16);
  check("secondary.1.weight", 0);
  CHECK_THAT(static_cast<double>(dx(0, 0)), near(3.0 / 32 * std::log(3.0)));
}

TEST_CASE("hierarchical gate: the load of three tokens worked by hand", "[routing][gate]") {
  // One group of two and one expert of two for a token: a threshold is the other's h. With
  // W_noise = 0, s = log 2 + 0.01. Tokens 0 and 2 go to group 1, token 1 to group 0.
  HierarchicalGate<double> gate(
      {.width = 1, .groups = 2, .group_experts = 2, .top_k_groups = 1, .top_k = 1}, 5);
  parameter(gate, "primary.weight").value << -4, 4;
  parameter(gate, "secondary.0.weight").value << 0.1, 0.2;
  parameter(gate, "secondary.1.weight").value << 0.3, -0.2;
  const Matrix<double> x{{1}, {-1}, {1.5}};
  HierarchicalGate<double>::Tape tape;
  const Routing<double>& routing = gate.forward(x, tape, {.step = 9});
  REQUIRE(routing.expert[0] / 2 == 1);
  REQUIRE(routing.expert[1] / 2 == 0);
  REQUIRE(routing.expert[2] / 2 == 1);
  const double s = std::log(2.0) + 0.01;
  const auto probability = [&](std::uint64_t stream, std::uint32_t token, Index i, double mine,
                               double other) {
    const auto words = philox({0, token, 9, 0}, derive_seed(5, stream));
    const auto n = static_cast<double>(standard_normal(words[to_size(1 - i)]));
    return test::naive_cdf((mine - other - n * s) / s);
  };
  const double group0 =
      probability(0, 0, 0, -4, 4) + probability(0, 1, 0, 4, -4) + probability(0, 2, 0, -6, 6);
  const double group1 =
      probability(0, 0, 1, 4, -4) + probability(0, 1, 1, -4, 4) + probability(0, 2, 1, 6, -6);
  const double expected[] = {
      group0 * probability(1, 1, 0, -0.1, -0.2), group0 * probability(1, 1, 1, -0.2, -0.1),
      group1 * (probability(2, 0, 0, 0.3, -0.2) + probability(2, 2, 0, 0.45, -0.3)) / 2,
      group1 * (probability(2, 0, 1, -0.2, 0.3) + probability(2, 2, 1, -0.3, 0.45)) / 2};
  for (Index e = 0; e < 4; ++e) {
    CHECK_THAT(tape.balance.load[e], Catch::Matchers::WithinAbs(expected[e], 1e-13));
  }
}

TEST_CASE("hierarchical gate: groups of one are a flat gate, and so is one group",
          "[routing][gate]") {
  NoisyTopKGate<double> flat({.width = 3, .experts = 6, .top_k = 2, .noise = false}, 1);
  test::randomize(flat, 4);
  const Matrix<double> x = random_matrix(9, 3, 5);
  NoisyTopKGate<double>::Tape expected;
  flat.forward(x, expected, {.step = 0});
  const Matrix<double> r = random_matrix(9, 6, 6);
  const Matrix<double> flat_dx = test::gate_dx(flat, x, dweight_of(expected.routing, r), expected);
  for (const bool one_group : {false, true}) {
    HierarchicalGate<double> gate({.width = 3,
                                   .groups = one_group ? 1 : 6,
                                   .group_experts = one_group ? 6 : 1,
                                   .top_k_groups = one_group ? 1 : 2,
                                   .top_k = one_group ? 2 : 1,
                                   .noise = false},
                                  1);
    test::randomize(gate, 9);
    Parameter<double>& weight =
        parameter(gate, one_group ? "secondary.0.weight" : "primary.weight");
    weight.value = parameter(flat, "weight").value;
    HierarchicalGate<double>::Tape tape;
    const Routing<double>& routing = gate.forward(x, tape, {.step = 0});
    CHECK(routing.expert == expected.routing.expert);
    CHECK(routing.weight == expected.routing.weight);
    CHECK(same_bits(tape.balance.load, expected.balance.load));
    CHECK(tape.balance.loss == expected.balance.loss);
    CHECK(relative_error(test::gate_dx(gate, x, dweight_of(routing, r), tape), flat_dx) < 1e-14);
    CHECK(relative_error(weight.gradient(), parameter(flat, "weight").gradient()) < 1e-14);
  }
}
