#include "published_gates.hpp"

using namespace moe;
using namespace moe::test::published;

TEST_CASE("published gates: Switch Transformer", "[routing][gate]") {
  Index dropped = 0;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    Case c({.width = 5,
            .experts = 4,
            .top_k = 1,
            .jitter = 0.01,
            .capacity_factor = 1.25,
            .evaluation_capacity_factor = 2,
            .switch_loss_weight = 0.01},
           16, seed);
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    const Index places = 5;  // 16 tokens / 4 experts · 1.25
    Matrix<double> jittered = c.x;
    for (Index i = 0; i < jittered.size(); ++i) {
      const double factor = c.tape.jitter.data()[i];
      CHECK((factor >= 0.99 && factor < 1.01));
      jittered.data()[i] *= factor;
    }
    Slots slots;
    std::vector<Index> filled(4, 0);
    std::vector<std::vector<Index>> choices;
    std::vector<Row> p;
    for (const Row& row : c.logits(jittered)) {
      p.push_back(softmax(row));
      const Index e = top(p.back(), 1)[0];
      choices.push_back({e});
      const auto t = static_cast<Index>(p.size()) - 1;
      if (filled[at(e)]++ < places) slots[{t, e}] = p.back()[at(e)];
    }
    // loss = α·N·Σ f_i·P_i, f_i the share of tokens whose largest probability is i, dropped or not.
    c.check(routing, slots, 0.01 * 4 * count_times_mean(choices, p) / 16);
    dropped += 16 - routing.slots();

    // Served: no jitter, 8 places.
    c.gate.evaluate(c.x, c.tape);
    filled.assign(4, 0);
    slots.clear();
    p.clear();
    choices.clear();
    for (const Row& row : c.logits(c.x)) {
      p.push_back(softmax(row));
      const Index e = top(p.back(), 1)[0];
      choices.push_back({e});
      if (filled[at(e)]++ < 8) slots[{static_cast<Index>(p.size()) - 1, e}] = p.back()[at(e)];
    }
    c.check(c.tape.routing, slots, 0.01 * 4 * count_times_mean(choices, p) / 16);
  }
  CHECK(dropped > 3);
}

TEST_CASE("published gates: GShard", "[routing][gate]") {
  Index over_capacity = 0;
  Index unlucky = 0;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    Case c({.width = 5,
            .experts = 4,
            .top_k = 2,
            .renormalise = true,
            .random_second = true,
            .capacity_factor = 1,
            .evaluation_capacity_factor = 1,
            .place_order = PlaceOrder::first_choices,
            .switch_loss_weight = 0.01,
            .switch_count = SwitchCount::first_choice},
           16, seed);
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    const Index places = 8;  // 2·16/4
    std::vector<Row> p;
    std::vector<std::vector<Index>> first;
    for (const Row& row : c.logits(c.x)) p.push_back(softmax(row));
    Slots slots;
    std::vector<Index> filled(4, 0);
    for (Index t = 0; t < 16; ++t) {
      const auto best = top(p[at(t)], 2);
      const double g1 = p[at(t)][at(best[0])];
      const double g2 = p[at(t)][at(best[1])];
      first.push_back({best[0]});
      if (filled[at(best[0])]++ < places) {
        slots[{t, best[0]}] = g1 / (g1 + g2);
      } else {
        ++over_capacity;
      }
    }
    for (Index& f : filled) f = std::min(f, places);
    const std::uint64_t dispatch = derive_seed(seed, 2);
    for (Index t = 0; t < 16; ++t) {
      const auto best = top(p[at(t)], 2);
      const double g1 = p[at(t)][at(best[0])];
      const double g2 = p[at(t)][at(best[1])] / (g1 + p[at(t)][at(best[1])]);
      const auto words =
          philox({0, static_cast<std::uint32_t>(t), static_cast<std::uint32_t>(seed), 0}, dispatch);
      if (!(2 * g2 > static_cast<double>(uniform(words[0])))) {
        ++unlucky;
        continue;
      }
      if (filled[at(best[1])] < places) {
        slots[{t, best[1]}] = g2;
        ++filled[at(best[1])];
      } else {
        ++over_capacity;
      }
    }
    // E²·mean_i(share of first choices · mean probability).
    double mean = 0;
    for (Index i = 0; i < 4; ++i) {
      double share = 0;
      double probability = 0;
      for (std::size_t t = 0; t < 16; ++t) {
        share += first[t][0] == i ? 1.0 / 16 : 0;
        probability += p[t][at(i)] / 16;
      }
      mean += share * probability / 4;
    }
    c.check(routing, slots, 0.01 * 16 * mean);
  }
  CHECK(over_capacity > 3);
  CHECK(unlucky > 3);
}

