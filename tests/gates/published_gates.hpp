#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../support.hpp"
#include "moe/gates/top_k_gate.hpp"

/// \file
/// One test for each model in docs/gates.md: its routing, a scalar at a time from its own paper or
/// published code, against TopKGate with the options of the table. It shares nothing with the
/// library but W_g, the selection bias and the random numbers.

namespace moe::test::published {

using Row = std::vector<double>;
using Slots = std::map<std::pair<Index, Index>, double>;  ///< weight by (token, expert)

inline std::size_t at(Index i) { return static_cast<std::size_t>(i); }

inline Matrix<double>& parameter(TopKGate<double>& gate, std::string_view wanted) {
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

inline Row softmax(const Row& c) {
  double sum = 0;
  for (const double v : c) sum += std::exp(v);
  Row p;
  for (const double v : c) p.push_back(std::exp(v) / sum);
  return p;
}

/// The k largest, the largest first, by looking through the row k times.
inline std::vector<Index> top(const Row& row, Index k) {
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
inline double count_times_mean(const std::vector<std::vector<Index>>& choices,
                               const std::vector<Row>& p) {
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

/// What OLMoE, the Qwen models and others share: softmax, the K largest, renormalised or not.
inline void check_softmax(const TopKConfig& config, double loss_per_choice, double z_loss_weight) {
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

}  // namespace moe::test::published
