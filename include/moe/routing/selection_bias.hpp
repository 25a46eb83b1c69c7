#pragma once

#include "moe/matrix.hpp"

/// \file
/// The selection bias, which balances experts without a loss. [W24] is cited in top_k_gate.hpp, [D3] in
/// group_limit.hpp.

namespace moe::detail {

/// b_i += rate·sign(mean load − load_i) [W24 alg. 1; D3 sec. 2.1.2], load (E) and bias (1 x E).
template <class Scalar>
void move_selection_bias(const Vector<Scalar>& load, Scalar rate, Matrix<Scalar>& bias) {
  double total = 0;
  for (Index i = 0; i < load.size(); ++i) total += static_cast<double>(load[i]);
  for (Index i = 0; i < load.size(); ++i) {
    // load_i·E and Σ load are compared, which are exact; the mean load would be rounded.
    const double scaled = static_cast<double>(load[i]) * static_cast<double>(load.size());
    if (scaled < total) bias(0, i) += rate;
    if (scaled > total) bias(0, i) -= rate;
  }
}

}  // namespace moe::detail
