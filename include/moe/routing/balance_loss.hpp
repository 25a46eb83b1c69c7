#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/routing/config_checks.hpp"
#include "moe/routing/routing.hpp"
#include "moe/routing/shared_batch.hpp"

/// \file
/// The losses that keep experts in balance, and the figures that show how well they do.
///
/// N. Shazeer, A. Mirhoseini, K. Maziarz, A. Davis, Q. Le, G. Hinton, J. Dean, "Outrageously Large
/// Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", ICLR 2017 (arXiv 1701.06538),
/// cited as [S17] throughout the library.

namespace moe {

namespace detail {

/// Mean and population variance of values after division by the largest magnitude among them (`scale`),
/// so that no power of them under- or overflows. All zero if there are no values or all are 0.
struct ScaledMoments {
  double scale = 0;
  double mean = 0;
  double variance = 0;
};
template <class Scalar>
ScaledMoments scaled_moments(const Vector<Scalar>& values) {
  ScaledMoments moments;
  const Index count = values.size();
  for (Index i = 0; i < count; ++i) {
    const double magnitude = std::abs(static_cast<double>(values[i]));
    if (!(magnitude <= moments.scale)) moments.scale = magnitude;  // NaN too
  }
  if (moments.scale == 0) return {};
  const auto scaled = [&](Index i) { return static_cast<double>(values[i]) / moments.scale; };
  for (Index i = 0; i < count; ++i) moments.mean += scaled(i) / static_cast<double>(count);
  for (Index i = 0; i < count; ++i) {
    const double difference = scaled(i) - moments.mean;
    moments.variance += difference * difference / static_cast<double>(count);
  }
  return moments;
}

}  // namespace detail

/// CV², the squared coefficient of variation: population variance / mean². 0 for fewer than two values,
/// and if their mean is 0.
template <class Scalar>
Scalar cv_squared(const Vector<Scalar>& values) {
  if (values.size() < 2) return Scalar{0};
  const auto [scale, mean, variance] = detail::scaled_moments(values);
  return mean == 0 ? Scalar{0} : static_cast<Scalar>(variance / (mean * mean));
}

/// factor·∂CV²/∂values: with m the mean and q the variance,
/// ∂CV²/∂v_i = (2/E)·[(v_i − m)/m² − q/m³]; 0 where CV² is a constant 0.
template <class Scalar>
void cv_squared_backward(const Vector<Scalar>& values, Scalar factor, Vector<Scalar>& gradient) {
  const Index count = values.size();
  detail::resize_to_zero(gradient, count);
  if (count < 2 || factor == Scalar{0}) return;
  const auto [scale, mean, variance] = detail::scaled_moments(values);
  if (mean == 0) return;
  const double cv2 = variance / (mean * mean);
  const double common = 2 * static_cast<double>(factor) / static_cast<double>(count) / mean / scale;
  for (Index i = 0; i < count; ++i) {
    const double scaled = static_cast<double>(values[i]) / scale;
    gradient[i] = static_cast<Scalar>(common * ((scaled - mean) / mean - cv2));
  }
}

/// The weights of the losses of importance and load [S17 eq. 7 and 11], each finite and at least 0.
struct BalanceLossWeights {
  /// w_importance
  double importance = 0;
  /// w_load
  double load = 0;
};

namespace detail {

// The same weights in the configuration of a gate with both losses; `gate` names its class in
// messages.

template <class Config>
void check_balance_weights(const char* gate, const Config& config) {
  check_at_least_zero(gate, "Config.importance_weight", config.importance_weight);
  check_at_least_zero(gate, "Config.load_weight", config.load_weight);
}

template <class Config>
BalanceLossWeights balance_weights_of(const Config& config) {
  return {config.importance_weight, config.load_weight};
}

/// Throws std::invalid_argument, with nothing changed, for a weight out of range.
template <class Config>
void set_balance_weights(const char* gate, const BalanceLossWeights& weights, Config& config) {
  check_at_least_zero(gate, "LossWeights.importance", weights.importance);
  check_at_least_zero(gate, "LossWeights.load", weights.load);
  config.importance_weight = weights.importance;
  config.load_weight = weights.load;
}

}  // namespace detail

/// The losses of a gate one by one, each times its weight and Pass::loss_scale; 0 where a gate has no
/// such loss or its weight is 0.
template <class Scalar>
struct GateLosses {
  Scalar importance{0};   ///< [S17 eq. 7]
  Scalar load{0};         ///< [S17 eq. 11]
  Scalar switch_loss{0};  ///< of the batch, see TopKGate
  Scalar sequence{0};     ///< the mean of the same loss over sequences
  Scalar z{0};            ///< of the router's logits
  Scalar threshold{0};    ///< [S17 eq. 20], BalancedGate's

