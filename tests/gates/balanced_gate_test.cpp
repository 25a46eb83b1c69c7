#include "moe/gates/balanced_gate.hpp"

#include <set>

#include "../allocation.hpp"
#include "token_choice_checks.hpp"

using namespace moe;
using test::parameter;
using test::random_matrix;
using test::relative_error;
using test::same_bits;
using Indices = std::vector<Index>;

static_assert(Gate<BalancedGate<float>>);
static_assert(Gate<BalancedGate<double>>);

namespace {

Index taken(const BalancedGate<double>::Config& config, Index tokens) {
  return std::max<Index>(tokens == 0 ? 0 : 1, config.top_k * tokens / config.experts);
}

/// [S17 eq. 15-20] a scalar at a time.
struct Naive {
  Matrix<double> p, batch, threshold, G;
  double loss = 0;
  Matrix<double> dx, dweight, dthreshold;

  Naive(BalancedGate<double>& gate, const Matrix<double>& x, const Matrix<double>& r) {
    const auto& config = gate.config();
    const Matrix<double>& w = parameter(gate, "weight").value;
    const Matrix<double>& limit = parameter(gate, "threshold").value;
    const Index T = x.rows();
    const Index E = config.experts;
    p = test::naive_softmax(test::naive_scores(x, w));
    batch = test::naive_column_mask(p, taken(config, T));
    threshold.setZero(T, E);
    G.setZero(T, E);
    dx.setZero(T, x.cols());
    dweight.setZero(x.cols(), E);
    dthreshold.setZero(1, E);
    for (Index t = 0; t < T; ++t) {
      double Z = 0;
      for (Index i = 0; i < E; ++i) {
        threshold(t, i) = p(t, i) > limit(0, i) ? 1 : 0;
        Z += p(t, i) * batch(t, i);
      }
      std::vector<double> dp(detail::to_size(E), 0);
      for (Index i = 0; i < E; ++i) {
        if (batch(t, i) == 1) G(t, i) = p(t, i) / Z;
        const double wrong = config.threshold_weight * (threshold(t, i) - batch(t, i));
        loss += wrong * (p(t, i) - limit(0, i));
        dp[detail::to_size(i)] += wrong;
        dthreshold(0, i) -= wrong;
      }
      // ∂G_j/∂p_i = (δ_ij − G_j)/Z on the mask; ∂p_i/∂c_k = p_i·(δ_ik − p_k).
      for (Index i = 0; i < E; ++i) {
        if (batch(t, i) == 0) continue;
        for (Index j = 0; j < E; ++j) {
          if (batch(t, j) == 0) continue;
          dp[detail::to_size(i)] += r(t, j) * ((i == j ? 1.0 : 0.0) - G(t, j)) / Z;
        }
      }
      for (Index k = 0; k < E; ++k) {
        double dc = 0;
        for (Index i = 0; i < E; ++i) {
          dc += dp[detail::to_size(i)] * p(t, i) * ((i == k ? 1.0 : 0.0) - p(t, k));
        }
        for (Index d = 0; d < x.cols(); ++d) {
          dweight(d, k) += x(t, d) * dc;
          dx(t, d) += w(d, k) * dc;
        }
      }
    }
  }
};

/// The least of the masks' margins: relative gaps between an expert's tokens, and to the threshold.
double margin(const BalancedGate<double>& gate, const Matrix<double>& p) {
  double least = test::column_margin(p, taken(gate.config(), p.rows()));
  const Matrix<double>& threshold = parameter(gate, "threshold").value;
  for (Index i = 0; i < p.size(); ++i) {
    const double limit = threshold(0, i % p.cols());
    least = std::min(least, std::abs(p.data()[i] - limit) / std::max(limit, p.data()[i]));
  }
  return least;
}

/// W_g normal, thresholds of the size of p, so that the masks agree in some places only.
void randomize(BalancedGate<double>& gate, std::uint64_t seed, double weights) {
  test::randomize(gate, seed, weights);
  Matrix<double>& threshold = parameter(gate, "threshold").value;
  threshold = (threshold.array() / weights * 0.3 + 1.0).abs().matrix() /
              static_cast<double>(gate.experts());
}

void check_gradients(const BalancedGate<double>::Config& config, Index tokens, double weights,
                     double inputs) {
  INFO("T " << tokens << ", E " << config.experts << ", K " << config.top_k << ", loss weight "
            << config.threshold_weight << ", weights times " << weights << ", x times " << inputs);
  BalancedGate<double> gate(config, 77);
  BalancedGate<double>::Tape tape;
  Matrix<double> x;
  const double scale = weights * inputs;
  // p moves by 4e-4 of the scale at most when a step of the differences is made.
  const double wanted = 4e-3 * std::min(1.0, scale);
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 2000; ++seed) {
    randomize(gate, seed, weights);
    x = random_matrix(tokens, config.width, seed, inputs);
    gate.forward(x, tape, {.step = 0});
    clear = config.experts == 1 || margin(gate, tape.p) > wanted;
  }
  REQUIRE(clear);
  const Matrix<double> r = random_matrix(tokens, config.experts, 8);
  const Matrix<double> dx = test::gate_dx(gate, x, test::dweight_of(tape.routing, r), tape);

