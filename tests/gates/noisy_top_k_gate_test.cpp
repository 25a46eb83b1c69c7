#include "moe/gates/noisy_top_k_gate.hpp"

#include <set>

#include "token_choice_checks.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// Checks W_g, W_noise and x at a point away from ties.
void check_gradients(const NoisyTopKGate<double>::Config& config, Index tokens, double weights,
                     double inputs) {
  INFO("E " << config.experts << ", K " << config.top_k << ", loss weights "
            << config.importance_weight << " and " << config.load_weight << ", noise "
            << config.noise << ", weights times " << weights << ", x times " << inputs);
  check_gate_gradients<NoisyTopKGate<double>>(
      config, tokens, weights, inputs, [&](const auto&, const auto& tape) {
        return test::choice_margin(config.noise ? tape.noisy : tape.clean, config.top_k);
      });
}

}  // namespace

TEST_CASE("noisy top-k gate: gradients are derivatives for every number of experts",
          "[routing][gate]") {
  for (Index experts = 1; experts <= 12; ++experts) {
    for (Index top_k = 1; top_k <= experts; top_k += experts > 6 ? 3 : 1) {
      check_gradients({.width = 3,
                       .experts = experts,
                       .top_k = top_k,
                       .importance_weight = 0.7,
                       .load_weight = 1.3},
                      4, 0.8, 1);
    }
  }
}

TEST_CASE("noisy top-k gate: gradients are derivatives for every pair of loss weights",
          "[routing][gate]") {
  for (const bool noise : {true, false}) {
    for (const double importance : {0.0, 0.9}) {
      for (const double load : {0.0, 1.7}) {
        for (const Index top_k : {1, 2, 5}) {
          check_gradients({.width = 4,
                           .experts = 5,
                           .top_k = top_k,
                           .noise = noise,
                           .importance_weight = importance,
                           .load_weight = load},
                          6, 0.8, 1);
        }
      }
    }
  }
}

TEST_CASE("noisy top-k gate: gradients are derivatives at every scale", "[routing][gate]") {
  for (const double weights : {1e-2, 1.0, 10.0}) {
    for (const double inputs : {1e-2, 1.0, 10.0}) {
      for (const Index top_k : {1, 3}) {
        check_gradients({.width = 3,
                         .experts = 6,
                         .top_k = top_k,
                         .noise_floor = 0.05,
                         .importance_weight = 1,
                         .load_weight = 2},
                        5, weights, inputs);
      }
    }
  }
}

