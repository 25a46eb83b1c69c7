#include "../naive_layer.hpp"
#include "gates.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "top_k.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// Checks W_g, the bias and x at a point where no step of the differences changes a choice or a
/// drop. Returns how many choices were dropped.
Index check_gradients(const TopKConfig& config, Index tokens, double weights = 0.8,
                      double inputs = 1) {
  INFO("score " << static_cast<int>(config.score) << ", renormalise " << config.renormalise
                << ", norm " << config.renormalise_norm << ", after drops "
                << config.renormalise_after_drops << ", E " << config.experts << ", K "
                << config.top_k << ", groups " << config.groups << "/" << config.top_k_groups
                << ", bias " << config.bias << ", selection bias " << config.selection_bias
                << ", jitter " << config.jitter << ", random second " << config.random_second
                << ", drawn second " << config.drawn_second << ", capacity "
                << config.capacity_factor << " or " << config.capacity << ", order "
                << static_cast<int>(config.place_order) << ", losses " << config.switch_loss_weight
                << " " << config.sequence_loss_weight << " " << config.z_loss_weight << ", count "
                << static_cast<int>(config.switch_count) << ", weights times " << weights
                << ", x times " << inputs);
  const Pass key{.step = 3, .first_token = 5};
  // e^c is steep where logits are large.
  const double steep = weights * inputs > 5 ? 0.02 : 1;
  for (std::uint64_t seed = 1; seed < 60; ++seed) {
    TopKGate<double> gate(config, seed);
    fill_normal(parameter(gate, "weight").value, weights, seed);
    if (config.bias) fill_normal(parameter(gate, "bias").value, weights, seed + 1);
    if (config.selection_bias) fill_normal(parameter(gate, "selection_bias").value, 0.1, seed);
    Matrix<double> x = random_matrix(tokens, config.width, seed, inputs);
    const Matrix<double> r = random_matrix(tokens, config.experts, 8);
    TopKTape<double> tape;
    gate.forward(x, tape, key);
    TopKTape<double> fresh;
    bool same = true;
    const auto loss = [&] {
      const Routing<double>& routing = gate.forward(x, fresh, key);
      same = same && fresh.choices.expert == tape.choices.expert &&
             fresh.choices.keeps == tape.choices.keeps;
      double sum = fresh.balance.loss;
      const std::vector<double> dweight = dweight_of(routing, r);
      for (std::size_t s = 0; s < dweight.size(); ++s) sum += routing.weight[s] * dweight[s];
      return sum;
    };
    test::difference_gradient(x, loss, 1e-4 * steep * inputs);
    test::difference_gradient(parameter(gate, "weight").value, loss, 1e-4 * steep * weights);
    if (config.bias) {
      test::difference_gradient(parameter(gate, "bias").value, loss, 1e-4 * steep * weights);
    }
    if (config.selection_bias) {
      test::difference_gradient(parameter(gate, "selection_bias").value, loss,
                                1e-4 * steep * weights);
    }
    if (!same) continue;
    const Matrix<double> dx = test::gate_dx(gate, x, dweight_of(tape.routing, r), tape);
    test::check_scaled_gradients(gate, dx, x, loss, weights, inputs, steep);
    return tokens * config.top_k - tape.routing.slots();
  }
  FAIL("no point away from ties");
  return 0;
}

}  // namespace

TEST_CASE("top-k gate: gradients are derivatives for every number of experts", "[routing][gate]") {
  for (const Score score : all_scores) {
    for (const bool renormalise : {false, true}) {
      const bool has_norm = renormalise && score != Score::softmax_of_chosen;
      for (Index experts = 1; experts <= 9; experts += experts > 3 ? 2 : 1) {
        for (Index top_k = 1; top_k <= experts; top_k += experts > 5 ? 3 : 1) {
          check_gradients({.width = 3,
                           .experts = experts,
                           .top_k = top_k,
                           .bias = renormalise,
                           .score = score,
                           .renormalise = renormalise,
                           .renormalise_epsilon = has_norm && top_k % 2 == 1 ? 0.1 : 0,
                           .renormalise_norm = !has_norm || experts % 3 == 0 ? 1
                                               : experts % 3 == 1            ? 2
                                                                             : 3.5,
                           .scale = 1.7,
                           .switch_loss_weight = 0.7,
                           .z_loss_weight = 0.3},
                          4);
        }
      }
    }
  }
}

TEST_CASE("top-k gate: gradients are derivatives for every set of losses", "[routing][gate]") {
  for (const Score score : all_scores) {
    for (const double batch : {0.0, 0.9}) {
      for (const double sequence : {0.0, 1.7}) {
        for (const double z : {0.0, 0.4}) {
          for (const auto count :
               {SwitchCount::per_slot, SwitchCount::per_token, SwitchCount::first_choice}) {
            const bool even = count != SwitchCount::per_token;
            check_gradients({.width = 3,
                             .experts = 5,
                             .top_k = 2,
                             .score = score,
                             .renormalise = even,
                             .switch_loss_weight = batch,
                             .sequence_loss_weight = sequence,
                             .switch_count = count,
                             .sequences = even ? 3 : 2,
                             .row_order = even ? RowOrder::time_major : RowOrder::sequence_major,
                             .z_loss_weight = z},
                            6);
          }
        }
      }
    }
  }
}