  const Naive naive(gate, x, r);
  CHECK(same_bits(tape.difference, Matrix<double>(naive.threshold - naive.batch)));
  CHECK(relative_error(test::dense_weights(tape.routing), naive.G) < 1e-12);
  CHECK(std::abs(tape.balance.loss - naive.loss) <= 1e-12 * std::max(1.0, naive.loss));
  const auto near = [](const Matrix<double>& a, const Matrix<double>& b) {
    return (a - b).cwiseAbs().maxCoeff() <= 1e-10 * b.cwiseAbs().maxCoeff() + 1e-12;
  };
  CHECK(near(dx, naive.dx));
  CHECK(near(parameter(gate, "weight").gradient(), naive.dweight));
  CHECK(near(parameter(gate, "threshold").gradient(), naive.dthreshold));

  const double steep = scale > 5 ? 0.02 : 1;
  const auto loss = [&] { return test::loss_of(gate, x, r); };
  // Thresholds are of the size of 1/E, whatever the weights; the loss is linear in them.
  const double size = std::max(1.0, std::abs(loss()));
  const auto check = [&](const Matrix<double>& actual, Matrix<double>& value, double step) {
    const Matrix<double> expected = test::difference_gradient(value, loss, step);
    CHECK((actual - expected).cwiseAbs().maxCoeff() <=
          1e-7 * expected.cwiseAbs().maxCoeff() + 2e-15 * size / step);
  };
  check(dx, x, 1e-4 * steep * inputs);
  check(parameter(gate, "weight").gradient(), parameter(gate, "weight").value,
        1e-4 * steep * weights);
  check(parameter(gate, "threshold").gradient(), parameter(gate, "threshold").value,
        1e-4 * std::min(1.0, scale) / static_cast<double>(config.experts));
}

}  // namespace

TEST_CASE("balanced gate: gradients are derivatives for every number of experts",
          "[routing][gate]") {
  for (const Index experts : {1, 2, 3, 4, 6}) {
    for (Index top_k = 1; top_k <= experts; top_k += experts > 3 ? 2 : 1) {
      for (const double weight : {0.0, 0.9}) {
        check_gradients(
            {.width = 3, .experts = experts, .top_k = top_k, .threshold_weight = weight}, 6, 0.8,
            1);
      }
    }
  }
}

TEST_CASE("balanced gate: gradients are derivatives at every scale and where it does not divide",
          "[routing][gate]") {
  for (const double weights : {1e-2, 1.0, 10.0}) {
    for (const double inputs : {1e-2, 1.0, 10.0}) {
      if (weights * inputs > 10) continue;  // a softmax of scores of 100 has no slope
      check_gradients({.width = 3, .experts = 4, .top_k = 2, .threshold_weight = 0.7}, 5, weights,
                      inputs);
    }
  }
  check_gradients({.width = 3, .experts = 5, .top_k = 1, .threshold_weight = 0.7}, 2, 1, 1);
  check_gradients({.width = 3, .experts = 3, .top_k = 2, .threshold_weight = 0.7}, 1, 1, 1);
}

