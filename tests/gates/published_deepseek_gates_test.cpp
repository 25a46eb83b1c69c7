#include "published_gates.hpp"

using namespace moe;
using namespace moe::test::published;

TEST_CASE("published gates: DeepSeek-V2", "[routing][gate]") {
  Index limited = 0;
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    Case c({.width = 5,
            .experts = 160,
            .top_k = 6,
            .scale = 16,
            .groups = 8,
            .top_k_groups = 3,
            .sequence_loss_weight = 0.001,
            .sequences = 3,
            .row_order = RowOrder::sequence_major},
           12, seed);
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    Slots slots;
    std::vector<Row> p;
    std::vector<std::vector<Index>> choices;
    for (const Row& row : c.logits(c.x)) {
      p.push_back(softmax(row));
      Row best(8, 0);
      for (std::size_t i = 0; i < 160; ++i) best[i / 20] = std::max(best[i / 20], p.back()[i]);
      const auto groups = top(best, 3);
      Row masked(160, 0);
      for (const Index g : groups) {
        for (std::size_t i = 20 * at(g); i < 20 * at(g) + 20; ++i) masked[i] = p.back()[i];
      }
      choices.push_back(top(masked, 6));
      limited += choices.back() != top(p.back(), 6);
      for (const Index e : choices.back()) {
        slots[{static_cast<Index>(p.size()) - 1, e}] = 16 * p.back()[at(e)];
      }
    }
    // α·Σ f_i·P_i with f_i = N/(K·T)·count, by sequence of 4 tokens, then the mean over sequences.
    double loss = 0;
    for (std::ptrdiff_t s = 0; s < 3; ++s) {
      const std::vector<std::vector<Index>> chosen(choices.begin() + 4 * s,
                                                   choices.begin() + 4 * s + 4);
      const std::vector<Row> probabilities(p.begin() + 4 * s, p.begin() + 4 * s + 4);
      loss += 0.001 * 160 / (6 * 4) * count_times_mean(chosen, probabilities) / 3;
    }
    c.check(routing, slots, loss);
  }
  CHECK(limited > 10);
}

TEST_CASE("published gates: DeepSeek-V3", "[routing][gate]") {
  Index limited = 0;
  Index biased = 0;
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    Case c({.width = 5,
            .experts = 256,
            .top_k = 8,
            .score = Score::sigmoid,
            .renormalise = true,
            .scale = 2.5,
            .groups = 8,
            .top_k_groups = 4,
            .group_score = GroupScore::two_best,
            .selection_bias = true,
            .bias_rate = 0.001,
            .sequence_loss_weight = 0.0001,
            .sequences = 3},
           12, seed);
    fill_normal(parameter(c.gate, "selection_bias"), 0.05, seed);
    Matrix<double>& bias = parameter(c.gate, "selection_bias");
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    Slots slots;
    std::vector<Row> normalised;
    std::vector<std::vector<Index>> choices;
    Row load(256, 0);
    for (const Row& row : c.logits(c.x)) {
      Row s;
      Row for_choice;
      double all = 0;
      for (std::size_t i = 0; i < 256; ++i) {
        s.push_back(1 / (1 + std::exp(-row[i])));
        for_choice.push_back(s[i] + bias(0, static_cast<Index>(i)));
        all += s[i];
      }
      Row group(8, 0);
      for (Index g = 0; g < 8; ++g) {
        const Row members(for_choice.begin() + 32 * g, for_choice.begin() + 32 * g + 32);
        const auto two = top(members, 2);
        group[at(g)] = members[at(two[0])] + members[at(two[1])];
      }
      Row masked(256, -1e300);
      for (const Index g : top(group, 4)) {
        for (std::size_t i = 32 * at(g); i < 32 * at(g) + 32; ++i) masked[i] = for_choice[i];
      }
      choices.push_back(top(masked, 8));
      limited += choices.back() != top(for_choice, 8);
      biased += choices.back() != top(s, 8);
      double chosen = 1e-20;
      for (const Index e : choices.back()) chosen += s[at(e)];
      for (const Index e : choices.back()) {
        slots[{static_cast<Index>(choices.size()) - 1, e}] = s[at(e)] / chosen * 2.5;
        load[at(e)] += 1;
      }
      for (double& v : s) v /= all;
      normalised.push_back(s);
    }
    // Time-major: sequence s is rows s, s + 3, s + 6, s + 9.
    double loss = 0;
    for (std::size_t s = 0; s < 3; ++s) {
      std::vector<std::vector<Index>> chosen;
      std::vector<Row> p;
      for (std::size_t t = s; t < 12; t += 3) {
        chosen.push_back(choices[t]);
        p.push_back(normalised[t]);
      }
      loss += 0.0001 * 256 / (8 * 4) * count_times_mean(chosen, p) / 3;
    }
    c.check(routing, slots, loss);

    const Matrix<double> before = bias;
    c.gate.update_selection_bias(c.tape);
    for (Index i = 0; i < 256; ++i) {
      const double error = 12.0 * 8 / 256 - load[at(i)];
      const double expected = before(0, i) + (error > 0 ? 0.001 : error < 0 ? -0.001 : 0);
      CHECK(std::abs(bias(0, i) - expected) < 1e-15);
    }
  }
  CHECK(limited > 10);
  CHECK(biased > 10);
}

TEST_CASE("published gates: DeepSeek-V4", "[routing][gate]") {
  Index biased = 0;
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    Case c({.width = 5,
            .experts = 256,
            .top_k = 6,
            .score = Score::sqrt_softplus,
            .renormalise = true,
            .renormalise_epsilon = 1e-20,
            .scale = 1.5,
            .selection_bias = true},
           12, seed);
    fill_normal(parameter(c.gate, "selection_bias"), 0.05, seed);
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    Slots slots;
    Index t = 0;
    for (const Row& row : c.logits(c.x)) {
      Row s;
      Row for_choice;
      for (std::size_t i = 0; i < 256; ++i) {
        s.push_back(std::sqrt(std::log1p(std::exp(row[i]))));
        for_choice.push_back(s[i] + parameter(c.gate, "selection_bias")(0, static_cast<Index>(i)));
      }
      const auto chosen = top(for_choice, 6);
      biased += chosen != top(s, 6);
      double sum = 1e-20;
      for (const Index e : chosen) sum += s[at(e)];
      for (const Index e : chosen) slots[{t, e}] = s[at(e)] / sum * 1.5;
      ++t;
    }
    c.check(routing, slots, 0);
  }
  CHECK(biased > 10);
}