  /// Their sum.
  Scalar sum() const { return importance + load + switch_loss + sequence + z + threshold; }

  /// Adds those of another gate, one by one.
  GateLosses& operator+=(const GateLosses& other) {
    importance += other.importance;
    load += other.load;
    switch_loss += other.switch_loss;
    sequence += other.sequence;
    z += other.z;
    threshold += other.threshold;
    return *this;
  }
};

/// How evenly a batch was spread over the experts, and the loss that makes it more even.
/// A collapsed gate shows as cv_load() and max_over_mean_load() far above 0 and 1, and as
/// unused_experts() above 0.
template <class Scalar>
struct Balance {
  /// The sum of the gate's own losses; for a noisy gate w_importance·CV²(importance) +
  /// w_load·CV²(load) [S17 eq. 7 and 11]. Every backward pass includes its gradient.
  Scalar loss{0};
  GateLosses<Scalar> losses;  ///< one by one
  Vector<Scalar> importance;  ///< E, Σ_t G_ti [S17 eq. 6]
  Vector<Scalar> load;        ///< E, Σ_t P(x_t, i) [S17 eq. 10]; the count without noise
  IndexedVector<Index> tokens_per_expert;  ///< E, how many tokens each expert got

  IndexedVector<double> sums;   ///< scratch
  IndexedVector<Index> counts;  ///< scratch

  /// The coefficient of variation of the importance.
  Scalar cv_importance() const { return std::sqrt(cv_squared(importance)); }
  /// The coefficient of variation of the load.
  Scalar cv_load() const { return std::sqrt(cv_squared(load)); }

  /// The largest load over the mean load; 1 in perfect balance, 0 when there is no load.
  Scalar max_over_mean_load() const {
    double total = 0;
    double largest = 0;
    for (Index i = 0; i < load.size(); ++i) {
      total += static_cast<double>(load[i]);
      largest = std::max(largest, static_cast<double>(load[i]));
    }
    const double ratio = total > 0 ? largest * static_cast<double>(load.size()) / total : 0.0;
    return static_cast<Scalar>(ratio);
  }