TEMPLATE_TEST_CASE("balanced gate: three tokens and two experts worked by hand", "[routing][gate]",
                   float, double) {
  using S = TestType;
  const auto near = [](double value) { return Catch::Matchers::WithinAbs(value, 1e-6); };
  BalancedGate<S> gate({.width = 1, .experts = 3, .top_k = 1, .threshold_weight = 2}, 0);
  const S ln2 = std::log(S{2});
  parameter(gate, "weight").value = Matrix<S>{{0, ln2, -ln2}};
  parameter(gate, "threshold").value = Matrix<S>{{S(0.3), S(0.6), S(0.2)}};
  // c = (0, x, -x)·ln 2. x = 0: p = (1, 1, 1)/3. x = 1: (1, 2, 1/2)/3.5 = (2, 4, 1)/7. x = 2:
  // (1, 4, 1/4)/5.25 = (4, 16, 1)/21. m = 1·3/3 = 1: expert 0 takes token 0, 1 takes 2, 2 takes 0.
  const Matrix<S> x{{0}, {1}, {2}};
  typename BalancedGate<S>::Tape tape;
  const Routing<S>& routing = gate.forward(x, tape, {.step = 0});
  CHECK(routing.token_offsets == Indices{0, 2, 2, 3});
  CHECK(routing.expert == Indices{0, 2, 1});
  CHECK_THAT(static_cast<double>(routing.weight[0]), near(0.5));
  CHECK_THAT(static_cast<double>(routing.weight[1]), near(0.5));
  CHECK(routing.weight[2] == 1);
  CHECK(tape.balance.tokens_per_expert == Indices{1, 1, 1});
  CHECK(tape.balance.load == Vector<S>::Ones(3));
  CHECK_THAT(static_cast<double>(tape.balance.importance[0]), near(0.5));
  CHECK_THAT(static_cast<double>(tape.balance.importance[1]), near(1));
  // Above the thresholds (0.3, 0.6, 0.2): token 0 with 0 and 2; token 1 with none, as 2/7 < 0.3,
  // 4/7 < 0.6 and 1/7 < 0.2; token 2 with 1. So the masks agree and the loss is 0.
  CHECK(tape.balance.loss == 0);

  // Thresholds (0.28, 0.8, 0.2): token 1 passes with expert 0, which left it: 2/7 - 0.28 = 0.04/7;
  // token 2 does not with expert 1, which took it: 0.8 - 16/21 = 0.8/21.
  parameter(gate, "threshold").value = Matrix<S>{{S(0.28), S(0.8), S(0.2)}};
  gate.forward(x, tape, {.step = 0});
  CHECK_THAT(static_cast<double>(tape.balance.loss), near(2 * (0.04 / 7 + 0.8 / 21)));
  // dL/dthreshold = -2·(1, -1, 0). dweight = (1, 0, 5): token 0 has g = (1, -, 0), Σ G·g = 1/2,
  // dc = (1/4, 0, -1/4); token 2 has one expert and gets nothing of it. The loss: for token 1
  // dp = (2, 0, 0), Σ p·dp = 4/7, dc = (2/7·10/7, -4/7·4/7, -1/7·4/7) = (20, -16, -4)/49; for token
  // 2 dp = (0, -2, 0), Σ p·dp = -32/21, dc = (4·32, -16·10, 32)/441.
  const std::vector<S> dweight = {1, 0, 5};
  const Matrix<S>& dx = test::gate_dx(gate, x, dweight, tape);
  const auto error = [](const Matrix<S>& a, const Matrix<S>& b) {
    return static_cast<double>((a - b).cwiseAbs().maxCoeff());
  };
  CHECK(error(parameter(gate, "threshold").gradient(), Matrix<S>{{-2, 2, 0}}) == 0);
  const Matrix<S> token1 = Matrix<S>{{20, -16, -4}} / S{49};
  const Matrix<S> token2 = Matrix<S>{{128, -160, 32}} / S{441};
  CHECK(error(parameter(gate, "weight").gradient(), token1 + 2 * token2) < 1e-6);
  CHECK(error(dx, Matrix<S>{{ln2 / 4}, {ln2 * S(-12) / 49}, {ln2 * S(-192) / 441}}) < 1e-6);
}

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
  gate.forward(x, used);
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
  const Routing<TestType>& routing = gate.forward(random_matrix<TestType>(4, 3, 1), tape, {.step = 0});
  CHECK(routing.token_offsets == Indices{0, 4, 8, 8, 8});
  CHECK(routing.expert == Indices{0, 1, 2, 3, 0, 1, 2, 3});
  for (const TestType weight : routing.weight) CHECK(weight == TestType{0.25});
}

