#include "moe/gates/hierarchical_gate.hpp"

#include <set>

#include "../naive_layer.hpp"
#include "gates.hpp"
#include "moe/gates/noisy_top_k_gate.hpp"
#include "moe/optim/sgd.hpp"

using namespace moe;
using detail::to_size;
using test::dweight_of;
using test::loss_of;
using test::parameter;
using test::random_matrix;
using test::relative_error;
using test::same_bits;
using Indices = std::vector<Index>;

namespace {

using Config = HierarchicalGate<double>::Config;

/// The gate a number at a time from the formulas of [S17]. It shares with the library the names and
/// values of the parameters and the random numbers.
struct Naive {
  Matrix<double> weight;  ///< T x E, 0 where not chosen
  Vector<double> importance, load;
  double loss = 0;

  /// Scores of one token and gate, and what follows from them.
  struct Row {
    std::vector<double> clean, scale, h;

    /// The k-th largest h without i.
    double threshold(Index k, Index i) const {
      std::vector<double> others = h;
      others.erase(others.begin() + i);
      std::sort(others.begin(), others.end(), std::greater<>());
      return others[to_size(k - 1)];
    }
    std::vector<double> softmax(Index k) const {
      std::vector<double> g(h.size(), 0.0);
      double total = 0;
      for (Index i = 0; i < static_cast<Index>(h.size()); ++i) {
        if (k == static_cast<Index>(h.size()) || h[to_size(i)] > threshold(k, i)) {
          g[to_size(i)] = std::exp(h[to_size(i)]);
          total += g[to_size(i)];
        }
      }
      for (double& value : g) value /= total;
      return g;
    }
    double probability(Index k, Index i) const {
      if (k == static_cast<Index>(h.size())) return 1;
      return test::naive_cdf((clean[to_size(i)] - threshold(k, i)) / scale[to_size(i)]);
    }
  };

