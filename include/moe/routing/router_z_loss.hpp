#pragma once

#include "moe/kernels/math.hpp"
#include "moe/matrix.hpp"
#include "moe/parallel.hpp"

/// \file
/// The loss that keeps logits small, so that rounding does not decide where tokens go.
///
/// [Z22] B. Zoph, I. Bello, S. Kumar, N. Du, Y. Huang, J. Dean, N. Shazeer, W. Fedus, "ST-MoE:
/// Designing Stable and Transferable Sparse Expert Models", 2022 (arXiv 2202.08906), eq. 5.

namespace moe::detail {

/// The sum over N tokens of log_sum², log_sum (N) being log Σ_i e^c_i of the logits c. The loss is its
/// mean over the tokens of a batch.
template <class Scalar>
double router_z_loss_sum(const Vector<Scalar>& log_sum) {
  double squares = 0;
  for (Index t = 0; t < log_sum.size(); ++t) {
    squares += static_cast<double>(log_sum[t]) * static_cast<double>(log_sum[t]);
  }
  return squares;
}

/// dlogits += (2·weight/T)·log_sum·softmax(c), T being the number of tokens of the whole batch.
template <class Scalar>
void router_z_loss_backward(double weight, Index batch_tokens, const Matrix<Scalar>& logits,
                            const Vector<Scalar>& log_sum, Matrix<Scalar>& dlogits) {
  const Index tokens = logits.rows();
  const auto twice = static_cast<Scalar>(2 * weight / static_cast<double>(batch_tokens));
  parallel_for_blocks(tokens, 64, function_work(logits.size()), [&](Index first, Index count) {
    using namespace Eigen::internal;
    for (Index t = first; t < first + count; ++t) {
      const auto shift = broadcast(log_sum[t]);
      const auto factor = broadcast(twice * log_sum[t]);
      map(
          logits.cols(), row_data(dlogits, t),
          [&](const Packet<Scalar>& d, const Packet<Scalar>& c) {
            return pmadd(factor, moe::detail::exp<Scalar>(psub(c, shift)), d);
          },
          row_data(dlogits, t), row_data(logits, t));
    }
  });
}

}  // namespace moe::detail
