#include "moe/gates/hierarchical_gate.hpp"
#include "token_choice_checks.hpp"

using namespace moe;
using detail::to_size;
using namespace moe::test;
using Config = HierarchicalGate<double>::Config;

namespace {

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
  check_gate_gradients<HierarchicalGate<double>>(
      config, tokens, weights, inputs,
      [](const auto& gate, const auto& tape) { return choice_margin(gate, tape); });
}

}  // namespace

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
  const Matrix<double> g = test::dense_weights(tape.routing());
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