  Naive(HierarchicalGate<double>& gate, std::uint64_t seed, const Matrix<double>& x,
        const Pass& key) {
    const Config c = gate.config();
    const test::Named p = test::values_of(gate);
    const auto row = [&](const std::string& name, std::uint64_t stream, Index t) {
      const Matrix<double>& w = p.at(name + ".weight");
      const Matrix<double>& w_noise = p.at(name + ".noise_weight");
      Row r;
      for (Index i = 0; i < w.cols(); ++i) {
        double clean = 0;
        double raw = 0;
        for (Index d = 0; d < x.cols(); ++d) {
          clean += x(t, d) * w(d, i);
          raw += x(t, d) * w_noise(d, i);
        }
        const auto words = philox(
            {static_cast<std::uint32_t>(i / 4), key.first_token + static_cast<std::uint32_t>(t),
             static_cast<std::uint32_t>(key.step), static_cast<std::uint32_t>(key.step >> 32)},
            derive_seed(seed, stream));
        const auto n = static_cast<double>(standard_normal(words[to_size(i % 4)]));
        r.clean.push_back(clean);
        r.scale.push_back(std::log1p(std::exp(raw)) + c.noise_floor);
        r.h.push_back(c.noise ? clean + n * r.scale.back() : clean);
      }
      return r;
    };

    const Index experts = c.groups * c.group_experts;
    weight.setZero(x.rows(), experts);
    Vector<double> group_load = Vector<double>::Zero(c.groups);
    Vector<double> group_size = Vector<double>::Zero(c.groups);
    Vector<double> member_load = Vector<double>::Zero(experts);
    for (Index t = 0; t < x.rows(); ++t) {
      const Row groups = row("primary", 0, t);
      const std::vector<double> group_weight = groups.softmax(c.top_k_groups);
      for (Index i = 0; i < c.groups; ++i) {
        if (c.noise) group_load[i] += groups.probability(c.top_k_groups, i);
        if (group_weight[to_size(i)] == 0) continue;
        group_size[i] += 1;
        if (!c.noise) group_load[i] += 1;
        const Row members =
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
    const auto cv_squared = [](const Vector<double>& v) {
      if (v.size() < 2) return 0.0;
      const double mean = v.sum() / static_cast<double>(v.size());
      double variance = 0;
      for (Index i = 0; i < v.size(); ++i) variance += (v[i] - mean) * (v[i] - mean);
      return mean == 0 ? 0 : variance / static_cast<double>(v.size()) / (mean * mean);
    };
    loss = c.importance_weight * cv_squared(importance) + c.load_weight * cv_squared(load);
  }
};

/// How far the choices of both levels are from a tie.
double choice_margin(const HierarchicalGate<double>& gate,
                     const HierarchicalGate<double>::Tape& tape) {
  const Config& c = gate.config();
  return std::min(
      test::choice_margin(c.noise ? tape.primary.noisy : tape.primary.clean, c.top_k_groups),
      test::choice_margin(c.noise ? tape.secondary.noisy : tape.secondary.clean, c.top_k));
}

/// Checks every weight and x at a point away from ties.
void check_gradients(const Config& config, Index tokens, double weights = 0.8, double inputs = 1) {
  INFO("a " << config.groups << ", b " << config.group_experts << ", " << config.top_k_groups
            << " groups of " << config.top_k << " top_k, loss weights " << config.importance_weight
            << " and " << config.load_weight << ", noise " << config.noise << ", weights times "
            << weights << ", x times " << inputs);
  HierarchicalGate<double> gate(config, 77);
  HierarchicalGate<double>::Tape tape;
  const Pass key{.step = 3, .first_token = 5};
  Matrix<double> x;
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 400; ++seed) {
    test::randomize(gate, seed, weights);
    x = random_matrix(tokens, config.width, seed, inputs);
    gate.forward(x, tape, key);
    clear = choice_margin(gate, tape) > 2e-3;
  }
  REQUIRE(clear);
  const Matrix<double> r = random_matrix(tokens, gate.experts(), 8);
  const Matrix<double> dx = test::gate_dx(gate, x, dweight_of(tape.routing, r), tape);
  const double steep = weights * inputs > 5 ? 0.02 : 1;
  const auto loss = [&] { return loss_of(gate, x, r, key); };
  test::check_scaled_gradients(gate, dx, x, loss, weights, inputs, steep);
}

/// Weights by token and expert.
template <class Scalar>
Matrix<Scalar> dense(const Routing<Scalar>& routing) {
  Matrix<Scalar> g = Matrix<Scalar>::Zero(routing.tokens(), routing.experts);
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index s = routing.token_offsets[to_size(t)]; s < routing.token_offsets[to_size(t) + 1];
         ++s) {
      g(t, routing.expert[to_size(s)]) = routing.weight[to_size(s)];
    }
  }
  return g;
}

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
              CHECK(relative_error(dense(routing), naive.weight) < 1e-13);
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

TEST_CASE("hierarchical gate: gradients are derivatives for every shape", "[routing][gate]") {
  for (const Index groups : {1, 2, 4}) {
    for (const Index members : {1, 2, 5}) {
      for (Index top_k_groups = 1; top_k_groups <= groups; ++top_k_groups) {
        for (Index top_k = 1; top_k <= members; top_k += 2) {
          check_gradients({.width = 2,
                           .groups = groups,
                           .group_experts = members,
                           .top_k_groups = top_k_groups,
                           .top_k = top_k,
                           .importance_weight = 0.7,
                           .load_weight = 1.3},
                          4);
        }
      }
    }
  }
}

TEST_CASE("hierarchical gate: gradients are derivatives for every pair of loss weights",
          "[routing][gate]") {
  for (const bool noise : {true, false}) {
    for (const double importance : {0.0, 0.9}) {
      for (const double load : {0.0, 1.7}) {
        for (const Index top_k : {1, 2}) {
          check_gradients({.width = 3,
                           .groups = 3,
                           .group_experts = 4,
                           .top_k_groups = top_k,
                           .top_k = top_k,
                           .noise = noise,
                           .importance_weight = importance,
                           .load_weight = load},
                          6);
        }
      }
    }
  }
}

