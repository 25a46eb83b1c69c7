#include "../naive_layer.hpp"
#include "gates.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/optim/adam.hpp"
#include "moe/optim/gradient_clipping.hpp"
#include "moe/optim/sgd.hpp"
#include "top_k.hpp"

using namespace moe;
using namespace moe::test;

TEST_CASE("top-k gate: the bias moves the choice and no weight", "[routing][gate]") {
  for (const Score score : all_scores) {
    TopKGate<double> gate(
        {.width = 1, .experts = 3, .top_k = 1, .score = score, .selection_bias = true}, 0);
    parameter(gate, "weight").value << 1, 0.5, 0;
    TopKTape<double> tape;
    const Matrix<double> one{{1}};
    CHECK(gate.forward(one, tape, {.step = 0}).expert == Indices{0});
    parameter(gate, "selection_bias").value << 0, 0, 2;
    CHECK(gate.forward(one, tape, {.step = 0}).expert == Indices{2});
    const double all = std::exp(1.0) + std::exp(0.5) + 1;
    const double expected = score == Score::softmax         ? 1 / all
                            : score == Score::sigmoid       ? 0.5
                            : score == Score::sqrt_softplus ? std::sqrt(std::log(2.0))
                                                            : 1;
    CHECK_THAT(tape.routing.weight[0], Catch::Matchers::WithinAbs(expected, 1e-14));
  }
}

TEST_CASE("top-k gate: the bias follows the sign of the load error", "[routing][gate]") {
  TopKGate<float> gate(
      {.width = 2, .experts = 4, .top_k = 1, .selection_bias = true, .bias_rate = 0.25}, 0);
  Vector<float> load(4);
  load << 3, 0, 1, 0;  // mean 1
  gate.update_selection_bias(load);
  CHECK(parameter(gate, "selection_bias").value == Matrix<float>{{-0.25f, 0.25f, 0, 0.25f}});
  load << 1, 2, 1, 1;  // mean 5/4
  gate.update_selection_bias(load);
  CHECK(parameter(gate, "selection_bias").value == Matrix<float>{{0, 0, 0.25f, 0.5f}});
  CHECK_THROWS_WITH(gate.update_selection_bias(Vector<float>(3)),
                    "moe: TopKGate::update_selection_bias: load has 3 entries for 4 experts");
  TopKTape<float> tape;
  CHECK_THROWS_WITH(gate.update_selection_bias(tape),
                    "moe: TopKGate::update_selection_bias without a forward pass on this tape");
  TopKGate<float> without({.width = 2, .experts = 4, .top_k = 1}, 0);
  CHECK_THROWS_WITH(without.update_selection_bias(Vector<float>(4)),
                    "moe: TopKGate::update_selection_bias without Config.selection_bias");
}

TEST_CASE("top-k gate: the bias alone brings a collapsed gate into balance", "[routing][gate]") {
  TopKGate<float> gate({.width = 4,
                        .experts = 8,
                        .top_k = 2,
                        .score = Score::sigmoid,
                        .selection_bias = true,
                        .bias_rate = 0.01},
                       1);
  fill_normal(parameter(gate, "weight").value, 1.0f, 1);
  Matrix<float> x = random_matrix<float>(800, 4, 2);
  x.col(0).array() += 2;
  TopKTape<float> tape;
  gate.forward(x, tape, {.step = 0});
  const float before = tape.balance.max_over_mean_load();
  CHECK(before > 2);
  for (int step = 0; step < 150; ++step) {
    gate.forward(x, tape, {.step = 0});
    gate.update_selection_bias(tape);
  }
  CHECK(tape.balance.max_over_mean_load() < 1.25f);
}

TEST_CASE("top-k gate: no optimizer moves the bias", "[routing][gate]") {
  TopKGate<double> gate(everything(), 1);
  Matrix<double>& bias = parameter(gate, "selection_bias").value;
  fill_normal(bias, 0.3, 5);
  const Matrix<double> before = bias;
  CHECK(parameter_count(gate) == 5 * 12 + 12);  // W_g and b_g
  const Matrix<double> weight = parameter(gate, "weight").value;
  for (const Updates updates : {Updates::dense, Updates::lazy}) {
    Adam<double> adam({.weight_decay = 0.1, .updates = updates});
    SGD<double> sgd({.momentum = 0.9, .weight_decay = 0.1, .updates = updates});
    SGD<double> plain({.weight_decay = 0.1, .updates = updates});
    TopKTape<double> tape;
    for (std::uint64_t step = 0; step < 3; ++step) {
      zero_gradients(gate, updates);
      gate.forward(random_matrix(6, 5, step), tape, {.step = step});
      test::gate_dx(gate, random_matrix(6, 5, step),
                    std::vector<double>(tape.routing.weight.size(), 0.5), tape);
      CHECK(parameter(gate, "selection_bias").gradient().cwiseAbs().maxCoeff() == 0);
      clip_gradients(gate, 0.01, updates);
      adam.update(gate, 0.1);
      sgd.update(gate, 0.1);
      plain.update(gate, 0.1);
    }
  }
  CHECK(same_bits(bias, before));
  CHECK_FALSE(same_bits(parameter(gate, "weight").value, weight));
}