TEST_CASE("published gates: Mixtral", "[routing][gate]") {
  for (const bool as_in_paper : {false, true}) {
    for (std::uint64_t seed = 1; seed <= 4; ++seed) {
      Case c(as_in_paper ? TopKConfig{.width = 5,
                                      .experts = 8,
                                      .top_k = 2,
                                      .score = Score::softmax_of_chosen,
                                      .switch_loss_weight = 0.02,
                                      .switch_count = SwitchCount::per_token}
                         : TopKConfig{.width = 5,
                                      .experts = 8,
                                      .top_k = 2,
                                      .renormalise = true,
                                      .switch_loss_weight = 0.02,
                                      .switch_count = SwitchCount::per_token},
             12, seed);
      const auto& routing = c.gate.forward(c.x, c.tape, c.key);
      Slots slots;
      std::vector<Row> p;
      std::vector<std::vector<Index>> choices;
      for (const Row& row : c.logits(c.x)) {
        p.push_back(softmax(row));
        choices.push_back(top(row, 2));
        // Softmax over the two largest logits.
        const Row two = softmax({row[at(choices.back()[0])], row[at(choices.back()[1])]});
        const auto t = static_cast<Index>(p.size()) - 1;
        slots[{t, choices.back()[0]}] = two[0];
        slots[{t, choices.back()[1]}] = two[1];
      }
      c.check(routing, slots, 0.02 * 8 * count_times_mean(choices, p) / 12);
    }
  }
}

TEST_CASE("published gates: OLMoE", "[routing][gate]") {
  check_softmax({.width = 5,
                 .experts = 64,
                 .top_k = 8,
                 .switch_loss_weight = 0.01,
                 .switch_count = SwitchCount::per_slot,
                 .z_loss_weight = 0.001},
                0.01 * 64 / (12 * 8), 0.001);  // N_E·Σ f·P, f the share of the 12·8 choices
}

TEST_CASE("published gates: Qwen1.5-MoE and Qwen2-MoE", "[routing][gate]") {
  for (const auto& [experts, top_k] : {std::pair<Index, Index>{60, 4}, {64, 8}}) {
    check_softmax({.width = 5,
                   .experts = experts,
                   .top_k = top_k,
                   .switch_loss_weight = 0.001,
                   .switch_count = SwitchCount::per_token},
                  0.001 * static_cast<double>(experts) / 12, 0);
  }
}

TEST_CASE("published gates: Qwen3-MoE", "[routing][gate]") {
  check_softmax({.width = 5,
                 .experts = 128,
                 .top_k = 8,
                 .renormalise = true,
                 .switch_loss_weight = 0.001,
                 .switch_count = SwitchCount::per_token},
                0.001 * 128 / 12, 0);
}

