#include "moe/gates/balanced_gate.hpp"

#include <set>

#include "balanced.hpp"

using namespace moe;
using namespace moe::test;

TEST_CASE("balanced gate: every expert gets exactly m tokens for any shape", "[routing][gate]") {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    const auto draw = [&](std::uint64_t what, Index count) {
      return static_cast<Index>(derive_seed(seed, what) % static_cast<std::uint64_t>(count)) + 1;
    };
    const Index experts = draw(0, 20);
    const Index top_k = draw(1, experts);
    const Index tokens = draw(2, 90);
    INFO("T " << tokens << ", E " << experts << ", K " << top_k);
    const BalancedGate<double>::Config config{.width = 3, .experts = experts, .top_k = top_k};
    BalancedGate<double> gate(config, seed);
    BalancedGate<double>::Tape tape;
    gate.forward(random_matrix(tokens, 3, seed), tape, {.step = 0});
    test::check_routing(tape.routing, tokens, experts);
    for (Index e = 0; e < experts; ++e) {
      REQUIRE(tape.balance.tokens_per_expert[detail::to_size(e)] == taken(config, tokens));
      REQUIRE(tape.balance.load[e] == static_cast<double>(taken(config, tokens)));
    }
    CHECK(tape.balance.loss >= 0);
    const Matrix<double> G = test::dense_weights(tape.routing);
    for (Index t = 0; t < tokens; ++t) {
      const bool none = tape.routing.token_offsets[detail::to_size(t)] ==
                        tape.routing.token_offsets[detail::to_size(t) + 1];
      CHECK(std::abs(G.row(t).sum() - (none ? 0 : 1)) < 1e-12);
    }
    const Routing<double> served = gate.evaluate(random_matrix(tokens, 3, seed));
    test::check_routing(served, tokens, experts);
  }
}

TEST_CASE("balanced gate: evaluation goes by the thresholds, whatever the batch",
          "[routing][gate]") {
  BalancedGate<double> gate({.width = 3, .experts = 5, .top_k = 2}, 1);
  parameter(gate, "threshold").value = Matrix<double>{{0.2, 0.3, 0.3, 0.25, 0.35}};
  const Matrix<double> x = random_matrix(200, 3, 2, 2);
  BalancedGate<double>::Tape tape;
  const Routing<double>& routing = gate.evaluate(x, tape);
  const Matrix<double> p =
      test::naive_softmax(test::naive_scores(x, parameter(gate, "weight").value));
  Matrix<double> expected = Matrix<double>::Zero(200, 5);
  Index empty = 0;
  for (Index t = 0; t < 200; ++t) {
    double total = 0;
    for (Index i = 0; i < 5; ++i) {
      if (p(t, i) > parameter(gate, "threshold").value(0, i)) total += expected(t, i) = p(t, i);
    }
    if (total > 0) expected.row(t) /= total;
    empty += total == 0;
  }
  CHECK(empty > 0);
  CHECK(empty < 100);
  CHECK(relative_error(test::dense_weights(routing), expected) < 1e-12);
  CHECK(tape.balance.load.sum() == static_cast<double>(routing.slots()));
  CHECK(tape.balance.loss == 0);
  for (const Index t : {0, 17, 199}) {
    const Routing<double> alone = gate.evaluate(x.row(t));
    CHECK(same_bits(test::dense_weights(alone), test::dense_weights(routing).row(t)));
  }

  // A tape that was trained with keeps nothing of it.
  BalancedGate<double>::Tape used;
  gate.forward(x, used, {.step = 0});
  REQUIRE(used.balance.loss > 0);
  CHECK(gate.evaluate(x, used).weight == routing.weight);
  CHECK(used.balance.loss == 0);

  // What equals the threshold does not pass (eq. 19).
  parameter(gate, "weight").value.setZero();
  gate.evaluate(x, tape);
  parameter(gate, "threshold").value.setConstant(tape.p(0, 0));
  CHECK(gate.evaluate(x).slots() == 0);
}

TEST_CASE("balanced gate: thresholds learn to do what the batchwise mask does", "[routing][gate]") {
  const Index tokens = 512;
  BalancedGate<double> gate({.width = 4, .experts = 8, .top_k = 2, .threshold_weight = 1}, 1);
  const std::vector<double> none(detail::to_size(tokens * 2), 0.0);
  BalancedGate<double>::Tape tape;
  gate.forward(random_matrix(tokens, 4, 1), tape, {.step = 0});
  const double start = tape.balance.loss;
  Parameter<double>& threshold = parameter(gate, "threshold");
  for (std::uint64_t step = 0; step < 100; ++step) {
    gate.forward(random_matrix(tokens, 4, 100 + step), tape, {.step = 0});
    zero_gradients(gate);
    test::gate_dx(gate, random_matrix(tokens, 4, 100 + step), none, tape);
    threshold.value -= 0.2 / (100.0 + 20.0 * static_cast<double>(step)) / 8 * threshold.gradient();
  }
  gate.forward(random_matrix(tokens, 4, 1), tape, {.step = 0});
  CHECK(tape.balance.loss < 0.02 * start);
  gate.evaluate(random_matrix(4096, 4, 2), tape);  // unseen: 1024 tokens an expert are wanted
  for (Index e = 0; e < 8; ++e) {
    CHECK(tape.balance.load[e] > 850);
    CHECK(tape.balance.load[e] < 1200);
  }
}

