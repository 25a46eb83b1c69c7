#include "moe/gates/top_k_gate.hpp"

#include <set>

#include "../allocation.hpp"
#include "../naive_layer.hpp"
#include "moe/optim/adam.hpp"
#include "moe/optim/gradient_clipping.hpp"
#include "moe/optim/sgd.hpp"
#include "token_choice_checks.hpp"

using namespace moe;
using test::dweight_of;
using test::parameter;
using test::random_matrix;
using test::same_bits;
using Indices = std::vector<Index>;
using Config = TopKConfig;
template <class Scalar>
using Tape = typename TopKGate<Scalar>::Tape;

namespace {

/// Checks W_g, the bias and x at a point where no step of the differences changes a choice or a
/// drop. Returns how many choices were dropped.
Index check_gradients(const Config& config, Index tokens, double weights = 0.8, double inputs = 1) {
  INFO("score " << static_cast<int>(config.score) << ", renormalise " << config.renormalise
                << ", E " << config.experts << ", K " << config.top_k << ", groups "
                << config.groups << "/" << config.top_k_groups << ", bias " << config.selection_bias
                << ", jitter " << config.jitter << ", random second " << config.random_second
                << ", capacity " << config.capacity_factor << ", order "
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
    if (config.selection_bias) fill_normal(parameter(gate, "selection_bias").value, 0.1, seed);
    Matrix<double> x = random_matrix(tokens, config.width, seed, inputs);
    const Matrix<double> r = random_matrix(tokens, config.experts, 8);
    Tape<double> tape;
    gate.forward(x, tape, key);
    Tape<double> fresh;
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

constexpr Score scores[] = {Score::softmax, Score::softmax_of_chosen, Score::sigmoid};

/// Everything at once.
Config everything(Score score = Score::sigmoid) {
  return {.width = 5,
          .experts = 12,
          .top_k = 2,
          .score = score,
          .renormalise = true,
          .scale = 2.5,
          .groups = 4,
          .top_k_groups = 2,
          .group_score = GroupScore::two_best,
          .selection_bias = true,
          .jitter = 0.1,
          .random_second = true,
          .capacity_factor = 1,
          .place_order = PlaceOrder::largest_weight,
          .switch_loss_weight = 0.3,
          .sequence_loss_weight = 0.2,
          .sequences = 2,
          .z_loss_weight = 0.1};
}

}  // namespace

TEST_CASE("top-k gate: gradients are derivatives for every number of experts", "[routing][gate]") {
  for (const Score score : scores) {
    for (const bool renormalise : {false, true}) {
      for (Index experts = 1; experts <= 9; experts += experts > 3 ? 2 : 1) {
        for (Index top_k = 1; top_k <= experts; top_k += experts > 5 ? 3 : 1) {
          check_gradients({.width = 3,
                           .experts = experts,
                           .top_k = top_k,
                           .score = score,
                           .renormalise = renormalise,
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
  for (const Score score : scores) {
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
  for (const Score score : scores) {
    for (const bool renormalise : {false, true}) {
      for (const Index top_k_groups : {1, 2, 3}) {
        for (const bool bias : {false, true}) {
          for (const int drops : {0, 1, 2, 3}) {
            dropped +=
                check_gradients({.width = 3,
                                 .experts = 6,
                                 .top_k = 2,
                                 .score = score,
                                 .renormalise = renormalise,
                                 .groups = 3,
                                 .top_k_groups = top_k_groups,
                                 .group_score = bias ? GroupScore::two_best : GroupScore::best,
                                 .selection_bias = bias,
                                 .jitter = drops % 2 == 0 ? 0.3 : 0,
                                 .random_second = drops >= 2,
                                 .capacity_factor = drops == 0 ? 0 : 0.8,
                                 .place_order = static_cast<PlaceOrder>(std::max(0, drops - 1)),
                                 .switch_loss_weight = bias ? 0.4 : 0.0},
                                6);
          }
        }
      }
    }
  }
  CHECK(dropped > 100);
}

TEST_CASE("top-k gate: gradients are derivatives at every scale", "[routing][gate]") {
  for (const Score score : scores) {
    for (const double weights : {1e-2, 1.0, 10.0}) {
      for (const double inputs : {1e-2, 1.0, 10.0}) {
        if (weights * inputs > 20) continue;  // probabilities are 0 and 1 there, and ties
        check_gradients({.width = 3,
                         .experts = 6,
                         .top_k = 2,
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
  for (const Score score : scores) {
    Config gate = everything(score);
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
  for (const Score score : scores) {
    TopKGate<double> gate({.width = 3, .experts = 5, .top_k = 1, .score = score}, 1);
    Tape<double> tape;
    gate.forward(random_matrix(6, 3, 2), tape, {.step = 0});
    test::gate_dx(gate, random_matrix(6, 3, 2), std::vector<double>(6, 2.5), tape);
    const double size = parameter(gate, "weight").gradient().cwiseAbs().maxCoeff();
    // The softmax of one number is the constant 1.
    CHECK((score == Score::softmax_of_chosen ? size == 0 : size > 0.01));
  }
}

TEMPLATE_TEST_CASE(
    "top-k gate: the same bits on any number of threads, over more experts than a block",
    "[routing][gate]", float, double) {
  for (const Score score : scores) {
    Config config = everything(score);
    config.experts = 1200;
    test::check_threads<TopKGate<TestType>>(config, 300);
  }
}

TEST_CASE("top-k gate: jitter and second choices replay by their key", "[routing][gate]") {
  const Matrix<double> x = random_matrix(40, 5, 1);
  const auto run = [&](std::uint64_t seed, const Pass& key, const Matrix<double>& rows) {
    TopKGate<double> gate({.width = 5,
                           .experts = 6,
                           .top_k = 2,
                           .renormalise = true,
                           .jitter = 0.25,
                           .random_second = true},
                          seed);
    fill_normal(parameter(gate, "weight").value, 0.8, 1);
    Tape<double> tape;
    gate.forward(rows, tape, key);
    return tape;
  };
  const auto first = run(1, {.step = 4}, x);
  CHECK(first.jitter.minCoeff() >= 0.75);
  CHECK(first.jitter.maxCoeff() < 1.25);
  CHECK(first.jitter.minCoeff() < 0.8);
  CHECK(first.jitter.maxCoeff() > 1.2);
  const std::set<double> distinct(first.jitter.data(), first.jitter.data() + 200);
  CHECK(distinct.size() == 200);
  CHECK(std::count(first.choices.keeps.begin(), first.choices.keeps.end(), 0) > 5);

  const auto again = run(1, {.step = 4}, x);
  CHECK(same_bits(again.jitter, first.jitter));
  CHECK(again.choices.keeps == first.choices.keeps);
  const auto part = run(1, {.step = 4, .first_token = 10}, x.bottomRows(30));
  CHECK(same_bits(part.jitter, first.jitter.bottomRows(30)));
  CHECK(std::equal(part.choices.keeps.begin(), part.choices.keeps.end(),
                   first.choices.keeps.begin() + 20));
  for (const auto& other : {run(1, {.step = 5}, x), run(2, {.step = 4}, x)}) {
    CHECK_FALSE(same_bits(other.jitter, first.jitter));
    CHECK(other.choices.keeps != first.choices.keeps);
  }
}

TEST_CASE("top-k gate: a second choice is kept as often as twice its weight", "[routing][gate]") {
  TopKGate<double> gate(
      {.width = 1, .experts = 3, .top_k = 2, .renormalise = true, .random_second = true}, 3);
  parameter(gate, "weight").value << std::log(4.0), 0, -9;  // weights 4/5 and 1/5
  Tape<double> tape;
  gate.forward(Matrix<double>::Ones(20000, 1), tape, {.step = 0});
  Index kept = 0;
  for (Index t = 0; t < 20000; ++t) {
    CHECK(tape.choices.keeps[detail::to_size(2 * t)] == 1);
    kept += tape.choices.keeps[detail::to_size(2 * t + 1)];
  }
  CHECK(std::abs(static_cast<double>(kept) / 20000 - 0.4) < 0.014);  // four deviations
  gate.evaluate(Matrix<double>::Ones(20, 1), tape);
  CHECK(tape.routing.slots() == 40);
}

TEST_CASE("top-k gate: evaluation sees training without jitter, drops and capacity",
          "[routing][gate]") {
  TopKGate<double> gate(everything(), 1);
  Config plain_config = everything();
  plain_config.jitter = 0;
  plain_config.random_second = false;
  plain_config.capacity_factor = 0;
  TopKGate<double> plain(plain_config, 1);
  const Matrix<double> x = random_matrix(30, 5, 2);
  Tape<double> served;
  Tape<double> trained;
  gate.evaluate(x, served);
  plain.forward(x, trained, {.step = 0});
  CHECK(served.routing.expert == trained.routing.expert);
  CHECK(served.routing.weight == trained.routing.weight);
  CHECK(served.balance.loss == trained.balance.loss);
  CHECK(served.routing.slots() == 60);
  CHECK(gate.evaluate(x).weight == served.routing.weight);

  plain_config.evaluation_capacity_factor = 0.5;
  const TopKGate<double> limited(plain_config, 1);
  limited.evaluate(x, served);
  for (const Index tokens : served.balance.tokens_per_expert) CHECK(tokens <= 3);  // 0.5·60/12
  limited.forward(x, trained, {.step = 0});
  CHECK(trained.routing.slots() == 60);
}

TEST_CASE("top-k gate: load counts what was chosen, tokens what was kept", "[routing][gate]") {
  TopKGate<double> gate(everything(), 1);
  Tape<double> tape;
  const Routing<double>& routing = gate.forward(random_matrix(60, 5, 2), tape, {.step = 0});
  CHECK(tape.balance.load.sum() == 120);
  Index kept = 0;
  for (Index e = 0; e < 12; ++e) {
    const auto chosen = std::count(tape.choices.expert.begin(), tape.choices.expert.end(), e);
    const auto slots = std::count(routing.expert.begin(), routing.expert.end(), e);
    CHECK(tape.balance.load[e] == static_cast<double>(chosen));
    CHECK(tape.balance.tokens_per_expert[detail::to_size(e)] == slots);
    CHECK(slots <= 10);  // 1·120/12
    kept += slots;
  }
  CHECK(kept == routing.slots());
  CHECK(kept < 120);
}

TEST_CASE("top-k gate: the bias moves the choice and no weight", "[routing][gate]") {
  for (const Score score : scores) {
    TopKGate<double> gate(
        {.width = 1, .experts = 3, .top_k = 1, .score = score, .selection_bias = true}, 0);
    parameter(gate, "weight").value << 1, 0.5, 0;
    Tape<double> tape;
    const Matrix<double> one{{1}};
    CHECK(gate.forward(one, tape, {.step = 0}).expert == Indices{0});
    parameter(gate, "selection_bias").value << 0, 0, 2;
    CHECK(gate.forward(one, tape, {.step = 0}).expert == Indices{2});
    const double all = std::exp(1.0) + std::exp(0.5) + 1;
    const double expected = score == Score::softmax ? 1 / all : score == Score::sigmoid ? 0.5 : 1;
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
  Tape<float> tape;
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
  Tape<float> tape;
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
  CHECK(parameter_count(gate) == 5 * 12);
  const Matrix<double> weight = parameter(gate, "weight").value;
  for (const Updates updates : {Updates::dense, Updates::lazy}) {
    Adam<double> adam({.weight_decay = 0.1, .updates = updates});
    SGD<double> sgd({.momentum = 0.9, .weight_decay = 0.1, .updates = updates});
    SGD<double> plain({.weight_decay = 0.1, .updates = updates});
    Tape<double> tape;
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

TEMPLATE_TEST_CASE("top-k gate: ties go to the lower expert and group", "[routing][gate]", float,
                   double) {
  for (const Score score : scores) {
    TopKGate<TestType> gate({.width = 2,
                             .experts = 6,
                             .top_k = 2,
                             .score = score,
                             .groups = 3,
                             .top_k_groups = 2,
                             .init_stddev = 0},
                            0);
    CHECK(gate.evaluate(random_matrix<TestType>(2, 2, 1)).expert == Indices{0, 1, 0, 1});
  }
}

TEST_CASE("top-k gate: W_g starts with small deviates of the seed", "[routing][gate]") {
  TopKGate<float> gate({.width = 100, .experts = 50, .top_k = 2}, 1);
  TopKGate<float> other({.width = 100, .experts = 50, .top_k = 2}, 2);
  const Matrix<float>& w = parameter(gate, "weight").value;
  CHECK(std::abs(w.mean()) < 0.002f);
  CHECK(std::abs(std::sqrt(w.squaredNorm() / 5000) - 0.02f) < 0.001f);
  CHECK_FALSE(same_bits(w, parameter(other, "weight").value));
  Tape<float> tape;
  gate.forward(random_matrix<float>(4000, 100, 1), tape, {.step = 0});
  CHECK(tape.balance.unused_experts() == 0);
  CHECK(tape.balance.cv_load() < 0.4f);
}

TEMPLATE_TEST_CASE("top-k gate: a token with NaN or infinity spoils no other", "[routing][gate]",
                   float, double) {
  using S = TestType;
  constexpr S infinity = std::numeric_limits<S>::infinity();
  for (const Score score : scores) {
    for (const bool limited : {false, true}) {
      for (const S bad : {std::numeric_limits<S>::quiet_NaN(), infinity, -infinity}) {
        Config config = everything(score);
        config.random_second = limited;
        config.capacity_factor = limited ? 1 : 0;
        TopKGate<S> gate(config, 1);
        Matrix<S> x = random_matrix<S>(6, 5, 2);
        Tape<S> clean;
        Tape<S> spoilt;
        gate.forward(x, clean, {.step = 0});
        x(2, 1) = bad;
        gate.forward(x, spoilt, {.step = 0});
        for (Index t = 0; t < 6; ++t) {
          for (std::size_t c = detail::to_size(2 * t); c < detail::to_size(2 * t + 2); ++c) {
            CHECK((spoilt.choices.expert[c] >= 0 && spoilt.choices.expert[c] < 12));
            if (t != 2) {
              CHECK(spoilt.choices.expert[c] == clean.choices.expert[c]);
              CHECK(spoilt.choices.weight[c] == clean.choices.weight[c]);
            } else if (std::isnan(bad) || score != Score::sigmoid) {
              CHECK(std::isnan(spoilt.choices.weight[c]));
            }
          }
        }
        if (std::isnan(bad)) CHECK(std::isnan(spoilt.balance.loss));
        CHECK_NOTHROW(detail::check_routing(spoilt.routing));
        const std::vector<S> ones(spoilt.routing.weight.size(), S{1});
        const Matrix<S> dx = test::gate_dx<TopKGate<S>>(gate, x, ones, spoilt);
        if (std::isnan(bad)) CHECK(std::isnan(dx(2, 0)));
        CHECK(std::isfinite(dx(1, 0)));
      }
    }
  }
}

TEMPLATE_TEST_CASE("top-k gate: extreme logits give finite weights and gradients",
                   "[routing][gate]", float, double) {
  using S = TestType;
  for (const Score score : scores) {
    for (const S size : {S(1e-30), S{1}, S{1e4}}) {
      TopKGate<S> gate({.width = 1,
                        .experts = 4,
                        .top_k = 2,
                        .score = score,
                        .renormalise = true,
                        .selection_bias = true,
                        .switch_loss_weight = 1,
                        .z_loss_weight = S{1} / (1 + size)},
                       1);
      parameter(gate, "weight").value << -1, -2, -3, -4;
      parameter(gate, "selection_bias").value << 0, 0, 3 * size, 2 * size;
      Tape<S> tape;
      gate.forward(Matrix<S>{{size}, {-size}}, tape, {.step = 0});
      for (const S w : tape.routing.weight) CHECK(std::isfinite(w));
      CHECK(std::isfinite(tape.balance.loss));
      const std::vector<S> dweight{1, 2, 3, 4};
      const Matrix<S> dx = test::gate_dx(gate, Matrix<S>{{size}, {-size}}, dweight, tape);
      // Where all sigmoids of a token are 0, dividing by 1e-20 can make a gradient of no use.
      if (score != Score::sigmoid || size < 100) {
        CHECK(std::isfinite(dx(0, 0)));
        CHECK(std::isfinite(dx(1, 0)));
      }
    }
  }
}

TEMPLATE_TEST_CASE("top-k gate: extreme shapes", "[routing][gate]", float, double) {
  using S = TestType;
  for (const Score score : scores) {
    const auto run = [&](Index tokens, Index experts, Index top_k, Index groups) {
      INFO("T " << tokens << ", E " << experts << ", K " << top_k);
      Config config = everything(score);
      config.experts = experts;
      config.top_k = top_k;
      config.random_second = top_k == 2;
      config.groups = groups;
      config.top_k_groups = (groups + 1) / 2;
      config.sequences = 1;
      TopKGate<S> gate(config, 1);
      Tape<S> tape;
      gate.forward(random_matrix<S>(tokens, 5, 1), tape, {.step = 0});
      detail::check_routing(tape.routing);
      CHECK(tape.routing.tokens() == tokens);
      CHECK(tape.routing.slots() <= tokens * top_k);
      CHECK(std::isfinite(tape.balance.loss));
      const std::vector<S> ones(tape.routing.weight.size(), S{1});
      CHECK(test::gate_dx(gate, random_matrix<S>(tokens, 5, 1), ones, tape).allFinite());
      CHECK(parameter(gate, "weight").gradient().allFinite());
      gate.evaluate(random_matrix<S>(tokens, 5, 1), tape);
      CHECK(tape.routing.slots() == tokens * top_k);
    };
    run(0, 12, 2, 4);
    run(1, 1, 1, 1);
    run(1, 12, 2, 12);
    run(7, 5, 5, 1);
    run(3, 40, 2, 4);
    run(1, 131072, 8, 16);
  }
  // Fewer tokens than experts leave one place each, none of which is taken twice.
  TopKGate<S> gate({.width = 5, .experts = 40, .top_k = 2, .capacity_factor = 1}, 1);
  Tape<S> tape;
  gate.forward(Matrix<S>::Ones(3, 5), tape, {.step = 0});
  CHECK(tape.routing.token_offsets == Indices{0, 2, 2, 2});
}

TEST_CASE("top-k gate: slots are grouped, ascending and weighed as chosen", "[routing][gate]") {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    const auto words = philox({1, 2, 3, 4}, seed);
    const Index groups = 1 + words[0] % 4;
    Config config = everything(scores[seed % 3]);
    config.groups = groups;
    config.top_k_groups = 1 + words[1] % static_cast<std::uint32_t>(groups);
    config.experts = groups * (2 + words[2] % 5);
    config.place_order = static_cast<PlaceOrder>(seed % 3);
    config.capacity_factor = seed % 2 == 0 ? 0.9 : 0;
    const Index tokens = 2 * (words[3] % 20);
    TopKGate<double> gate(config, seed);
    Tape<double> tape;
    gate.forward(random_matrix(tokens, 5, seed), tape, {.step = 0});
    const Routing<double>& routing = tape.routing;
    Dispatch<double> dispatch;
    sort_by_expert(routing, dispatch);
    std::vector<int> seen(routing.expert.size(), 0);
    for (Index e = 0; e < config.experts; ++e) {
      CHECK(dispatch.offsets[e] <= dispatch.offsets[e + 1]);
      for (Index row = dispatch.offsets[e]; row < dispatch.offsets[e + 1]; ++row) {
        const auto slot = detail::to_size(dispatch.sorted_slot[row]);
        CHECK(routing.expert[slot] == e);
        ++seen[slot];
      }
    }
    CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
    std::size_t kept = 0;
    for (Index c = 0; c < tape.choices.size(); ++c) {
      const auto i = detail::to_size(c);
      if (tape.choices.keeps[i] == 0) continue;
      ++kept;
      const Index slot = tape.choices.slot[i];
      CHECK(routing.expert[detail::to_size(slot)] == tape.choices.expert[i]);
      CHECK(routing.weight[detail::to_size(slot)] == 2.5 * tape.choices.weight[i]);
      CHECK(routing.token_offsets[detail::to_size(c / 2)] <= slot);
      CHECK(slot < routing.token_offsets[detail::to_size(c / 2) + 1]);
    }
    CHECK(kept == routing.expert.size());
    for (Index t = 0; t < tokens; ++t) {
      const double sum = tape.choices.weight[detail::to_size(2 * t)] +
                         tape.choices.weight[detail::to_size(2 * t + 1)];
      CHECK_THAT(sum, Catch::Matchers::WithinAbs(1, 1e-12));
      std::set<Index> used;
      for (Index k = 0; k < 2; ++k) {
        used.insert(tape.choices.expert[detail::to_size(2 * t + k)] / (config.experts / groups));
      }
      CHECK(static_cast<Index>(used.size()) <= config.top_k_groups);
    }
  }
}

TEMPLATE_TEST_CASE("top-k gate: takes no memory after its first call",
                   "[routing][gate][allocation]", float, double) {
  using S = TestType;
  for (const int threads : {1, 3}) {
    const test::Threads fixed(threads);
    TopKGate<S> gate(everything(), 1);
    Tape<S> training;
    Tape<S> serving;
    const Matrix<S> x = random_matrix<S>(300, 5, 1);
    const Matrix<S> same = random_matrix<S>(1, 5, 1).replicate(300, 1);
    const std::vector<S> dweight(600, S{1});
    Matrix<S> dx(300, 5);
    const auto pass = [&](const Matrix<S>& rows, std::uint64_t step) {
      gate.forward(rows, training, {.step = step});
      dx.setZero();
      gate.backward(rows, std::span<const S>(dweight.data(), training.routing.weight.size()),
                    training, dx);
      gate.update_selection_bias(training);
      gate.evaluate(rows, serving);
    };
    pass(same, 0);
    CHECK(test::allocations_in([&] {
            for (std::uint64_t step = 1; step < 6; ++step) pass(step % 2 == 0 ? same : x, step);
          }) == 0);
  }
}

TEST_CASE("top-k gate: parameters have their names and shapes", "[routing][gate]") {
  const auto names_of = [](const TopKGate<float>& gate) {
    std::vector<std::string> names;
    for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
      names.push_back(name);
      CHECK(p.value.rows() == (name == "weight" ? 3 : 1));
      CHECK(p.value.cols() == 5);
      CHECK(p.trained == (name == "weight"));
    });
    return names;
  };
  CHECK(names_of(TopKGate<float>({.width = 3, .experts = 5, .top_k = 2}, 0)) ==
        std::vector<std::string>{"weight"});
  CHECK(names_of(TopKGate<float>({.width = 3, .experts = 5, .top_k = 2, .selection_bias = true},
                                 0)) == std::vector<std::string>{"weight", "selection_bias"});
}

TEST_CASE("top-k gate: a bad configuration is refused with its field and numbers",
          "[routing][gate]") {
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config config{.width = 4, .experts = 6, .top_k = 2, .groups = 3, .top_k_groups = 2};
    CHECK_NOTHROW(TopKGate<float>(config, 0));
    spoil(config);
    CHECK_THROWS_AS(TopKGate<float>(config, 0), std::invalid_argument);
    CHECK_THROWS_WITH(TopKGate<float>(config, 0), "moe: TopKGate::Config." + message);
  };
  refuse([](Config& c) { c.width = 0; }, "width = 0, must be at least 1");
  refuse([](Config& c) { c.experts = 0; }, "experts = 0, must be at least 1");
  refuse([](Config& c) { c.top_k = 0; }, "top_k = 0, must be from 1 to experts = 6");
  refuse([](Config& c) { c.top_k = 7; }, "top_k = 7, must be from 1 to experts = 6");
  refuse([](Config& c) { c.top_k = 5; }, "top_k = 5, but top_k_groups = 2 hold 4 experts");
  refuse([](Config& c) { c.score = static_cast<Score>(3); },
         "score = 3, must be one of the 3 scores");
  refuse([](Config& c) { c.scale = 0; }, "scale = 0, must be finite and above 0");
  refuse([](Config& c) { c.scale = std::nan(""); }, "scale = nan, must be finite and above 0");
  for (const double scale : {1e300, 1e-300}) {  // infinite or zero in float
    refuse([=](Config& c) { c.scale = scale; },
           scale > 1 ? "scale = 1e+300, must be finite and above 0 as a Scalar"
                     : "scale = 1e-300, must be finite and above 0 as a Scalar");
    CHECK_NOTHROW(
        TopKGate<double>(Config{.width = 4, .experts = 6, .top_k = 2, .scale = scale}, 0));
  }
  refuse([](Config& c) { c.groups = 0; }, "groups = 0, must divide experts = 6");
  refuse([](Config& c) { c.groups = 4; }, "groups = 4, must divide experts = 6");
  refuse([](Config& c) { c.top_k_groups = 0; }, "top_k_groups = 0, must be from 1 to groups = 3");
  refuse([](Config& c) { c.top_k_groups = 4; }, "top_k_groups = 4, must be from 1 to groups = 3");
  refuse([](Config& c) { c.group_score = static_cast<GroupScore>(-1); },
         "group_score = -1, must be one of the 2 scores of groups");
  refuse([](Config& c) { c.jitter = 1; }, "jitter = 1, must be in [0, 1)");
  refuse([](Config& c) { c.jitter = -0.1; }, "jitter = -0.1, must be in [0, 1)");
  refuse([](Config& c) { c.jitter = std::nan(""); }, "jitter = nan, must be in [0, 1)");
  refuse(
      [](Config& c) {
        c.random_second = true;
        c.top_k = 3;
      },
      "random_second with top_k = 3, must be 2");
  refuse([](Config& c) { c.place_order = static_cast<PlaceOrder>(3); },
         "place_order = 3, must be one of the 3 orders");
  refuse([](Config& c) { c.switch_count = static_cast<SwitchCount>(3); },
         "switch_count = 3, must be one of the 3 counts");
  refuse([](Config& c) { c.sequences = 0; }, "sequences = 0, must be at least 1");
  refuse([](Config& c) { c.row_order = static_cast<RowOrder>(2); },
         "row_order = 2, must be one of the 2 orders");
  const std::pair<const char*, double Config::*> weights[] = {
      {"bias_rate", &Config::bias_rate},
      {"capacity_factor", &Config::capacity_factor},
      {"evaluation_capacity_factor", &Config::evaluation_capacity_factor},
      {"switch_loss_weight", &Config::switch_loss_weight},
      {"sequence_loss_weight", &Config::sequence_loss_weight},
      {"z_loss_weight", &Config::z_loss_weight},
      {"init_stddev", &Config::init_stddev}};
  for (const auto& [name, field] : weights) {
    const auto member = field;
    refuse([&](Config& c) { c.*member = -0.5; },
           std::string(name) + " = -0.5, must be finite and at least 0");
    refuse([&](Config& c) { c.*member = std::nan(""); },
           std::string(name) + " = nan, must be finite and at least 0");
    refuse([&](Config& c) { c.*member = std::numeric_limits<double>::infinity(); },
           std::string(name) + " = inf, must be finite and at least 0");
  }
}

TEST_CASE("top-k gate: the tape of a gate of another shape or with other losses is refused",
          "[routing][gate]") {
  TopKGate<double> gate(everything(), 1);
  Tape<double> tape;
  const Matrix<double> x = random_matrix(6, 5, 2);
  gate.forward(x, tape, {.step = 0});
  const std::vector<double> dweight(tape.routing.weight.size(), 0.5);
  const auto refuse = [&](auto&& change) {
    Config config = everything();
    change(config);
    TopKGate<double> other(config, 1);
    CHECK_THROWS_AS(test::gate_dx(other, x, dweight, tape), std::invalid_argument);
    CHECK(test::has_zero_gradients(other));
  };
  refuse([](Config& c) { c.width = 4; });
  refuse([](Config& c) { c.experts = 24; });
  refuse([](Config& c) {
    c.top_k = 1;
    c.random_second = false;
  });
  refuse([](Config& c) { c.sequences = 3; });
  refuse([](Config& c) { c.jitter = 0; });  // the tape's W_g met another x
  Config plain = everything();
  plain.jitter = plain.switch_loss_weight = plain.sequence_loss_weight = 0;
  TopKGate<double> other(plain, 1);
  Tape<double> others;
  other.forward(random_matrix(6, 5, 2), others, {.step = 0});
  CHECK_THROWS_AS(test::gate_dx(gate, x, std::vector<double>(others.routing.weight.size()), others),
                  std::invalid_argument);
}

TEST_CASE("top-k gate: rows that are no whole sequences are refused, and served without their loss",
          "[routing][gate]") {
  const TopKGate<double> gate(everything(), 1);
  Tape<double> tape;
  CHECK_THROWS_WITH(gate.forward(random_matrix(7, 5, 2), tape, {.step = 0}),
                    "moe: TopKGate: x has 7 rows, not a multiple of Config.sequences = 2");
  CHECK_NOTHROW(gate.evaluate(random_matrix(7, 5, 2), tape));
  CHECK(tape.balance.losses.sequence == 0);
  CHECK(tape.balance.losses.switch_loss > 0);
}