TEST_CASE("published gates: two tokens of each score worked by hand", "[routing][gate]") {
  // c = (ln 1, ln 2, ln 5) and (ln 4, ln 3, ln 1).
  const auto gate_of = [](const TopKConfig& options) {
    TopKConfig config = options;
    config.width = 2;
    config.experts = 3;
    config.top_k = 2;
    TopKGate<double> gate(config, 0);
    parameter(gate, "weight") << 0, std::log(2.0), std::log(5.0), std::log(4.0), std::log(3.0), 0;
    return gate;
  };
  const Matrix<double> x{{1, 0}, {0, 1}};
  const auto check = [&](const TopKConfig& options, const Row& weights, double loss) {
    const TopKGate<double> gate = gate_of(options);
    TopKGate<double>::Tape tape;
    const auto& routing = gate.forward(x, tape, {.step = 0});
    CHECK(routing.expert == std::vector<Index>{1, 2, 0, 1});
    for (std::size_t s = 0; s < 4; ++s) {
      CHECK_THAT(routing.weight[s], Catch::Matchers::WithinAbs(weights[s], 1e-14));
    }
    CHECK_THAT(tape.balance.loss, Catch::Matchers::WithinAbs(loss, 1e-14));
  };
  // p = (1, 2, 5)/8 and (4, 3, 1)/8; P = (5, 5, 6)/16. Counts (1, 2, 1), first choices (1, 0, 1).
  check({}, {2.0 / 8, 5.0 / 8, 4.0 / 8, 3.0 / 8}, 0);
  check({.renormalise = true, .scale = 7}, {2, 5, 4, 3}, 0);
  check({.renormalise = true, .renormalise_norm = 2},
        {2 / std::sqrt(29.0), 5 / std::sqrt(29.0), 4.0 / 5, 3.0 / 5}, 0);
  check({.renormalise = true, .renormalise_epsilon = 0.125, .renormalise_norm = 2},
        {2 / (std::sqrt(29.0) + 1), 5 / (std::sqrt(29.0) + 1), 4.0 / 6, 3.0 / 6}, 0);
  check({.score = Score::softmax_of_chosen}, {2.0 / 7, 5.0 / 7, 4.0 / 7, 3.0 / 7}, 0);
  // 3·Σ f·P with f = (1, 2, 1)/4: 3·(5 + 10 + 6)/64; with f = (1, 2, 1)/2 twice that; with
  // f = (1, 0, 1)/2: 3·(5 + 6)/32.
  const Row plain = {2.0 / 8, 5.0 / 8, 4.0 / 8, 3.0 / 8};
  check({.switch_loss_weight = 1}, plain, 63.0 / 64);
  check({.switch_loss_weight = 1, .switch_count = SwitchCount::per_token}, plain, 63.0 / 32);
  check({.switch_loss_weight = 1, .switch_count = SwitchCount::first_choice}, plain, 33.0 / 32);
  // Each token a sequence: 3·(2 + 5)/(2·8) and 3·(4 + 3)/(2·8), the mean of which is 21/16.
  check({.sequence_loss_weight = 1, .sequences = 2}, plain, 21.0 / 16);
  // log Σ e^c = ln 8 twice.
  check({.z_loss_weight = 0.5}, plain, 0.5 * std::log(8.0) * std::log(8.0));
  // Sigmoids of ln v are v / (1 + v): (1/2, 2/3, 5/6) and (4/5, 3/4, 1/2). Sums 2 and 41/20, so
  // P = ((1/4 + 16/41)/2, (1/3 + 15/41)/2, (5/12 + 10/41)/2), and 3/4·(P_0 + 2·P_1 + P_2) is
  // 3/4·(1 + P_1) = 3/4·(1 + 43/123).
  check({.score = Score::sigmoid, .switch_loss_weight = 1}, {2.0 / 3, 5.0 / 6, 4.0 / 5, 3.0 / 4},
        0.75 * (1 + 43.0 / 123));
  check({.score = Score::sigmoid, .renormalise = true}, {4.0 / 9, 5.0 / 9, 16.0 / 31, 15.0 / 31},
        0);
  // Roots of softplus(ln v) = ln(1 + v).
  const auto root = [](double v) { return std::sqrt(std::log(1 + v)); };
  check({.score = Score::sqrt_softplus}, {root(2), root(5), root(4), root(3)}, 0);
}