TEST_CASE("balanced gate: a token that no expert takes gets nothing and no NaN",
          "[routing][gate]") {
  using Layer = MoELayer<Expert<FeedForward, double>, BalancedGate<double>>;
  Layer layer({.width = 3,
               .expert = {.hidden = 4},
               .gate = {.experts = 4, .top_k = 1, .threshold_weight = 0},
               .seed = 1});
  test::randomize(layer, 2);
  const Matrix<double> x = random_matrix(40, 3, 3);
  Layer::Tape tape;
  const Matrix<double>& y = layer.forward(x, tape, {.step = 0});
  const Matrix<double>& dx = layer.backward(x, tape);
  Index empty = 0;
  for (Index t = 0; t < 40; ++t) {
    if (tape.routing().token_offsets[detail::to_size(t)] !=
        tape.routing().token_offsets[detail::to_size(t) + 1]) {
      continue;
    }
    ++empty;
    CHECK(y.row(t).cwiseAbs().maxCoeff() == 0);
    CHECK(dx.row(t).cwiseAbs().maxCoeff() == 0);
  }
  CHECK(empty >= 5);
  CHECK(y.array().isFinite().all());
  CHECK(dx.array().isFinite().all());
  parameter(layer, "gate.threshold").value.setConstant(1);
  CHECK(layer.evaluate(x).cwiseAbs().maxCoeff() == 0);
}

TEMPLATE_TEST_CASE("balanced gate: probabilities too small to divide by do no harm",
                   "[routing][gate]", float, double) {
  // Expert 1 must take tokens whose p is next to 0, and for some of those it is the only expert.
  using S = TestType;
  BalancedGate<S> gate({.width = 1, .experts = 2, .top_k = 1, .threshold_weight = 1}, 0);
  parameter(gate, "weight").value = Matrix<S>{{0, -1}};
  const Matrix<S> x{{5000}, {5001}, {5002}, {5003}};
  typename BalancedGate<S>::Tape tape;
  const Routing<S>& routing = gate.forward(x, tape, {.step = 0});
  REQUIRE(tape.p.col(1).cwiseAbs().maxCoeff() < 1e-37);
  CHECK(routing.slots() == 4);
  CHECK(std::isfinite(tape.balance.loss));
  for (const S weight : routing.weight) CHECK(std::isfinite(weight));
  parameter(gate, "weight").value = Matrix<S>{{-5000, 0}};
  parameter(gate, "threshold").value = Matrix<S>{{-1, 2}};  // expert 0 alone
  CHECK(gate.evaluate(Matrix<S>{{1}}).weight == std::vector<S>{1});
}

TEMPLATE_TEST_CASE("balanced gate: ties go to the lower token", "[routing][gate]", float, double) {
  BalancedGate<TestType> gate({.width = 3, .experts = 4, .top_k = 2}, 0);
  parameter(gate, "weight").value.setZero();
  typename BalancedGate<TestType>::Tape tape;
  const Routing<TestType>& routing =
      gate.forward(random_matrix<TestType>(4, 3, 1), tape, {.step = 0});
  CHECK(routing.token_offsets == Indices{0, 4, 8, 8, 8});
  CHECK(routing.expert == Indices{0, 1, 2, 3, 0, 1, 2, 3});
  for (const TestType weight : routing.weight) CHECK(weight == TestType{0.25});
}

TEST_CASE("balanced gate: shapes at the ends", "[routing][gate]") {
  SECTION("one expert, all experts, fewer tokens than experts") {
    for (const Index experts : {1, 9}) {
      for (const Index top_k : {Index{1}, experts}) {
        for (const Index tokens : {1, 4}) {
          BalancedGate<float> gate({.width = 3, .experts = experts, .top_k = top_k}, 0);
          BalancedGate<float>::Tape tape;
          const Index slots =
              gate.forward(random_matrix<float>(tokens, 3, 1), tape, {.step = 0}).slots();
          CHECK(slots == (top_k == experts ? experts * tokens : experts));
          const std::vector<float> ones(detail::to_size(slots), 1.0f);
          CHECK(test::gate_dx(gate, random_matrix<float>(tokens, 3, 1), ones, tape).allFinite());
        }
      }
    }
  }
  SECTION("131,072 experts and one token") {
    BalancedGate<float> gate({.width = 2, .experts = 131072, .top_k = 2}, 0);
    BalancedGate<float>::Tape tape;
    const Matrix<float> x = random_matrix<float>(1, 2, 1);
    CHECK(gate.forward(x, tape, {.step = 0}).slots() == 131072);
    const std::vector<float> ones(131072, 1.0f);
    CHECK(test::gate_dx(gate, x, ones, tape).allFinite());
    test::check_routing(gate.evaluate(x), 1, 131072);
  }
}

