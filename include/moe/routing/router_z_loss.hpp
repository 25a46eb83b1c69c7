#pragma once

#include "moe/kernels/math.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/global_batch.hpp"

/// \file
/// The loss that keeps logits small, so that rounding does not decide where tokens go.
///
/// [Z22] B. Zoph, I. Bello, S. Kumar, N. Du, Y. Huang, J. Dean, N. Shazeer, W. Fedus, "ST-MoE:
/// Designing Stable and Transferable Sparse Expert Models", 2022 (arXiv 2202.08906), eq. 5.

namespace moe::detail {

/// The mean over the tokens of a batch of log_sum², log_sum = log Σ_i e^c_i (T) of the logits c; 0
/// without tokens.
template <class Scalar>
Scalar router_z_loss(const Vector<Scalar>& log_sum, const GlobalBatch<Scalar>* batch = nullptr) {
  double squares = 0;
  for (Index t = 0; t < log_sum.size(); ++t) {
    squares += static_cast<double>(log_sum[t]) * static_cast<double>(log_sum[t]);
  }
  auto sum = static_cast<Scalar>(squares);
  sum_over_batch(batch, 1, &sum);
  const Index tokens = batch_tokens(batch, log_sum.size());
  return tokens == 0 ? Scalar{0} : sum / static_cast<Scalar>(tokens);
}

/// dlogits += (2·weight/T)·log_sum·softmax(c).
template <class Scalar>
void router_z_loss_backward(double weight, const Matrix<Scalar>& logits,
                            const Vector<Scalar>& log_sum, Matrix<Scalar>& dlogits,
                            const GlobalBatch<Scalar>* batch = nullptr) {
  const Index tokens = logits.rows();
  const Scalar twice =
      static_cast<Scalar>(2 * weight / static_cast<double>(batch_tokens(batch, tokens)));
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