TEST_CASE("hierarchical gate: gradients are derivatives at every scale", "[routing][gate]") {
  for (const double weights : {1e-2, 1.0, 10.0}) {
    for (const double inputs : {1e-2, 1.0, 10.0}) {
      check_gradients({.width = 3,
                       .groups = 3,
                       .group_experts = 3,
                       .top_k_groups = 2,
                       .top_k = 2,
                       .noise_floor = 0.05,
                       .importance_weight = 1,
                       .load_weight = 2},
                      4, weights, inputs);
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

TEST_CASE("hierarchical gate: every slot is in one expert's list with its weight",
          "[routing][gate]") {
  std::uint32_t draws = 0;
  const auto random = [&](Index most) {
    return 1 + static_cast<Index>(philox({draws++, 0, 0, 0}, 5)[0]) % most;
  };
  for (int round = 0; round < 60; ++round) {
    const Index groups = random(20);
    const Index members = random(9);
    const Index top_k_groups = random(groups);
    const Index top_k = random(members);
    const Index tokens = random(40) - 1;
    HierarchicalGate<float> gate({.width = 5,
                                  .groups = groups,
                                  .group_experts = members,
                                  .top_k_groups = top_k_groups,
                                  .top_k = top_k},
                                 7);
    test::randomize(gate, static_cast<std::uint64_t>(round));
    HierarchicalGate<float>::Tape tape;
    gate.forward(random_matrix<float>(tokens, 5, static_cast<std::uint64_t>(round)), tape,
                 {.step = 0});
    const Routing<float>& routing = tape.routing;
    Dispatch<float> dispatch;
    sort_by_expert(routing, dispatch);
    REQUIRE(routing.experts == groups * members);
    REQUIRE(routing.slots() == tokens * top_k_groups * top_k);
    std::vector<int> seen(routing.expert.size(), 0);
    Index last = 0;
    for (Index e = 0; e < routing.experts; ++e) {
      const Index first = dispatch.offsets[e];
      REQUIRE(first >= last);
      last = first;
      REQUIRE(dispatch.slots_of(e) == tape.balance.tokens_per_expert[to_size(e)]);
      for (Index row = first; row < first + dispatch.slots_of(e); ++row) {
        const auto slot = to_size(dispatch.sorted_slot[row]);
        ++seen[slot];
        REQUIRE(routing.expert[slot] == e);
      }
    }
    CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
    CHECK(routing.weight == tape.routing.weight);
    for (Index t = 0; t < tokens; ++t) {
      float sum = 0;
      std::set<Index> chosen;
      for (Index s = routing.token_offsets[to_size(t)]; s < routing.token_offsets[to_size(t) + 1];
           ++s) {
        sum += routing.weight[to_size(s)];
        chosen.insert(routing.expert[to_size(s)] / members);
      }
      CHECK(std::abs(sum - 1) < 1e-5f);
      CHECK(static_cast<Index>(chosen.size()) == top_k_groups);
    }
  }
}

TEMPLATE_TEST_CASE("hierarchical gate: a token's routing depends on no other token",
                   "[routing][gate]", float, double) {
  using S = TestType;
  HierarchicalGate<S> gate(
      {.width = 6, .groups = 4, .group_experts = 11, .top_k_groups = 2, .top_k = 3}, 3);
  test::randomize(gate, 2);
  const Matrix<S> x = random_matrix<S>(150, 6, 1);
  typename HierarchicalGate<S>::Tape all;
  typename HierarchicalGate<S>::Tape one;
  gate.forward(x, all, {.step = 4});
  for (const Index t : {0, 1, 77, 149}) {
    gate.forward(x.middleRows(t, 1), one,
                 {.step = 4, .first_token = static_cast<std::uint32_t>(t)});
    for (Index s = 0; s < 6; ++s) {
      CHECK(one.routing.expert[to_size(s)] == all.routing.expert[to_size(6 * t + s)]);
      CHECK(one.routing.weight[to_size(s)] == all.routing.weight[to_size(6 * t + s)]);
    }
  }
  // Another step is another noise, and each group has its own.
  gate.forward(x, one, {.step = 5});
  CHECK_FALSE(same_bits(one.primary.noise, all.primary.noise));
  std::set<S> distinct(all.secondary.noise.data(),
                       all.secondary.noise.data() + all.secondary.noise.size());
  CHECK(static_cast<Index>(distinct.size()) > all.secondary.noise.size() * 999 / 1000);
}

TEMPLATE_TEST_CASE("hierarchical gate: same bits on any number of threads", "[routing][gate]",
                   float, double) {
  using S = TestType;
  for (const Index groups : {1, 3, 40}) {
    const auto pass = [&](int count) {
      const test::Threads threads(count);
      HierarchicalGate<S> gate({.width = 40,
                                .groups = groups,
                                .group_experts = 65,
                                .top_k_groups = std::min<Index>(2, groups),
                                .top_k = 2},
                               3);
      test::randomize(gate, 2, 0.2);
      // Most tokens go to one group, which then splits its own work.
      parameter(gate, "primary.weight").value(0, 0) = 3;
      Matrix<S> x = random_matrix<S>(300, 40, 1);
      x.col(0).setOnes();
      typename HierarchicalGate<S>::Tape tape;
      gate.forward(x, tape, {.step = 4});
      const std::vector<S> dweight(to_size(tape.routing.slots()), S(0.5));
      const Matrix<S> dx = test::gate_dx<HierarchicalGate<S>>(gate, x, dweight, tape);
      test::Named all = test::gradients_of(gate);
      all["dx"] = dx.template cast<double>();
      all["load"] = tape.balance.load.template cast<double>();
      all["loss"] = Matrix<double>::Constant(1, 1, static_cast<double>(tape.balance.loss));
      all["weight"] = Matrix<double>(1, tape.routing.slots());
      for (Index s = 0; s < tape.routing.slots(); ++s) {
        all["weight"](0, s) = static_cast<double>(tape.routing.weight[to_size(s)]);
      }
      return all;
    };
    const test::Named expected = pass(1);
    for (const int threads : {2, 3, 8}) {
      INFO(groups << " groups, " << threads << " threads");
      for (const auto& [name, matrix] : pass(threads)) {
        INFO(name);
        CHECK(same_bits(matrix, expected.at(name)));
      }
    }
  }
}

TEST_CASE("hierarchical gate: one token and 131,072 experts", "[routing][gate]") {
  HierarchicalGate<float> gate(
      {.width = 2, .groups = 512, .group_experts = 256, .top_k_groups = 2, .top_k = 2}, 1);
  test::randomize(gate, 1);
  HierarchicalGate<float>::Tape tape;
  const Routing<float>& routing = gate.forward(random_matrix<float>(1, 2, 3), tape, {.step = 0});
  CHECK(gate.experts() == 131072);
  REQUIRE(routing.slots() == 4);
  CHECK(tape.secondary.clean.rows() == 2);  // of 512 groups
  CHECK(tape.balance.unused_experts() == 131068);
  test::gate_dx(gate, random_matrix<float>(1, 2, 3), std::vector<float>{1, 0, 0, -1}, tape);
  Index moved = 0;
  for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
    const bool zero = (p.gradient().array() == 0).all();
    const auto is_of = [&](Index i) {
      const std::string group = "secondary." + std::to_string(i);
      return name == group + ".weight" || name == group + ".noise_weight";
    };
    const bool sent = name.starts_with("primary") || is_of(tape.primary.routing.expert[0]) ||
                      is_of(tape.primary.routing.expert[1]);
    if (zero == sent) ++moved;
  });
  CHECK(moved == 0);
}

TEST_CASE("hierarchical gate: groups without tokens, and more experts than tokens",
          "[routing][gate]") {
  HierarchicalGate<double> gate(
      {.width = 2, .groups = 3, .group_experts = 4, .top_k_groups = 1, .top_k = 1}, 1);
  test::randomize(gate, 1);
  parameter(gate, "primary.weight").value << 30, -30, -30, 0, 0, 0;
  Matrix<double> x = random_matrix(3, 2, 3);
  x.col(0).setOnes();
  HierarchicalGate<double>::Tape tape;
  gate.forward(x, tape, {.step = 0});
  CHECK(tape.groups.slots_of(0) == 3);
  CHECK((tape.balance.load.tail(8).array() == 0).all());
  CHECK(std::abs(tape.balance.load.head(4).sum() - 3 * tape.secondary.load.head(4).sum() / 3) <
        1e-12);
  test::gate_dx(gate, x, std::vector<double>(3, 1.0), tape);
  CHECK((parameter(gate, "secondary.1.weight").gradient().array() == 0).all());
  CHECK((parameter(gate, "secondary.0.weight").gradient().array() != 0).any());
}

TEST_CASE("hierarchical gate: in evaluation there is no noise and the load is the count",
          "[routing][gate]") {
  const auto make = [](bool noise) {
    HierarchicalGate<double> gate({.width = 3,
                                   .groups = 3,
                                   .group_experts = 4,
                                   .top_k_groups = 2,
                                   .top_k = 2,
                                   .noise = noise},
                                  1);
    test::randomize(gate, 1);
    return gate;
  };
  const HierarchicalGate<double> gate = make(true);
  HierarchicalGate<double>::Tape tape;
  HierarchicalGate<double>::Tape clean;
  const Matrix<double> x = random_matrix(30, 3, 2);
  gate.forward(x, tape, {.step = 0});  // what it leaves must not matter
  const Routing<double>& routing = gate.evaluate(x, tape);
  make(false).forward(x, clean, {.step = 0});
  CHECK(routing.expert == clean.routing.expert);
  CHECK(routing.weight == clean.routing.weight);
  CHECK(same_bits(tape.balance.load, clean.balance.load));
  CHECK(tape.balance.loss == clean.balance.loss);
  for (Index e = 0; e < 12; ++e) {
    const auto count = std::count(routing.expert.begin(), routing.expert.end(), e);
    CHECK(tape.balance.load[e] == static_cast<double>(count));
  }
  CHECK(gate.evaluate(x).weight == routing.weight);
}

TEST_CASE("hierarchical gate: training starts in balance", "[routing][gate]") {
  const HierarchicalGate<float> gate(
      {.width = 3, .groups = 4, .group_experts = 4, .top_k_groups = 2, .top_k = 2}, 0);
  HierarchicalGate<float>::Tape tape;
  gate.forward(random_matrix<float>(4000, 3, 1), tape, {.step = 0});
  CHECK(tape.balance.unused_experts() == 0);
  CHECK(tape.balance.cv_importance() < 0.1f);
  CHECK(tape.balance.cv_load() < 0.1f);
}

TEST_CASE("hierarchical gate: parameters have their names and shapes and start at zero",
          "[routing][gate]") {
  const HierarchicalGate<float> gate(
      {.width = 3, .groups = 2, .group_experts = 5, .top_k_groups = 1, .top_k = 2}, 0);
  std::vector<std::string> names;
  for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
    names.push_back(name);
    CHECK(p.value.rows() == 3);
    CHECK(p.value.cols() == (name.starts_with("primary") ? 2 : 5));
    CHECK(p.value.cwiseAbs().maxCoeff() == 0);
    CHECK(p.gradient().cwiseAbs().maxCoeff() == 0);
  });
  CHECK(names == std::vector<std::string>{"primary.weight", "primary.noise_weight",
                                          "secondary.0.weight", "secondary.0.noise_weight",
                                          "secondary.1.weight", "secondary.1.noise_weight"});
}