TEMPLATE_TEST_CASE("balanced gate: a token with NaN or infinity comes last and shows",
                   "[routing][gate]", float, double) {
  using S = TestType;
  for_each_spoilt_batch<S>([](const Matrix<S>& x, Index spoilt) {
    for (const Index top_k : {1, 4}) {
      BalancedGate<S> gate({.width = 3, .experts = 4, .top_k = top_k}, 1);
      typename BalancedGate<S>::Tape tape;
      check_spoilt_token(gate.forward(x, tape, {.step = 0}), 4, spoilt, top_k == 4 ? 4 : 0);
      CHECK(std::isnan(tape.balance.loss));

      const Routing<S> served = gate.evaluate(x);
      test::check_routing(served, x.rows(), 4);
      REQUIRE(served.slots_of_token(spoilt).count == 1);
      const auto slot = detail::to_size(served.token_offsets[spoilt]);
      CHECK(served.expert[slot] == 0);
      CHECK(std::isnan(served.weight[slot]));
    }
  });
}

TEST_CASE("balanced gate: parameters have their names, shapes and start", "[routing][gate]") {
  const BalancedGate<float> gate({.width = 9, .experts = 4, .top_k = 2}, 3);
  std::vector<std::string> names;
  for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
    names.push_back(name);
    CHECK(p.value.cols() == 4);
    CHECK(p.value.rows() == (name == "weight" ? 9 : 1));
    CHECK(p.gradient().cwiseAbs().maxCoeff() == 0);
    if (name == "threshold") {
      CHECK((p.value.array() == 0.25f).all());
    } else {
      CHECK(p.value.cwiseAbs().maxCoeff() <= 1.0f / 3);
      CHECK(p.value.cwiseAbs().maxCoeff() > 0.3f);
      CHECK(std::set<float>(p.value.data(), p.value.data() + 36).size() == 36);
    }
  });
  CHECK(names == std::vector<std::string>{"weight", "threshold"});
  const BalancedGate<float> other({.width = 9, .experts = 4, .top_k = 2}, 4);
  CHECK_FALSE(same_bits(test::values_of(gate).at("weight"), test::values_of(other).at("weight")));
}

TEST_CASE("balanced gate: a bad configuration is refused with its field and numbers",
          "[routing][gate]") {
  using Config = BalancedGate<float>::Config;
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config config{.width = 4, .experts = 6, .top_k = 2};
    spoil(config);
    CHECK_THROWS_AS(BalancedGate<float>(config, 0), std::invalid_argument);
    CHECK_THROWS_WITH(BalancedGate<float>(config, 0), "moe: BalancedGate::Config." + message);
  };
  refuse([](Config& c) { c.width = 0; }, "width = 0, must be at least 1");
  refuse([](Config& c) { c.width = -1; }, "width = -1, must be at least 1");
  refuse([](Config& c) { c.experts = 0; }, "experts = 0, must be at least 1");
  refuse([](Config& c) { c.top_k = 0; }, "top_k = 0, must be from 1 to experts = 6");
  refuse([](Config& c) { c.top_k = 7; }, "top_k = 7, must be from 1 to experts = 6");
  refuse([](Config& c) { c.threshold_weight = -0.1; },
         "threshold_weight = -0.1, must be finite and at least 0");
  refuse([](Config& c) { c.threshold_weight = std::nan(""); },
         "threshold_weight = nan, must be finite and at least 0");
  refuse([](Config& c) { c.threshold_weight = std::numeric_limits<double>::infinity(); },
         "threshold_weight = inf, must be finite and at least 0");
}

TEST_CASE("balanced gate: the tape of a gate of another shape is refused", "[routing][gate]") {
  check_foreign_tape<BalancedGate<double>>(
      {.width = 3, .experts = 5, .top_k = 2},
      {{.width = 3, .experts = 4, .top_k = 2}, {.width = 3, .experts = 5, .top_k = 3}},
      "moe: BalancedGate::backward: the tape is another gate's, of 5 experts and 20 slots of 10 "
      "tokens");
}
