#include <limits>

#include "published_gates.hpp"

using namespace moe;
using namespace moe::test::published;

namespace {

/// The softmax of the chosen logits, with or without a bias of all logits.
void check_softmax_of_chosen(const TopKConfig& config) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    Case c(config, 12, seed);
    if (config.bias) fill_normal(parameter(c.gate, "bias"), 0.6, seed + 1);
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    Slots slots;
    Index t = 0;
    Index moved = 0;
    for (Row row : c.logits(c.x)) {
      const auto without = top(row, config.top_k);
      for (Index i = 0; i < config.experts && config.bias; ++i) {
        row[at(i)] += parameter(c.gate, "bias")(0, i);
      }
      const auto chosen = top(row, config.top_k);
      moved += chosen != without;
      Row logits;
      for (const Index e : chosen) logits.push_back(row[at(e)]);
      const Row weights = softmax(logits);
      for (std::size_t k = 0; k < chosen.size(); ++k) slots[{t, chosen[k]}] = weights[k];
      ++t;
    }
    c.check(routing, slots, 0);
    CHECK((moved > 0) == config.bias);
  }
}

/// Each expert's sigmoid, or the softmax of all: the groups by their two best and the experts in
/// them by s + b, b being the correction bias; weights s / (Σ s + ε) times a factor.
void check_grouped(const TopKConfig& config) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    Case c(config, 12, seed);
    Row bias(at(config.experts), 0.0);
    if (config.selection_bias) {
      fill_normal(parameter(c.gate, "selection_bias"), 0.05, seed);
      for (Index i = 0; i < config.experts; ++i) {
        bias[at(i)] = parameter(c.gate, "selection_bias")(0, i);
      }
    }
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    Slots slots;
    Index t = 0;
    for (const Row& row : c.logits(c.x)) {
      Row s = softmax(row);
      for (std::size_t i = 0; i < s.size() && config.score == Score::sigmoid; ++i) {
        s[i] = 1 / (1 + std::exp(-row[i]));
      }
      Row choice = s;
      for (std::size_t i = 0; i < s.size(); ++i) choice[i] += bias[i];
      const Index size = config.experts / config.groups;
      Row group;
      for (Index g = 0; g < config.groups; ++g) {
        const Row members(choice.begin() + size * g, choice.begin() + size * (g + 1));
        const auto two = top(members, 2);
        group.push_back(members[at(two[0])] + members[at(two[1])]);
      }
      Row masked(choice.size(), -std::numeric_limits<double>::infinity());
      for (const Index g : top(group, config.top_k_groups)) {
        std::copy_n(choice.begin() + size * g, size, masked.begin() + size * g);
      }
      const auto chosen = top(masked, config.top_k);
      double sum = config.renormalise_epsilon;
      for (const Index e : chosen) sum += s[at(e)];
      for (const Index e : chosen) slots[{t, e}] = s[at(e)] / sum * config.scale;
      ++t;
    }
    c.check(routing, slots, 0);
  }
}

/// What the models with a correction bias share.
TopKConfig corrected(Index experts, Index top_k, double scale) {
  return {.width = 5,
          .experts = experts,
          .top_k = top_k,
          .score = Score::sigmoid,
          .renormalise = true,
          .renormalise_epsilon = 1e-20,
          .scale = scale,
          .selection_bias = true};
}

}  // namespace

TEST_CASE("published gates: gpt-oss", "[routing][gate]") {
  check_softmax_of_chosen(
      {.width = 5, .experts = 128, .top_k = 4, .bias = true, .score = Score::softmax_of_chosen});
}

TEST_CASE("published gates: Granite, Aria, JetMoE and Cohere2-MoE", "[routing][gate]") {
  for (const auto& [experts, top_k] : {std::pair<Index, Index>{40, 8}, {64, 6}, {8, 2}}) {
    check_softmax_of_chosen(
        {.width = 5, .experts = experts, .top_k = top_k, .score = Score::softmax_of_chosen});
  }
}