TEST_CASE("hierarchical gate: a bad configuration is refused with its field and numbers",
          "[routing][gate]") {
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config config{.width = 4, .groups = 3, .group_experts = 6, .top_k_groups = 2, .top_k = 2};
    spoil(config);
    CHECK_THROWS_AS(HierarchicalGate<double>(config, 0), std::invalid_argument);
    CHECK_THROWS_WITH(HierarchicalGate<double>(config, 0),
                      "moe: HierarchicalGate::Config." + message);
  };
  refuse([](Config& c) { c.width = 0; }, "width = 0, must be at least 1");
  refuse([](Config& c) { c.groups = 0; }, "groups = 0, must be at least 1");
  refuse([](Config& c) { c.group_experts = 0; }, "group_experts = 0, must be at least 1");
  refuse([](Config& c) { c.top_k_groups = 0; }, "top_k_groups = 0, must be from 1 to groups = 3");
  refuse([](Config& c) { c.top_k_groups = 4; }, "top_k_groups = 4, must be from 1 to groups = 3");
  refuse([](Config& c) { c.top_k = 0; }, "top_k = 0, must be from 1 to group_experts = 6");
  refuse([](Config& c) { c.top_k = 7; }, "top_k = 7, must be from 1 to group_experts = 6");
  refuse([](Config& c) { c.noise_floor = 0; }, "noise_floor = 0, must be finite and above 0");
  refuse([](Config& c) { c.noise_floor = std::nan(""); },
         "noise_floor = nan, must be finite and above 0");
  refuse([](Config& c) { c.importance_weight = -0.1; },
         "importance_weight = -0.1, must be finite and at least 0");
  refuse([](Config& c) { c.load_weight = std::numeric_limits<double>::infinity(); },
         "load_weight = inf, must be finite and at least 0");
}

