#pragma once

#include "moe/kernels/simd.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/dispatch.hpp"

/// \file
/// Experts that are the identity: the last ones of a gate. They have no parameters, and their slots stay
/// in the process of their tokens.
///
/// P. Jin, B. Zhu, L. Yuan, S. Yan, "MoE++: Accelerating Mixture-of-Experts Methods with
/// Zero-Computation Experts", ICLR 2025 (arXiv 2410.07348), where they are copy experts;
/// Meituan LongCat Team, "LongCat-Flash Technical Report", 2025 (arXiv 2509.01322).

namespace moe::detail {

/// sum[t] += w·rows[t] for the slots of experts first_expert, first_expert + 1, ..., both matrices
/// being T x D. If `rows` is x, this is their share of y; if `rows` is dy, their share of the
/// gradient w.r.t. x. A token's slots are added in the order of the experts. O(slots·D).
template <class Scalar>
void add_identity_experts(const Dispatch<Scalar>& dispatch, Index first_expert,
                          const MatrixRef<Scalar>& rows, Matrix<Scalar>& sum) {
  const Index first_slot = dispatch.offsets[first_expert];
  const Index slots = dispatch.slots() - first_slot;
  if (slots == 0) return;
  parallel_for_blocks(sum.cols(), 64, element_work(slots * sum.cols()),
                      [&](Index first, Index count) {
                        for (Index i = first_slot; i < dispatch.slots(); ++i) {
                          const Index token = dispatch.token[i];
                          add_scaled(count, dispatch.weight[i], row_data(rows, token) + first,
                                     row_data(sum, token) + first);
                        }
                      });
}

/// Fills dweight (S, in the order of the dispatch) for the same slots: ⟨x, dsum⟩ of their tokens.
template <class Scalar>
void identity_weight_gradients(const Dispatch<Scalar>& dispatch, Index first_expert,
                               const MatrixRef<Scalar>& x, const MatrixRef<Scalar>& dsum,
                               IndexedVector<Scalar>& dweight) {
  const Index first_slot = dispatch.offsets[first_expert];
  const Index slots = dispatch.slots() - first_slot;
  parallel_for_blocks(slots, 64, element_work(slots * x.cols()), [&](Index first, Index count) {
    for (Index i = first_slot + first; i < first_slot + first + count; ++i) {
      const Index token = dispatch.token[i];
      dweight[i] = dot(x.cols(), row_data(x, token), row_data(dsum, token));
    }
  });
}

}  // namespace moe::detail