TEST_CASE("published gates: Qwen3-Next", "[routing][gate]") {
  check_softmax({.width = 5,
                 .experts = 512,
                 .top_k = 10,
                 .renormalise = true,
                 .switch_loss_weight = 0.001,
                 .switch_count = SwitchCount::per_token},
                0.001 * 512 / 12, 0);
}

TEST_CASE("published gates: MiniMax-01, Hunyuan-V1 and DBRX", "[routing][gate]") {
  for (const auto& [experts, top_k] : {std::pair<Index, Index>{32, 2}, {64, 8}, {16, 4}}) {
    check_softmax({.width = 5, .experts = experts, .top_k = top_k, .renormalise = true}, 0, 0);
  }
}

TEST_CASE("published gates: Jamba", "[routing][gate]") {
  check_softmax({.width = 5,
                 .experts = 16,
                 .top_k = 2,
                 .switch_loss_weight = 0.001,
                 .switch_count = SwitchCount::per_token},
                0.001 * 16 / 12, 0);
}

TEST_CASE("published gates: GLM-4-MoE", "[routing][gate]") { check_grouped(corrected(128, 8, 1)); }

TEST_CASE("published gates: dots1", "[routing][gate]") { check_grouped(corrected(128, 6, 2.5)); }

TEST_CASE("published gates: EXAONE-MoE", "[routing][gate]") {
  check_grouped(corrected(64, 8, 2.5));
}

TEST_CASE("published gates: Kimi-Linear", "[routing][gate]") {
  check_grouped(corrected(256, 8, 2.446));
}

TEST_CASE("published gates: Nemotron-H", "[routing][gate]") {
  check_grouped(corrected(128, 6, 2.5));
}

TEST_CASE("published gates: DeepSeek-V3.2", "[routing][gate]") {
  TopKConfig config = corrected(256, 8, 2.5);
  config.groups = 8;
  config.top_k_groups = 4;
  config.group_score = GroupScore::two_best;
  check_grouped(config);
}

TEST_CASE("published gates: MiniMax-M3", "[routing][gate]") {
  TopKConfig config = corrected(128, 4, 2);
  config.renormalise_epsilon = 0;
  check_grouped(config);
}

TEST_CASE("published gates: LFM2", "[routing][gate]") {
  TopKConfig config = corrected(32, 4, 1);
  config.renormalise_epsilon = 1e-6;
  check_grouped(config);
}

TEST_CASE("published gates: DBRX with a norm of 2", "[routing][gate]") {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    Case c({.width = 5, .experts = 16, .top_k = 4, .renormalise = true, .renormalise_norm = 2}, 12,
           seed);
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    Slots slots;
    Index t = 0;
    for (const Row& row : c.logits(c.x)) {
      const Row p = softmax(row);
      double squares = 0;
      for (const Index e : top(p, 4)) squares += p[at(e)] * p[at(e)];
      for (const Index e : top(p, 4)) slots[{t, e}] = p[at(e)] / std::sqrt(squares);
      ++t;
    }
    c.check(routing, slots, 0);
  }
}

