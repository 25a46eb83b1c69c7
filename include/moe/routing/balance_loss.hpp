#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// The losses that keep experts in balance, and the figures by which a user watches them.
///
/// N. Shazeer, A. Mirhoseini, K. Maziarz, A. Davis, Q. Le, G. Hinton, J. Dean, "Outrageously Large
/// Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", ICLR 2017 (arXiv 1701.06538),
/// cited as [S17] throughout the library.

namespace moe {

/// CV², the squared coefficient of variation: population variance / (mean² + 1e-10); 0 for fewer
/// than two values.
template <class Scalar>
Scalar cv_squared(const Vector<Scalar>& values) {
  const Index count = values.size();
  if (count < 2) return Scalar{0};
  Scalar mean{0};
  for (Index i = 0; i < count; ++i) mean += values[i];
  mean /= static_cast<Scalar>(count);
  Scalar variance{0};
  for (Index i = 0; i < count; ++i) variance += (values[i] - mean) * (values[i] - mean);
  variance /= static_cast<Scalar>(count);
  return variance / (mean * mean + static_cast<Scalar>(1e-10));
}

/// scale·∂CV²/∂values: with m the mean, q the variance and ε = 1e-10,
/// ∂CV²/∂v_i = (2/E)·[(v_i − m)/(m² + ε) − q·m/(m² + ε)²].
template <class Scalar>
void cv_squared_backward(const Vector<Scalar>& values, Scalar scale, Vector<Scalar>& gradient) {
  const Index count = values.size();
  detail::resize_to_zero(gradient, count);
  if (count < 2) return;
  const auto n = static_cast<Scalar>(count);
  Scalar mean{0};
  for (Index i = 0; i < count; ++i) mean += values[i];
  mean /= n;
  const Scalar square = mean * mean + static_cast<Scalar>(1e-10);
  const Scalar cv2 = cv_squared(values);
  for (Index i = 0; i < count; ++i) {
    gradient[i] = scale * (Scalar{2} / n) * ((values[i] - mean) - cv2 * mean) / square;
  }
}

/// How evenly a batch was spread over the experts, and the loss that asks for more evenness.
/// A collapsed gate shows as cv_load() and max_over_mean_load() far above 0 and 1, and as
/// unused_experts() above 0.
template <class Scalar>
struct Balance {
  /// The gate's own losses, of the noisy ones w_importance·CV²(importance) + w_load·CV²(load)
  /// [S17 eq. 7 and 11]; their gradient is part of every backward pass.
  Scalar loss{0};
  Vector<Scalar> importance;  ///< E, Σ_t G_ti [S17 eq. 6]
  Vector<Scalar> load;        ///< E, Σ_t P(x_t, i) [S17 eq. 10]; the count without noise
  std::vector<Index> tokens_per_expert;  ///< E, how many tokens each expert got

  Scalar cv_importance() const { return std::sqrt(cv_squared(importance)); }
  Scalar cv_load() const { return std::sqrt(cv_squared(load)); }

  /// The fullest expert's load over the mean; 1 in perfect balance, 0 when there is no load.
  Scalar max_over_mean_load() const {
    Scalar total{0};
    Scalar largest{0};
    for (Index i = 0; i < load.size(); ++i) {
      total += load[i];
      largest = std::max(largest, load[i]);
    }
    return total > Scalar{0} ? largest * static_cast<Scalar>(load.size()) / total : Scalar{0};
  }

  Index unused_experts() const {
    return std::count(tokens_per_expert.begin(), tokens_per_expert.end(), Index{0});
  }
};

namespace detail {

/// Importance and the tokens of every expert, from the slots that a gate made. O(S + E).
template <class Scalar>
void measure_importance(const Routing<Scalar>& routing, Balance<Scalar>& balance) {
  resize_to_zero(balance.importance, routing.experts);
  balance.tokens_per_expert.assign(to_size(routing.experts), 0);
  for (std::size_t slot = 0; slot < routing.expert.size(); ++slot) {
    const Index e = routing.expert[slot];
    balance.importance[e] += routing.weight[slot];
    ++balance.tokens_per_expert[to_size(e)];
  }
}

/// The load of a gate without noise: how many tokens each expert got. It has no gradient. O(S + E).
template <class Scalar>
void count_load(const Routing<Scalar>& routing, Balance<Scalar>& balance) {
  resize_to_zero(balance.load, routing.experts);
  for (const Index e : routing.expert) balance.load[e] += Scalar{1};
}

/// importance_weight·CV²(importance) + load_weight·CV²(load) [S17 eq. 7 and 11].
template <class Scalar>
Scalar balance_loss(const Balance<Scalar>& balance, double importance_weight, double load_weight) {
  return static_cast<Scalar>(importance_weight) * cv_squared(balance.importance) +
         static_cast<Scalar>(load_weight) * cv_squared(balance.load);
}
template <class Scalar>
void balance_loss_backward(const Balance<Scalar>& balance, double importance_weight,
                           double load_weight, Vector<Scalar>& dimportance, Vector<Scalar>& dload) {
  cv_squared_backward(balance.importance, static_cast<Scalar>(importance_weight), dimportance);
  cv_squared_backward(balance.load, static_cast<Scalar>(load_weight), dload);
}

/// `gate` names the class in the messages.
inline void check_balance_weights(const char* gate, double importance_weight, double load_weight) {
  require(std::isfinite(importance_weight) && importance_weight >= 0, gate,
          "::Config.importance_weight = ", importance_weight, ", must be finite and at least 0");
  require(std::isfinite(load_weight) && load_weight >= 0, gate,
          "::Config.load_weight = ", load_weight, ", must be finite and at least 0");
}

}  // namespace detail

}  // namespace moe
