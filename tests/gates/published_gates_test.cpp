#include <map>
#include <utility>

#include "../support.hpp"
#include "moe/gates/top_k_gate.hpp"

/// \file
/// One test for each model in docs/gates.md: its routing, a scalar at a time from its own paper or
/// published code, against TopKGate with the options of the table. It shares nothing with the
/// library but W_g, the selection bias and the random numbers.

using namespace moe;
using test::random_matrix;
using Row = std::vector<double>;
using Slots = std::map<std::pair<Index, Index>, double>;  ///< weight by (token, expert)

namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

Matrix<double>& parameter(TopKGate<double>& gate, const std::string& wanted) {
  Matrix<double>* found = nullptr;
  for_each_parameter(gate, [&](const std::string& name, Parameter<double>& p) {
    if (name == wanted) found = &p.value;
  });
  REQUIRE(found != nullptr);
  return *found;
}

/// A gate with weights large enough for logits of size 1, and what one pass of it was.
struct Case {
  TopKGate<double> gate;
  TopKGate<double>::Tape tape;
  Matrix<double> x;
  Pass key{.step = 0};

  Case(const TopKConfig& config, Index tokens, std::uint64_t seed) : gate(config, seed) {
    fill_normal(parameter(gate, "weight"), 0.6, seed);
    x = random_matrix(tokens, config.width, seed + 100);
    key.step = seed;
  }

  /// The logits of each token, of x or of what is given.
  std::vector<Row> logits(const Matrix<double>& input) {
    const Matrix<double>& w = parameter(gate, "weight");
    std::vector<Row> c;
    for (Index t = 0; t < input.rows(); ++t) {
      Row row(at(w.cols()), 0.0);
      for (Index i = 0; i < w.cols(); ++i) {
        for (Index d = 0; d < w.rows(); ++d) row[at(i)] += input(t, d) * w(d, i);
      }
      c.push_back(row);
    }
    return c;
  }

  void check(const Routing<double>& routing, const Slots& expected, double loss) const {
    REQUIRE(routing.slots() == static_cast<Index>(expected.size()));
    for (Index t = 0; t < routing.tokens(); ++t) {
      for (Index s = routing.token_offsets[at(t)]; s < routing.token_offsets[at(t) + 1]; ++s) {
        const auto found = expected.find({t, routing.expert[at(s)]});
        REQUIRE(found != expected.end());
        CHECK_THAT(routing.weight[at(s)], Catch::Matchers::WithinRel(found->second, 1e-12));
      }
    }
    CHECK_THAT(tape.balance.loss, Catch::Matchers::WithinRel(loss, 1e-12));
  }
};

Row softmax(const Row& c) {
  double sum = 0;
  for (const double v : c) sum += std::exp(v);
  Row p;
  for (const double v : c) p.push_back(std::exp(v) / sum);
  return p;
}

/// The k largest, the largest first, by looking through the row k times.
std::vector<Index> top(const Row& row, Index k) {
  std::vector<Index> found;
  while (static_cast<Index>(found.size()) < k) {
    Index best = -1;
    for (Index i = 0; i < static_cast<Index>(row.size()); ++i) {
      if (std::find(found.begin(), found.end(), i) != found.end()) continue;
      if (best < 0 || row[at(i)] > row[at(best)]) best = i;
    }
    found.push_back(best);
  }
  return found;
}

/// Σ_i (how often i is among the choices) · (mean of p_i), without any factor.
double count_times_mean(const std::vector<std::vector<Index>>& choices, const std::vector<Row>& p) {
  double sum = 0;
  for (std::size_t i = 0; i < p[0].size(); ++i) {
    double count = 0;
    double mean = 0;
    for (std::size_t t = 0; t < p.size(); ++t) {
      for (const Index e : choices[t]) count += at(e) == i ? 1 : 0;
      mean += p[t][i] / static_cast<double>(p.size());
    }
    sum += count * mean;
  }
  return sum;
}

}  // namespace

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

namespace {

/// What OLMoE and the Qwen models share: softmax, the K largest, renormalised or not.
void check_plain(const TopKConfig& config, double loss_per_choice, double z_loss_weight) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    const Index tokens = 12;
    Case c(config, tokens, seed);
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    Slots slots;
    std::vector<Row> p;
    std::vector<std::vector<Index>> choices;
    double z = 0;
    for (const Row& row : c.logits(c.x)) {
      p.push_back(softmax(row));
      choices.push_back(top(p.back(), config.top_k));
      double sum = 0;
      for (const Index e : choices.back()) sum += p.back()[at(e)];
      for (const Index e : choices.back()) {
        slots[{static_cast<Index>(p.size()) - 1, e}] =
            config.renormalise ? p.back()[at(e)] / sum : p.back()[at(e)];
      }
      double exponentials = 0;
      for (const double v : row) exponentials += std::exp(v);
      z += std::log(exponentials) * std::log(exponentials) / static_cast<double>(tokens);
    }
    c.check(routing, slots, loss_per_choice * count_times_mean(choices, p) + z_loss_weight * z);
  }
}

}  // namespace

TEST_CASE("published gates: OLMoE", "[routing][gate]") {
  check_plain({.width = 5,
               .experts = 64,
               .top_k = 8,
               .switch_loss_weight = 0.01,
               .switch_count = SwitchCount::per_slot,
               .z_loss_weight = 0.001},
              0.01 * 64 / (12 * 8), 0.001);  // N_E·Σ f·P, f the share of the 12·8 choices
}

TEST_CASE("published gates: Qwen1.5-MoE and Qwen2-MoE", "[routing][gate]") {
  check_plain({.width = 5,
               .experts = 60,
               .top_k = 4,
               .switch_loss_weight = 0.001,
               .switch_count = SwitchCount::per_token},
              0.001 * 60 / 12, 0);
}

TEST_CASE("published gates: Qwen3-MoE", "[routing][gate]") {
  check_plain({.width = 5,
               .experts = 128,
               .top_k = 8,
               .renormalise = true,
               .switch_loss_weight = 0.001,
               .switch_count = SwitchCount::per_token},
              0.001 * 128 / 12, 0);
}

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
}