TEMPLATE_TEST_CASE("noisy top-k gate: two tokens and three experts worked by hand",
                   "[routing][gate]", float, double) {
  using S = TestType;
  const auto near = [](double value) {
    return Catch::Matchers::WithinAbs(value, sizeof(S) == 4 ? 1e-6 : 1e-9);
  };
  NoisyTopKGate<S> gate({.width = 2,
                         .experts = 3,
                         .top_k = 2,
                         .noise = false,
                         .importance_weight = 0.5,
                         .load_weight = 2},
                        0);
  parameter(gate, "weight").value = Matrix<S>{{1, 0, 2}, {0, 1, 1}};
  const S ln3 = std::log(S{3});
  const S ln4 = std::log(S{4});
  const Matrix<S> x{{ln3, 0}, {0, ln4}};
  // c = (ln 3, 0, ln 9) and (0, ln 4, ln 4). Chosen: 0 and 2, with G = 3/12 and 9/12; 1 and 2, with
  // a half each. Importance = (1/4, 1/2, 5/4): mean 2/3, variance (25 + 4 + 49)/144/3 = 13/72,
  // CV² = 13/72·9/4 = 13/32. Load = (1, 1, 2): mean 4/3, variance 2/9, CV² = 1/8.
  // Loss = 0.5·13/32 + 2·1/8 = 29/64.
  typename NoisyTopKGate<S>::Tape tape;
  const Routing<S>& routing = gate.forward(x, tape, {.step = 0});
  CHECK(routing.experts == 3);
  CHECK(routing.token_offsets == Indices{0, 2, 4});
  CHECK(routing.expert == Indices{0, 2, 1, 2});
  const std::vector<double> weights = {0.25, 0.75, 0.5, 0.5};
  for (std::size_t s = 0; s < 4; ++s) {
    CHECK_THAT(static_cast<double>(routing.weight[s]), near(weights[s]));
  }
  const Balance<S>& balance = tape.balance;
  const auto check_vector = [&](const Vector<S>& v, double a, double b, double c) {
    REQUIRE(v.size() == 3);
    CHECK_THAT(static_cast<double>(v[0]), near(a));
    CHECK_THAT(static_cast<double>(v[1]), near(b));
    CHECK_THAT(static_cast<double>(v[2]), near(c));
  };
  check_vector(balance.importance, 0.25, 0.5, 1.25);
  check_vector(balance.load, 1, 1, 2);
  CHECK(balance.tokens_per_expert == Indices{1, 1, 2});
  CHECK_THAT(static_cast<double>(balance.loss), near(29.0 / 64));

  // dCV²/dImportance = (2/3)·[(v − m)/m² − q/m³] = (2/3)·[(−15/16, −3/8, 21/16) − 39/64], halved by
  // the loss weight: (−33, −21, 15)/64. With dweight = (1, 0, 0, 0), g = (31, 15)/64 for token 0:
  // Σ G·g = 19/64, dh = (1/4·12, −3/4·4)/64 = (3, −3)/64. For token 1 g = (−21, 15)/64:
  // Σ G·g = −3/64, dh = (−9, 9)/64.
  const std::vector<S> dweight = {1, 0, 0, 0};
  const Matrix<S>& dx = test::gate_dx(gate, x, dweight, tape);
  const Matrix<S> dh{{3, 0, -3}, {0, -9, 9}};
  const auto error = [](const Matrix<S>& a, const Matrix<S>& b) {
    return static_cast<double>((a - b).cwiseAbs().maxCoeff());
  };
  CHECK(error(parameter(gate, "weight").gradient(),
              Matrix<S>{{ln3 * 3 / 64, 0, -ln3 * 3 / 64}, {0, -ln4 * 9 / 64, ln4 * 9 / 64}}) <
        1e-6);
  CHECK(parameter(gate, "noise_weight").gradient().cwiseAbs().maxCoeff() == 0);
  // dx = dh·W_gᵀ.
  CHECK(error(dx, Matrix<S>{{S(3 - 6) / 64, S(-3) / 64}, {S(18) / 64, 0}}) < 1e-6);
  CHECK(error(tape.dclean, Matrix<S>(dh / 64)) < 1e-6);
}

TEST_CASE("noisy top-k gate: the load of two experts worked by hand", "[routing][gate]") {
  // K = 1 of E = 2: each expert's threshold is the other's h, so with W_noise = 0 and
  // s = log 2 + 0.01, P_0 = Φ((c_0 − c_1 − n_1·s)/s) and P_1 = Φ((c_1 − c_0 − n_0·s)/s).
  NoisyTopKGate<double> gate({.width = 1, .experts = 2, .top_k = 1}, 5);
  parameter(gate, "weight").value << 0.3, -0.2;
  NoisyTopKGate<double>::Tape tape;
  gate.forward(Matrix<double>{{1}}, tape, {.step = 9});
  const auto words = philox({0, 0, 9, 0}, 5);
  const auto n0 = static_cast<double>(standard_normal(words[0]));
  const auto n1 = static_cast<double>(standard_normal(words[1]));
  const double s = std::log(2.0) + 0.01;
  const auto near = [](double value) { return Catch::Matchers::WithinAbs(value, 1e-14); };
  CHECK_THAT(tape.noisy(0, 0), near(0.3 + n0 * s));
  CHECK_THAT(tape.noisy(0, 1), near(-0.2 + n1 * s));
  CHECK_THAT(tape.balance.load[0], near(test::naive_cdf((0.5 - n1 * s) / s)));
  CHECK_THAT(tape.balance.load[1], near(test::naive_cdf((-0.5 - n0 * s) / s)));
}