TEST_CASE("top-k gate: gradients are derivatives for every choice and drop", "[routing][gate]") {
  Index dropped = 0;
  for (const Score score : all_scores) {
    for (const bool renormalise : {false, true}) {
      for (const Index top_k_groups : {1, 2, 3}) {
        for (const bool bias : {false, true}) {
          for (const int drops : {0, 1, 2, 3, 4}) {
            dropped += check_gradients(
                {.width = 3,
                 .experts = 6,
                 .top_k = 2,
                 .score = score,
                 .renormalise = renormalise,
                 .renormalise_norm =
                     renormalise && drops == 4 && score != Score::softmax_of_chosen ? 2.0 : 1.0,
                 .renormalise_after_drops =
                     top_k_groups != 2 && (renormalise || score == Score::softmax_of_chosen),
                 .groups = 3,
                 .top_k_groups = top_k_groups,
                 .group_score = bias ? GroupScore::two_best : GroupScore::best,
                 .selection_bias = bias,
                 .jitter = drops % 2 == 0 ? 0.3 : 0,
                 .random_second = drops >= 2,
                 .drawn_second = drops % 3 == 1 && !bias,
                 .capacity_factor = drops == 0 || drops == 3 ? 0 : 0.8,
                 .capacity = drops == 3 ? 1 : 0,
                 .place_order = static_cast<PlaceOrder>(std::max(0, drops - 1)),
                 .switch_loss_weight = bias ? 0.4 : 0.0,
                 .sequences = drops == 3 ? 2 : 1},
                6);
          }
        }
      }
    }
  }
  CHECK(dropped > 100);
}

TEST_CASE("top-k gate: gradients are derivatives at every scale", "[routing][gate]") {
  for (const Score score : all_scores) {
    for (const double weights : {1e-2, 1.0, 10.0}) {
      for (const double inputs : {1e-2, 1.0, 10.0}) {
        if (weights * inputs > 20) continue;  // probabilities are 0 and 1 there, and ties
        check_gradients({.width = 3,
                         .experts = 6,
                         .top_k = 2,
                         .bias = inputs < 5,
                         .score = score,
                         .renormalise = weights < 5,
                         .jitter = 0.2,
                         .switch_loss_weight = 1,
                         .sequence_loss_weight = 1,
                         .sequences = 2,
                         .z_loss_weight = 0.1},
                        4, weights, inputs);
      }
    }
  }
}

TEST_CASE("top-k gate: with everything on inside a layer, gradients are derivatives",
          "[routing][gate]") {
  using Layer = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  const test::Threads threads(1);
  for (const Score score : all_scores) {
    TopKConfig gate = everything(score);
    gate.width = 0;
    Layer layer({.width = 4,
                 .expert = {.hidden = 3, .activation = Activation::gelu},
                 .gate = gate,
                 .seed = 4});
    const Pass key{.step = 7};
    bool checked = false;
    for (std::uint64_t seed = 1; !checked && seed < 60; ++seed) {
      test::randomize(layer, seed, 0.7);
      Matrix<double> x = random_matrix(6, 4, seed);
      const Matrix<double> r = random_matrix(6, 4, 3);
      Layer::Tape tape;
      layer.forward(x, tape, key);
      bool same = true;
      const auto loss = [&] {
        Layer::Tape fresh;
        const double value = layer.forward(x, fresh, key).cwiseProduct(r).sum();
        same = same && fresh.gate.choices.expert == tape.gate.choices.expert &&
               fresh.gate.choices.keeps == tape.gate.choices.keeps;
        return value + fresh.balance().loss;
      };
      test::difference_gradient(x, loss);
      for_each_parameter(layer, [&](const std::string& name, Parameter<double>& p) {
        if (name.starts_with("gate")) test::difference_gradient(p.value, loss);
      });
      if (!same) continue;
      CHECK(tape.routing().slots() < 12);
      zero_gradients(layer);
      const Matrix<double> dx = layer.backward(r, tape);
      test::check_scaled_gradients(layer, dx, x, loss, 0.7, 1, 1);
      checked = true;
    }
    CHECK(checked);
  }
}

TEST_CASE("top-k gate: one active expert learns from its weight", "[routing][gate]") {
  for (const Score score : all_scores) {
    TopKGate<double> gate({.width = 3, .experts = 5, .top_k = 1, .score = score}, 1);
    TopKTape<double> tape;
    gate.forward(random_matrix(6, 3, 2), tape, {.step = 0});
    test::gate_dx(gate, random_matrix(6, 3, 2), std::vector<double>(6, 2.5), tape);
    const double size = parameter(gate, "weight").gradient().cwiseAbs().maxCoeff();
    // The softmax of one number is the constant 1.
    CHECK((score == Score::softmax_of_chosen ? size == 0 : size > 0.01));
  }
}
