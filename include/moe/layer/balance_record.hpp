#pragma once

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>

#include "moe/config.hpp"
#include "moe/gates/gate.hpp"
#include "moe/routing/balance_loss.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// The figures of a pass in one line, for a file that a training loop writes.

namespace moe {

/// The balance of one layer after one pass, as a row of CSV (RFC 4180). Where processes share a batch,
/// `loss` to `unused_experts` are of the whole batch, the others of this process's tokens.
struct BalanceRecord {
  std::uint64_t step = 0;  ///< number of the update
  std::string layer;       ///< name of the layer
  Index tokens = 0;        ///< T without padding
  Index slots = 0;         ///< S
  double loss = 0;         ///< Balance::loss
  /// The coefficient of variation, stddev / mean, of the importance: each expert's sum of weights.
  double cv_importance = 0;
  double cv_load = 0;             ///< the same of the load, see Balance::load
  double max_over_mean_load = 0;  ///< the largest load over the mean load
  Index unused_experts = 0;       ///< experts without a token
  /// Σ_i −p_i·ln(p_i) in nats, p being the weights of a token's slots, each at least 0, over their sum: 0
  /// where one expert has all the weight, ln(K) where K experts share it evenly. The mean over the
  /// tokens whose sum is above 0, 0 if there are none; NaN if one of these has a negative weight,
  /// or if any weight is NaN.
  double gate_entropy = 0;
  double unrouted_tokens = 0;  ///< share of the tokens that got no expert, 0 to 1
  double drop_rate = 0;        ///< share of the tokens' choices that found no place, 0 to 1

  /// The names of the columns, without an end of line.
  static std::string csv_header();
  /// The values, without an end of line: floating-point numbers with at most nine significant
  /// digits and a decimal point in any locale, NaN as "nan", the layer's name in quotes where it
  /// has a comma, a quote or an end of line.
  std::string csv_row() const;

  template <class Self, class Visitor>
  static void visit_fields(Self& self, Visitor visit) {
    visit("step", self.step);
    visit("layer", self.layer);
    visit("tokens", self.tokens);
    visit("slots", self.slots);
    visit("loss", self.loss);
    visit("cv_importance", self.cv_importance);
    visit("cv_load", self.cv_load);
    visit("max_over_mean_load", self.max_over_mean_load);
    visit("unused_experts", self.unused_experts);
    visit("gate_entropy", self.gate_entropy);
    visit("unrouted_tokens", self.unrouted_tokens);
    visit("drop_rate", self.drop_rate);
  }
};

namespace detail {

template <std::integral Number>
void append_csv(Number value, std::string& row) {
  row += std::to_string(value);
}
/// With a number of significant digits, at most 17, and a decimal point in any locale.
inline void append_number(double value, int significant, std::string& text) {
  if (std::isnan(value)) {
    text += "nan";
    return;
  }
  char digits[32];
  const auto end = std::to_chars(digits, digits + sizeof(digits), value, std::chars_format::general,
                                 significant);
  text.append(digits, end.ptr);
}
inline void append_csv(double value, std::string& row) { append_number(value, 9, row); }
inline void append_csv(const std::string& value, std::string& row) {
  if (value.find_first_of(",\"\r\n") == value.npos) {
    row += value;
    return;
  }
  row += '"';
  for (const char c : value) row.append(c == '"' ? 2 : 1, c);
  row += '"';
}

/// BalanceRecord::gate_entropy; 0 where no token counts. O(S + T).
template <class Scalar>
double mean_gate_entropy(const Routing<Scalar>& routing) {
  double total = 0;
  Index counted = 0;
  for (Index t = 0; t < routing.tokens(); ++t) {
    const Range of_token = routing.slots_of_token(t);
    const Index end = of_token.first + of_token.count;
    double sum = 0;
    for (Index s = of_token.first; s < end; ++s) sum += static_cast<double>(routing.weight[s]);
    if (sum <= 0) continue;
    ++counted;
    for (Index s = of_token.first; s < end; ++s) {
      const double p = static_cast<double>(routing.weight[s]) / sum;
      if (p != 0) total -= p * std::log(p);
    }
  }
  return counted == 0 ? 0 : total / static_cast<double>(counted);
}

template <class Scalar>
Index count_routed_tokens(const Routing<Scalar>& routing) {
  Index routed = 0;
  for (Index t = 0; t < routing.tokens(); ++t) {
    if (routing.slots_of_token(t).count > 0) ++routed;
  }
  return routed;
}

}  // namespace detail

inline std::string BalanceRecord::csv_header() {
  std::string header;
  const BalanceRecord none;
  visit_fields(none, [&](std::string_view name, const auto&) {
    if (!header.empty()) header += ',';
    header += name;
  });
  return header;
}

inline std::string BalanceRecord::csv_row() const {
  std::string row;
  bool first = true;
  visit_fields(*this, [&](std::string_view, const auto& value) {
    if (!first) row += ',';
    first = false;
    detail::append_csv(value, row);
  });
  return row;
}

/// The figures of the last pass on a gate's tape; a layer's is `tape.gate`. `top_k` is the number of experts
/// that the gate chooses for a token, shared ones included, or 0 for a gate without a fixed number; drop_rate
/// is 1 − S/(T·top_k), or 0 without a top_k. If a gate of your own does not set `tape.tokens`, padding counts
/// as tokens. O(S + T + E). Throws std::invalid_argument if there was no pass on the tape, if top_k is
/// negative, or if there are more slots than top_k allows.
template <class Scalar>
BalanceRecord balance_record(const GateTape<Scalar>& tape, std::string_view layer,
                             std::uint64_t step, Index top_k = 0) {
  const Routing<Scalar>& routing = tape.routing;
  const Balance<Scalar>& balance = tape.balance;
  detail::require(routing.experts > 0, "balance_record: no pass on the tape of layer \"", layer,
                  "\"");
  BalanceRecord record;
  record.step = step;
  record.layer = layer;
  record.tokens = tape.tokens.rows > 0 ? tape.tokens.count : routing.tokens();
  record.slots = routing.slots();
  detail::require(top_k >= 0 && (top_k == 0 || record.slots <= top_k * record.tokens),
                  "balance_record: layer \"", layer, "\" has ", record.slots, " slots of ",
                  record.tokens, " tokens, top_k = ", top_k);
  record.loss = static_cast<double>(balance.loss);
  record.cv_importance = static_cast<double>(balance.cv_importance());
  record.cv_load = static_cast<double>(balance.cv_load());
  record.max_over_mean_load = static_cast<double>(balance.max_over_mean_load());
  record.unused_experts = balance.unused_experts();
  record.gate_entropy = detail::mean_gate_entropy(routing);
  if (record.tokens > 0) {
    const auto tokens = static_cast<double>(record.tokens);
    record.unrouted_tokens = 1 - static_cast<double>(detail::count_routed_tokens(routing)) / tokens;
    if (top_k > 0) {
      record.drop_rate =
          1 - static_cast<double>(record.slots) / (tokens * static_cast<double>(top_k));
    }
  }
  return record;
}

}  // namespace moe