TEST_CASE("noisy top-k gate: load is how often an expert is chosen when its noise is drawn again",
          "[routing][gate]") {
  const Index experts = 5;
  const Index top_k = 2;
  NoisyTopKGate<double> gate({.width = 3, .experts = experts, .top_k = top_k}, 21);
  test::randomize(gate, 2, 0.5);
  NoisyTopKGate<double>::Tape tape;
  const Matrix<double> x = random_matrix(2, 3, 31);
  gate.forward(x, tape, {.step = 0});
  const int draws = 20000;
  for (Index t = 0; t < 2; ++t) {
    for (Index i = 0; i < experts; ++i) {
      int chosen = 0;
      for (int draw = 0; draw < draws; ++draw) {
        const auto words =
            philox({static_cast<std::uint32_t>(draw), static_cast<std::uint32_t>(i), 1, 2}, 99);
        const double h =
            tape.clean(t, i) + static_cast<double>(standard_normal(words[0])) * tape.scale(t, i);
        Index better = 0;
        for (Index j = 0; j < experts; ++j) better += j != i && tape.noisy(t, j) > h ? 1 : 0;
        chosen += better < top_k ? 1 : 0;
      }
      const double p = tape.probability(t, i);
      const double frequency = static_cast<double>(chosen) / draws;
      CHECK(std::abs(frequency - p) < 4.5 * std::sqrt(p * (1 - p) / draws) + 1e-4);
    }
  }
}

TEST_CASE("noisy top-k gate: the threshold carries a share of the gradient that shows",
          "[routing][gate]") {
  // Load loss alone, so that nothing else hides it: moving every c by the same amount changes no P,
  // so the gradient by c sums to zero over a token's experts. Without the threshold's share it
  // would not, by as much as the gradient itself.
  NoisyTopKGate<double> gate(
      {.width = 3, .experts = 6, .top_k = 2, .importance_weight = 0, .load_weight = 1}, 3);
  test::randomize(gate, 2, 0.3);
  NoisyTopKGate<double>::Tape tape;
  gate.forward(random_matrix(8, 3, 31), tape, {.step = 0});
  test::gate_dx(gate, random_matrix(8, 3, 31), std::vector<double>(16, 0.0), tape);
  for (Index t = 0; t < 8; ++t) {
    const double size = tape.dclean.row(t).cwiseAbs().sum();
    CHECK(size > 1e-6);
    CHECK(std::abs(tape.dclean.row(t).sum()) < 1e-13 * size);
  }
}

TEMPLATE_TEST_CASE("noisy top-k gate: ties go to the lower expert", "[routing][gate]", float,
                   double) {
  // Weights start at zero, so without noise every score is equal.
  const NoisyTopKGate<TestType> gate({.width = 3, .experts = 7, .top_k = 3}, 0);
  const Routing<TestType> routing = gate.evaluate(random_matrix<TestType>(2, 3, 1));
  CHECK(routing.expert == Indices{0, 1, 2, 0, 1, 2});
  for (const TestType weight : routing.weight) {
    CHECK_THAT(static_cast<double>(weight), Catch::Matchers::WithinAbs(1.0 / 3, 1e-7));
  }
}

TEST_CASE("noisy top-k gate: training starts in balance", "[routing][gate]") {
  const NoisyTopKGate<float> gate({.width = 3, .experts = 8, .top_k = 2}, 0);
  NoisyTopKGate<float>::Tape tape;
  gate.forward(random_matrix<float>(4000, 3, 1), tape, {.step = 0});
  CHECK(tape.balance.unused_experts() == 0);
  CHECK(tape.balance.cv_importance() < 0.1f);
  CHECK(tape.balance.cv_load() < 0.1f);
  CHECK(tape.balance.max_over_mean_load() < 1.15f);
}

