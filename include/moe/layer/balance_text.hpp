#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <string>
#include <vector>

#include "moe/layer/balance_record.hpp"

namespace moe {

/// The balance of a pass to read: a line with the figures and one with the number of tokens of each of at
/// most `most_experts` experts, those with the most tokens first. There is no end of line after the last.
///
///     loss 0.0212, cv_importance 0.107, cv_load 0.0905, max/mean 1.2, unused 0 of 4
///     tokens of experts, most first: 2: 38, 0: 33, 3: 30, 1: 27
///
/// With most_experts = 0, or before the first pass, the second line is left out. Numbers that are
/// not counts have at most three significant digits and a decimal point in any locale; NaN is
/// "nan". balance_record() makes a row of CSV instead. O(E·log(E)). Throws std::invalid_argument if
/// most_experts is negative.
template <class Scalar>
std::string to_string(const Balance<Scalar>& balance, Index most_experts = 16) {
  detail::require(most_experts >= 0, "to_string(Balance): most_experts = ", most_experts,
                  ", must be at least 0");
  const auto& tokens = balance.tokens_per_expert;
  const auto experts = static_cast<Index>(tokens.size());
  std::string text;
  const auto add = [&](const char* name, Scalar value) {
    text += name;
    detail::append_number(static_cast<double>(value), 3, text);
  };
  add("loss ", balance.loss);
  add(", cv_importance ", balance.cv_importance());
  add(", cv_load ", balance.cv_load());
  add(", max/mean ", balance.max_over_mean_load());
  text += ", unused " + std::to_string(balance.unused_experts()) + " of " + std::to_string(experts);
  const Index shown = std::min(experts, most_experts);
  if (shown == 0) return text;
  text += "\ntokens of experts, most first:";
  std::vector<Index> order(detail::to_size(experts));
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return tokens[a] > tokens[b]; });
  for (Index i = 0; i < shown; ++i) {
    const Index e = order[detail::to_size(i)];
    text += (i == 0 ? " " : ", ") + std::to_string(e) + ": " + std::to_string(tokens[e]);
  }
  if (shown < experts) text += ", ... " + std::to_string(experts - shown) + " more";
  return text;
}

}  // namespace moe