TEST_CASE("hierarchical gate: the tape of a gate of another shape is refused", "[routing][gate]") {
  HierarchicalGate<double> gate(
      {.width = 3, .groups = 3, .group_experts = 5, .top_k_groups = 2, .top_k = 2}, 1);
  HierarchicalGate<double>::Tape tape;
  const Matrix<double> x = random_matrix(6, 3, 2);
  gate.forward(x, tape, {.step = 0});
  const std::vector<double> dweight(24, 0.5);
  for (const Config& other :
       {Config{.width = 3, .groups = 5, .group_experts = 3, .top_k_groups = 2, .top_k = 2},
        Config{.width = 3, .groups = 3, .group_experts = 6, .top_k_groups = 2, .top_k = 2},
        Config{.width = 3, .groups = 3, .group_experts = 5, .top_k_groups = 1, .top_k = 2},
        Config{.width = 3, .groups = 3, .group_experts = 5, .top_k_groups = 1, .top_k = 4}}) {
    HierarchicalGate<double> another(other, 0);
    CHECK_THROWS_WITH(test::gate_dx(another, x, dweight, tape),
                      "moe: HierarchicalGate::backward: the tape is another gate's, of 3 groups of "
                      "5 experts");
  }
}

TEMPLATE_TEST_CASE("hierarchical gate: lazy updates pass by groups without tokens",
                   "[routing][gate]", float, double) {
  using S = TestType;
  for (const bool noise : {true, false}) {
    const auto train = [&](Updates updates) {
      HierarchicalGate<S> gate({.width = 4,
                                .groups = 5,
                                .group_experts = 6,
                                .top_k_groups = 2,
                                .top_k = 2,
                                .noise = noise},
                               1);
      test::randomize(gate, 1);
      typename HierarchicalGate<S>::Tape tape;
      SGD<S> optimizer({.updates = updates});
      for (std::uint64_t step = 0; step < 6; ++step) {
        zero_gradients(gate, updates);
        for (int pass = 0; pass < 2; ++pass) {
          gate.forward(random_matrix<S>(2, 4, 2 * step), tape, {.step = step});
          test::gate_dx(gate, random_matrix<S>(2, 4, 2 * step), std::vector<S>(8, S(0.5)), tape);
        }
        optimizer.update(gate, 0.1);
      }
      return gate;
    };
    HierarchicalGate<S> dense_gate = train(Updates::dense);
    HierarchicalGate<S> lazy_gate = train(Updates::lazy);
    const test::Named expected = test::values_of(dense_gate);
    for (const auto& [name, value] : test::values_of(lazy_gate)) {
      INFO(name);
      CHECK(same_bits(value, expected.at(name)));
    }
  }

  // Without noise the noise's weights of a group in use are in use too: decay moves them.
  HierarchicalGate<S> clean(
      {.width = 1, .groups = 1, .group_experts = 2, .top_k_groups = 1, .top_k = 1, .noise = false},
      0);
  parameter(clean, "secondary.0.noise_weight").value << 2, 4;
  typename HierarchicalGate<S>::Tape clean_tape;
  SGD<S> decay({.weight_decay = 0.5, .updates = Updates::lazy});
  zero_gradients(clean, Updates::lazy);
  clean.forward(Matrix<S>{{1}}, clean_tape, {.step = 0});
  test::gate_dx(clean, Matrix<S>{{1}}, std::vector<S>(1, S(1)), clean_tape);
  decay.update(clean, 0.5);
  CHECK(parameter(clean, "secondary.0.noise_weight").value == Matrix<S>{{S(1.5), S(3)}});

  // What is idle is neither moved by decay nor even zeroed.
  HierarchicalGate<S> gate(
      {.width = 1, .groups = 3, .group_experts = 4, .top_k_groups = 1, .top_k = 2}, 1);
  test::randomize(gate, 1);
  parameter(gate, "primary.weight").value << 30, 0, -30;
  typename HierarchicalGate<S>::Tape tape;
  SGD<S> optimizer({.weight_decay = 0.5, .updates = Updates::lazy});
  const test::Named before = test::values_of(gate);
  for (const S to : {S(1), S(-1)}) {
    zero_gradients(gate, Updates::lazy);
    const Matrix<S> x{{to}};
    gate.forward(x, tape, {.step = 0});
    test::gate_dx(gate, x, std::vector<S>(2, S(1)), tape);
    optimizer.update(gate, 0.1);
  }
  const test::Named after = test::values_of(gate);
  CHECK(same_bits(after.at("secondary.1.weight"), before.at("secondary.1.weight")));
  CHECK_FALSE(same_bits(after.at("secondary.0.weight"), before.at("secondary.0.weight")));
  CHECK_FALSE(same_bits(after.at("secondary.2.weight"), before.at("secondary.2.weight")));
  // The first step's gradient stands for zero, its memory untouched until somebody looks.
  Index cleared = 0;
  detail::walk_parameters(gate, [&](const ParameterName&, const Parameter<S>& p) {
    if (p.stored.state != detail::GradientState::stale) return;
    ++cleared;
    CHECK((p.stored.memory.array() != 0).any());
    CHECK((p.gradient().array() == 0).all());
  });
  CHECK(cleared == 2);
  CHECK((parameter(gate, "secondary.0.weight").gradient().array() == 0).all());
}