TEMPLATE_TEST_CASE("noisy top-k gate: slots are ascending and weights a distribution",
                   "[routing][gate]", float, double) {
  for (const Index top_k : {1, 3, 6}) {
    NoisyTopKGate<TestType> gate({.width = 4, .experts = 6, .top_k = top_k}, 3);
    test::randomize(gate, 5);
    typename NoisyTopKGate<TestType>::Tape tape;
    const Routing<TestType>& routing =
        gate.forward(random_matrix<TestType>(200, 4, 2), tape, {.step = 0});
    REQUIRE(routing.tokens() == 200);
    REQUIRE(routing.slots() == 200 * top_k);
    for (Index t = 0; t < 200; ++t) {
      CHECK(routing.token_offsets[detail::to_size(t)] == t * top_k);
      double sum = 0;
      for (Index s = t * top_k; s < (t + 1) * top_k; ++s) {
        if (s > t * top_k) {
          CHECK(routing.expert[detail::to_size(s) - 1] < routing.expert[detail::to_size(s)]);
        }
        CHECK(routing.weight[detail::to_size(s)] >= 0);
        sum += static_cast<double>(routing.weight[detail::to_size(s)]);
      }
      CHECK_THAT(sum, Catch::Matchers::WithinAbs(1, 1e-6));
    }
  }
}

TEST_CASE("noisy top-k gate: noise replays by its key and differs by step and seed",
          "[routing][gate]") {
  const Matrix<double> x = random_matrix(5, 3, 1);
  const auto noise = [&](std::uint64_t seed, const Pass& key, const Matrix<double>& rows) {
    const NoisyTopKGate<double> gate({.width = 3, .experts = 21, .top_k = 2}, seed);
    NoisyTopKGate<double>::Tape tape;
    gate.forward(rows, tape, key);
    return tape.noise;
  };
  const Matrix<double> first = noise(1, {.step = 4}, x);
  CHECK(same_bits(noise(1, {.step = 4}, x), first));
  CHECK_FALSE(same_bits(noise(1, {.step = 5}, x), first));
  CHECK_FALSE(same_bits(noise(1, {.step = 4 + (std::uint64_t{1} << 32)}, x), first));
  CHECK_FALSE(same_bits(noise(2, {.step = 4}, x), first));
  CHECK(same_bits(noise(1, {.step = 4, .first_token = 2}, x.bottomRows(3)), first.bottomRows(3)));
  std::set<double> distinct(first.data(), first.data() + first.size());
  CHECK(static_cast<Index>(distinct.size()) == first.size());
}

TEST_CASE("noisy top-k gate: load is the count in evaluation", "[routing][gate]") {
  NoisyTopKGate<double> gate({.width = 3, .experts = 5, .top_k = 2}, 1);
  test::randomize(gate, 1);
  NoisyTopKGate<double>::Tape tape;
  const Routing<double>& routing = gate.evaluate(random_matrix(30, 3, 2), tape);
  CHECK(tape.balance.load.sum() == 60);
  for (Index e = 0; e < 5; ++e) {
    const auto count = std::count(routing.expert.begin(), routing.expert.end(), e);
    CHECK(tape.balance.load[e] == static_cast<double>(count));
    CHECK(tape.balance.tokens_per_expert[detail::to_size(e)] == count);
  }
  CHECK(gate.evaluate(random_matrix(30, 3, 2)).weight == routing.weight);
}

TEST_CASE("noisy top-k gate: without noise training sees what evaluation sees", "[routing][gate]") {
  NoisyTopKGate<double> gate({.width = 3, .experts = 5, .top_k = 2, .noise = false}, 1);
  test::randomize(gate, 1);
  NoisyTopKGate<double>::Tape training;
  NoisyTopKGate<double>::Tape serving;
  const Matrix<double> x = random_matrix(30, 3, 2);
  gate.forward(x, training, {.step = 4});
  gate.evaluate(x, serving);
  CHECK(training.routing.expert == serving.routing.expert);
  CHECK(training.routing.weight == serving.routing.weight);
  CHECK(same_bits(training.balance.load, serving.balance.load));
  CHECK(training.balance.loss == serving.balance.loss);
}

