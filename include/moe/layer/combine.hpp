#pragma once

#include <algorithm>
#include <span>

#include "moe/kernels/packet.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// From rows grouped by expert back to tokens.

namespace moe::detail {

/// out[t] += Σ over the slots of token t of weight[slot]·rows[row of slot], in the order of the
/// slots, which is that of the experts. An empty `weight` stands for ones. rows is S x D, out T x
/// D; a token without slots keeps its row. O(S·D).
template <class Scalar>
void combine(const Routing<Scalar>& routing, std::span<const Scalar> weight,
             const Matrix<Scalar>& rows, Matrix<Scalar>& out) {
  parallel_for_blocks(routing.tokens(), 64, [&](Index first, Index count) {
    for (Index t = first; t < first + count; ++t) {
      const Index end = routing.token_offsets[to_size(t) + 1];
      for (Index slot = routing.token_offsets[to_size(t)]; slot < end; ++slot) {
        const Scalar w = weight.empty() ? Scalar{1} : weight[to_size(slot)];
        add_scaled(out.cols(), w, row_data(rows, routing.slot_row[to_size(slot)]),
                   row_data(out, t));
      }
    }
  });
}

}  // namespace moe::detail