  /// The number of experts that got no token.
  Index unused_experts() const {
    return std::count(tokens_per_expert.begin(), tokens_per_expert.end(), Index{0});
  }
};

namespace detail {

/// to = from. Does not allocate if both have the same number of experts.
template <class Scalar>
void copy_balance(const Balance<Scalar>& from, Balance<Scalar>& to) {
  to.loss = from.loss;
  to.losses = from.losses;
  resize(to.importance, from.importance.size());
  to.importance = from.importance;
  resize(to.load, from.load.size());
  to.load = from.load;
  copy_vector(std::span<const Index>(from.tokens_per_expert), to.tokens_per_expert);
}

/// Adds up importance and the tokens of every expert from the slots that a gate made: balance.sums
/// and balance.tokens_per_expert. A running sum of floats would stop growing at some number of
/// tokens, so the sums are double. O(S + E).
template <class Scalar>
void sum_importance(const Routing<Scalar>& routing, Balance<Scalar>& balance) {
  assign(balance.sums, routing.experts, 0.0);
  assign(balance.tokens_per_expert, routing.experts, Index{0});
  for (Index slot = 0; slot < routing.slots(); ++slot) {
    const Index e = routing.expert[slot];
    balance.sums[e] += static_cast<double>(routing.weight[slot]);
    ++balance.tokens_per_expert[e];
  }
}

/// counts = how often each of E experts is in a list. O(S + E).
inline void count_choices(std::span<const Index> chosen, Index experts,
                          IndexedVector<Index>& counts) {
  assign(counts, experts, Index{0});
  for (const Index e : chosen) ++counts[e];
}

template <class Number, class Scalar>
void copy_numbers(const IndexedVector<Number>& from, Vector<Scalar>& to) {
  resize(to, static_cast<Index>(from.size()));
  for (Index i = 0; i < to.size(); ++i) to[i] = static_cast<Scalar>(from[i]);
}

/// The number of values that measure_importance() and measure_balance() sum over the processes.
inline Index importance_figures(Index experts) { return 2 * experts; }
inline Index balance_figures(Index experts) { return importance_figures(experts) + experts; }

/// Importance and the tokens of every expert over the whole batch.
template <class Scalar>
void measure_importance(const Routing<Scalar>& routing, BatchSum& sum, Balance<Scalar>& balance) {
  sum_importance(routing, balance);
  sum.add(balance.sums.data(), routing.experts);
  sum.add(balance.tokens_per_expert.data(), routing.experts);
  sum.sum();
  copy_numbers(balance.sums, balance.importance);
}

/// Importance, the tokens of every expert and, as the load, how often each was chosen, over the whole
/// batch; the load has no gradient. The gate may have added its own values to `sum` before.
template <class Scalar>
void measure_balance(const Routing<Scalar>& routing, std::span<const Index> chosen, BatchSum& sum,
                     Balance<Scalar>& balance) {
  count_choices(chosen, routing.experts, balance.counts);
  sum.add(balance.counts.data(), routing.experts);
  measure_importance(routing, sum, balance);
  copy_numbers(balance.counts, balance.load);
}

}  // namespace detail

/// For a gate of your own: sets importance, load (the number of tokens) and tokens_per_expert to what the
/// slots of `routing` say. The losses are left as they are. The rows are those of this process, not of a
/// batch that several processes share. Throws std::invalid_argument, with nothing changed, when the routing
/// contradicts itself, as sort_by_expert() does. O(S + E + T).
template <class Scalar>
void count_slots(const Routing<Scalar>& routing, Balance<Scalar>& balance) {
  detail::check_routing(routing);
  detail::sum_importance(routing, balance);
  detail::copy_numbers(balance.sums, balance.importance);
  detail::copy_numbers(balance.tokens_per_expert, balance.load);
}

namespace detail {

/// Sets balance.loss and balance.losses, `scale` being Pass::loss_scale. A loss of weight 0 is not
/// computed: its value might be NaN.
template <class Scalar>
void measure_balance_loss(const BalanceLossWeights& weights, double scale,
                          Balance<Scalar>& balance) {
  balance.losses = {};
  if (weights.importance * scale > 0) {
    balance.losses.importance =
        static_cast<Scalar>(weights.importance * scale) * cv_squared(balance.importance);
  }
  if (weights.load * scale > 0) {
    balance.losses.load = static_cast<Scalar>(weights.load * scale) * cv_squared(balance.load);
  }
  balance.loss = balance.losses.importance + balance.losses.load;
}
/// The gradients of balance.loss w.r.t. importance and load (E); zeros for a loss of weight 0.
template <class Scalar>
void balance_loss_backward(const Balance<Scalar>& balance, const BalanceLossWeights& weights,
                           double scale, Vector<Scalar>& dimportance, Vector<Scalar>& dload) {
  cv_squared_backward(balance.importance, static_cast<Scalar>(weights.importance * scale),
                      dimportance);
  cv_squared_backward(balance.load, static_cast<Scalar>(weights.load * scale), dload);
}

}  // namespace detail

}  // namespace moe
