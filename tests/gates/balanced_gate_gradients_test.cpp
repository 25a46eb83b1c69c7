#include "balanced.hpp"

using namespace moe;
using namespace moe::test;

namespace {

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

TEST_CASE("balanced gate: gradients of a layer are derivatives", "[routing][gate]") {
  using Layer = MoELayer<Expert<FeedForward, double>, BalancedGate<double>>;
  test::check_layer_gradients<Layer>({.width = 3,
                                      .expert = {.hidden = 3, .activation = Activation::gelu},
                                      .gate = {.experts = 4, .top_k = 2, .threshold_weight = 0.5},
                                      .seed = 4},
                                     6,
                                     [](const BalancedGate<double>& gate, const Layer::Tape& tape) {
                                       return margin(gate, tape.gate.p) > 1e-2;
                                     });
}