TEST_CASE("hierarchical gate: in a layer, gradients are derivatives", "[routing][gate]") {
  using Layer = MoELayer<Expert<FeedForward, double>, HierarchicalGate<double>>;
  Layer layer({.width = 3,
               .expert = {.hidden = 4, .activation = Activation::tanh},
               .gate = {.groups = 3,
                        .group_experts = 3,
                        .top_k_groups = 2,
                        .top_k = 2,
                        .importance_weight = 0.3,
                        .load_weight = 0.6},
               .seed = 5});
  Layer::Tape tape;
  Matrix<double> x;
  const Pass key{.step = 2};
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 400; ++seed) {
    test::randomize(layer, seed, 0.6);
    x = random_matrix(5, 3, seed);
    layer.forward(x, tape, key);
    clear = choice_margin(layer.gate(), tape.gate) > 2e-3;
  }
  REQUIRE(clear);
  const Matrix<double> dy = random_matrix(5, 3, 8);
  const Matrix<double> dx = layer.backward(dy, tape);
  const auto loss = [&] {
    Layer::Tape fresh;
    const Matrix<double>& y = layer.forward(x, fresh, key);
    return y.cwiseProduct(dy).sum() + fresh.balance().loss;
  };
  CHECK(relative_error(dx, test::difference_gradient(x, loss)) < 1e-7);
  test::check_parameter_gradients(layer, loss);

  // y = Σ Σ Gprimary·G·E(x), from the experts on their own.
  Matrix<double> y = Matrix<double>::Zero(5, 3);
  const Matrix<double> g = dense(tape.routing());
  for (Index e = 0; e < 9; ++e) {
    const auto& network = layer.experts()[to_size(e)];
    const test::Named p = test::values_of(network);
    const Matrix<double> hidden =
        ((x * p.at("up.weight")).rowwise() + p.at("up.bias").row(0)).array().tanh();
    const Matrix<double> out = (hidden * p.at("down.weight")).rowwise() + p.at("down.bias").row(0);
    for (Index t = 0; t < 5; ++t) y.row(t) += g(t, e) * out.row(t);
  }
  layer.forward(x, tape, key);
  CHECK(relative_error(tape.y, y) < 1e-13);
}