namespace {

/// The two largest probabilities of each token, or the largest and one that is drawn. First choices take
/// places before all second ones, in the order of their rows or of their largest probability; what is left
/// of a token's two is divided by its sum, or not. Counts what has no place, and second choices that are not
/// the second largest or are dropped by chance.
struct Two {
  Index dropped = 0;
  Index by_chance = 0;
};
Two check_two(const TopKConfig& config, Index places, bool prioritised, bool normalises) {
  Two counted;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    Case c(config, 16, seed);
    if (config.bias) fill_normal(parameter(c.gate, "bias"), 0.6, seed + 1);
    const auto& routing = c.gate.forward(c.x, c.tape, c.key);
    const auto bits_of = [&](std::uint64_t stream, Index t, Index i) {
      const auto words = philox({static_cast<std::uint32_t>(i / 4), static_cast<std::uint32_t>(t),
                                 static_cast<std::uint32_t>(seed), 0},
                                derive_seed(seed, stream));
      return words[at(i % 4)];
    };
    std::vector<Row> p;
    std::vector<std::vector<Index>> two;
    for (Row row : c.logits(c.x)) {
      const Index t = static_cast<Index>(p.size());
      for (Index i = 0; i < config.experts && config.bias; ++i) {
        row[at(i)] += parameter(c.gate, "bias")(0, i);
      }
      p.push_back(softmax(row));
      two.push_back(top(p.back(), 2));
      if (config.drawn_second) {
        Row noisy = row;
        for (Index i = 0; i < config.experts; ++i) {
          const double u = ((bits_of(3, t, i) >> 9) + 0.5) / 8388608;
          noisy[at(i)] -= std::log(-std::log(u));
        }
        noisy[at(two.back()[0])] = -std::numeric_limits<double>::infinity();
        const Index drawn = top(noisy, 1)[0];
        counted.by_chance += drawn != two.back()[1];
        two.back()[1] = drawn;
      }
      const double second = p.back()[at(two.back()[1])];
      if (config.random_second && !(2 * second > static_cast<double>(uniform(bits_of(2, t, 0))))) {
        ++counted.by_chance;
        two.back().pop_back();
      }
    }
    std::vector<Index> order;
    for (Index t = 0; t < 16; ++t) order.push_back(t);
    if (prioritised) {
      std::sort(order.begin(), order.end(), [&](Index a, Index b) {
        return p[at(a)][at(two[at(a)][0])] > p[at(b)][at(two[at(b)][0])];
      });
    }
    std::vector<Index> filled(at(config.experts), 0);
    Slots slots;
    for (std::size_t k = 0; k < 2; ++k) {
      for (const Index t : order) {
        if (k >= two[at(t)].size()) continue;
        const Index e = two[at(t)][k];
        if (filled[at(e)]++ < places) {
          slots[{t, e}] = p[at(t)][at(e)];
        } else {
          ++counted.dropped;
        }
      }
    }
    const Slots raw = slots;
    for (auto& [slot, weight] : slots) {
      double sum = 0;
      for (const auto& [other, w] : raw) sum += other.first == slot.first ? w : 0;
      if (normalises) weight /= sum;
    }
    c.check(routing, slots, 0);
  }
  return counted;
}

}  // namespace

TEST_CASE("published gates: NLLB-MoE with each policy for second experts", "[routing][gate]") {
  // With batch_prioritized_routing and router_bias, and without both.
  for (const bool prioritised : {false, true}) {
    for (const std::string policy : {"all", "random", "sampling"}) {
      INFO(policy << (prioritised ? ", prioritised" : ""));
      const Two counted = check_two(
          {.width = 5,
           .experts = 4,
           .top_k = 2,
           .bias = prioritised,
           .renormalise = true,
           .renormalise_after_drops = true,
           .random_second = policy == "random",
           .drawn_second = policy == "sampling",
           .capacity_factor = 1,
           .place_order = prioritised ? PlaceOrder::best_tokens : PlaceOrder::first_choices},
          8, prioritised, true);  // 2·⌈16 / 4⌉
      CHECK(counted.dropped > (policy == "random" ? 2 : 10));
      CHECK((policy == "all" ? counted.by_chance == 0 : counted.by_chance > 20));
    }
  }
}

TEST_CASE("published gates: V-MoE", "[routing][gate]") {
  const Two counted = check_two({.width = 5,
                                 .experts = 4,
                                 .top_k = 2,
                                 .capacity_factor = 0.5,
                                 .place_order = PlaceOrder::best_tokens},
                                4, true, false);  // 0.5·2·16 / 4
  CHECK(counted.dropped > 40);
}

TEST_CASE("published gates: Mistral 4", "[routing][gate]") {
  for (const Index groups : {1, 4}) {
    check_grouped({.width = 5,
                   .experts = 128,
                   .top_k = 4,
                   .renormalise = true,
                   .renormalise_epsilon = 1e-20,
                   .groups = groups,
                   .top_k_groups = (groups + 1) / 2,
                   .group_score = GroupScore::two_best});
  }
}