TEST_CASE("noisy top-k gate: a counted load carries no gradient", "[routing][gate]") {
  // With K = 1 nothing but the load could move the gate; with K = E the load is fixed.
  for (const bool all : {false, true}) {
    NoisyTopKGate<double> gate({.width = 3,
                                .experts = 5,
                                .top_k = all ? 5 : 1,
                                .noise = all,
                                .importance_weight = 0,
                                .load_weight = 1},
                               1);
    test::randomize(gate, 1);
    NoisyTopKGate<double>::Tape tape;
    gate.forward(random_matrix(6, 3, 2), tape, {.step = 0});
    CHECK((tape.balance.load.array() == tape.balance.load.array().round()).all());
    const Matrix<double>& dx =
        test::gate_dx(gate, random_matrix(6, 3, 2), std::vector<double>(all ? 30 : 6, 0.0), tape);
    CHECK(dx.cwiseAbs().maxCoeff() == 0);
    for_each_parameter(gate, [](const ParameterName&, Parameter<double>& p) {
      CHECK(p.gradient().cwiseAbs().maxCoeff() == 0);
    });
  }
}

TEST_CASE("noisy top-k gate: one active expert learns from the load alone", "[routing][gate]") {
  NoisyTopKGate<double> gate(
      {.width = 3, .experts = 5, .top_k = 1, .importance_weight = 1, .load_weight = 0}, 1);
  test::randomize(gate, 1);
  NoisyTopKGate<double>::Tape tape;
  gate.forward(random_matrix(6, 3, 2), tape, {.step = 0});
  test::gate_dx(gate, random_matrix(6, 3, 2), std::vector<double>(6, 2.5), tape);
  CHECK(parameter(gate, "weight").gradient().cwiseAbs().maxCoeff() < 1e-15);
}

TEST_CASE("noisy top-k gate: parameters have their names and shapes and start at zero",
          "[routing][gate]") {
  const NoisyTopKGate<float> gate({.width = 3, .experts = 5, .top_k = 2}, 0);
  std::vector<std::string> names;
  for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
    names.push_back(name);
    CHECK(p.value.rows() == 3);
    CHECK(p.value.cols() == 5);
    CHECK(p.value.cwiseAbs().maxCoeff() == 0);
    CHECK(p.gradient().cwiseAbs().maxCoeff() == 0);
  });
  CHECK(names == std::vector<std::string>{"weight", "noise_weight"});
}

TEST_CASE("noisy top-k gate: a bad configuration is refused with its field and numbers",
          "[routing][gate]") {
  using Config = NoisyTopKGate<float>::Config;
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config config{.width = 4, .experts = 6, .top_k = 2};
    spoil(config);
    CHECK_THROWS_AS(NoisyTopKGate<float>(config, 0), std::invalid_argument);
    CHECK_THROWS_WITH(NoisyTopKGate<float>(config, 0), "moe: NoisyTopKGate::Config." + message);
  };
  refuse([](Config& c) { c.width = 0; }, "width = 0, must be at least 1");
  refuse([](Config& c) { c.experts = 0; }, "experts = 0, must be at least 1");
  refuse([](Config& c) { c.top_k = 0; }, "top_k = 0, must be from 1 to experts = 6");
  refuse([](Config& c) { c.top_k = 7; }, "top_k = 7, must be from 1 to experts = 6");
  refuse([](Config& c) { c.noise_floor = 0; }, "noise_floor = 0, must be finite and above 0");
  refuse([](Config& c) { c.noise_floor = -0.5; }, "noise_floor = -0.5, must be finite and above 0");
  refuse([](Config& c) { c.noise_floor = std::nan(""); },
         "noise_floor = nan, must be finite and above 0");
  refuse([](Config& c) { c.importance_weight = -0.1; },
         "importance_weight = -0.1, must be finite and at least 0");
  refuse([](Config& c) { c.importance_weight = std::nan(""); },
         "importance_weight = nan, must be finite and at least 0");
  refuse([](Config& c) { c.load_weight = -0.1; },
         "load_weight = -0.1, must be finite and at least 0");
  refuse([](Config& c) { c.load_weight = std::numeric_limits<double>::infinity(); },
         "load_weight = inf, must be finite and at least 0");
}