TEST_CASE("balanced gate: gradients of a layer are derivatives", "[routing][gate]") {
  using Layer = MoELayer<Expert<FeedForward, double>, BalancedGate<double>>;
  test::check_layer_gradients<Layer>({.width = 3,
                                      .expert = {.hidden = 3, .activation = Activation::gelu},
                                      .gate = {.experts = 4, .top_k = 2, .threshold_weight = 0.5},
                                      .seed = 4},
                                     6, [](const BalancedGate<double>& gate, const Layer::Tape& tape) {
                                       return margin(gate, tape.gate.p) > 1e-2;
                                     });
}

TEMPLATE_TEST_CASE("balanced gate: the same bits on any number of threads", "[routing][gate]",
                   float, double) {
  test::check_threads<BalancedGate<TestType>>({.width = 7, .experts = 21, .top_k = 3}, 300);
}

TEST_CASE("balanced gate: shapes at the ends", "[routing][gate]") {
  SECTION("no tokens") {
    BalancedGate<float> gate({.width = 3, .experts = 5, .top_k = 2}, 0);
    BalancedGate<float>::Tape tape;
    CHECK(gate.forward(Matrix<float>(0, 3), tape, {.step = 0}).slots() == 0);
    CHECK(tape.balance.loss == 0);
    CHECK(test::gate_dx(gate, Matrix<float>(0, 3), {}, tape).rows() == 0);
    CHECK(gate.evaluate(Matrix<float>(0, 3)).slots() == 0);
  }
  SECTION("one expert, all experts, fewer tokens than experts") {
    for (const Index experts : {1, 9}) {
      for (const Index top_k : {Index{1}, experts}) {
        for (const Index tokens : {1, 4}) {
          BalancedGate<float> gate({.width = 3, .experts = experts, .top_k = top_k}, 0);
          BalancedGate<float>::Tape tape;
          const Index slots = gate.forward(random_matrix<float>(tokens, 3, 1), tape, {.step = 0}).slots();
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
  for (const S bad : {std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::infinity(),
                      -std::numeric_limits<S>::infinity()}) {
    for (const Index top_k : {1, 4}) {
      BalancedGate<S> gate({.width = 3, .experts = 4, .top_k = top_k}, 1);
      Matrix<S> x = random_matrix<S>(8, 3, 2);
      x(2, 1) = bad;
      typename BalancedGate<S>::Tape tape;
      const Routing<S>& routing = gate.forward(x, tape, {.step = 0});
      test::check_routing(routing, 8, 4);
      test::for_each_slot(routing, [&](Index t, Index, std::size_t s) {
        CHECK(std::isnan(routing.weight[s]) == (t == 2));
      });
      CHECK(routing.token_offsets[3] - routing.token_offsets[2] == (top_k == 4 ? 4 : 0));
      CHECK(std::isnan(tape.balance.loss));

      const Routing<S> served = gate.evaluate(x);
      test::check_routing(served, 8, 4);
      REQUIRE(served.token_offsets[3] - served.token_offsets[2] == 1);
      const auto slot = detail::to_size(served.token_offsets[2]);
      CHECK(served.expert[slot] == 0);
      CHECK(std::isnan(served.weight[slot]));
    }
  }
}

TEST_CASE("balanced gate: backward adds once each time", "[routing][gate]") {
  BalancedGate<double> gate({.width = 3, .experts = 5, .top_k = 2}, 1);
  BalancedGate<double>::Tape tape;
  const Matrix<double> x = random_matrix(10, 3, 2);
  gate.forward(x, tape, {.step = 0});
  std::vector<double> dweight(20);
  for (std::size_t s = 0; s < 20; ++s) dweight[s] = std::sin(static_cast<double>(s));
  const Matrix<double> dx = test::gate_dx(gate, x, dweight, tape);
  const test::Named once = test::gradients_of(gate);
  CHECK(same_bits(test::gate_dx(gate, x, dweight, tape), dx));
  for (const auto& [name, gradient] : test::gradients_of(gate)) {
    CHECK(once.at(name).cwiseAbs().maxCoeff() > 0);
    CHECK(relative_error(gradient, Matrix<double>(2 * once.at(name))) < 1e-14);
  }
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

TEST_CASE("balanced gate: a bad input is refused and changes nothing", "[routing][gate]") {
  BalancedGate<double> gate({.width = 3, .experts = 5, .top_k = 2}, 1);
  BalancedGate<double>::Tape tape;
  const Matrix<double> x = random_matrix(10, 3, 2);
  const std::vector<double> dweight(20, 0.5);
  const char* const untrained = "moe: BalancedGate::backward without a forward pass on this tape";
  CHECK_THROWS_WITH(test::gate_dx(gate, x, dweight, tape), untrained);
  gate.forward(random_matrix(10, 3, 2), tape, {.step = 0});
  gate.evaluate(random_matrix(10, 3, 3), tape);
  CHECK_THROWS_WITH(test::gate_dx(gate, x, dweight, tape), untrained);

  gate.forward(random_matrix(10, 3, 2), tape, {.step = 0});
  const BalancedGate<double>::Tape before = tape;
  const Matrix<double> wide = random_matrix(10, 4, 2);
  CHECK_THROWS_WITH(gate.forward(wide, tape, {.step = 0}),
                    "moe: BalancedGate: x has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(gate.evaluate(wide, tape),
                    "moe: BalancedGate: x has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(test::gate_dx(gate, x, std::vector<double>(19, 0.5), tape),
                    "moe: BalancedGate::backward: dweight has 19 entries for 20 slots");
  CHECK(same_bits(tape.p, before.p));
  CHECK(tape.routing.weight == before.routing.weight);
  for_each_parameter(gate, [](const ParameterName&, Parameter<double>& p) {
    CHECK(p.gradient().cwiseAbs().maxCoeff() == 0);
  });
  const std::string foreign =
      "moe: BalancedGate::backward: the tape is another gate's, of 5 experts and 20 slots of 10 "
      "tokens";
  BalancedGate<double> few({.width = 3, .experts = 4, .top_k = 2}, 0);
  CHECK_THROWS_WITH(test::gate_dx(few, x, dweight, tape), foreign);
  BalancedGate<double> busy({.width = 3, .experts = 5, .top_k = 3}, 0);
  CHECK_THROWS_WITH(test::gate_dx(busy, x, dweight, tape), foreign);
  BalancedGate<double> broad({.width = 4, .experts = 5, .top_k = 2}, 0);
  CHECK_THROWS_WITH(test::gate_dx(broad, x, dweight, tape),
                    "moe: BalancedGate::backward: x is 10 x 3, in forward() it was 10 x 4");
  CHECK_NOTHROW(test::gate_dx(gate, x, dweight, tape));
}

TEMPLATE_TEST_CASE("balanced gate: no memory after the first call", "[routing][gate][allocation]",
                   float, double) {
  using S = TestType;
  for (const int count : {1, 3}) {
    const test::Threads threads(count);
    MoELayer<Expert<FeedForward, S>, BalancedGate<S>> layer(
        {.width = 8, .expert = {.hidden = 8}, .gate = {.experts = 12, .top_k = 2}, .seed = 0});
    const Matrix<S> x = random_matrix<S>(200, 8, 1);
    typename decltype(layer)::Tape training;
    typename decltype(layer)::Tape serving;
    const auto pass = [&] {
      layer.forward(x, training, {.step = 0});
      layer.backward(x, training);
      layer.evaluate(x, serving);
    };
    pass();
    CHECK(test::allocations_in([&] {
            for (int i = 0; i < 3; ++i) pass();
          }) == 0);
  }
}
