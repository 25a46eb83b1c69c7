#pragma once

#include <cstdint>
#include <span>

#include "moe/nn/targets.hpp"

namespace moe {

/// The share of tokens, 0 to 1, whose largest logit is that of their target: logits are T x V, targets T
/// classes from 0 to V − 1.
///
///     const double share = moe::accuracy(logits, labels);
///
/// Tokens are ignored as in SoftmaxCrossEntropy: those with a negative target and, where `valid` has T
/// entries, those whose entry is 0; neither their logits nor, with `valid`, their targets are read. If all
/// are ignored, the share is 0. Of equal logits the first is the largest, as in PyTorch's argmax, and a
/// token with a NaN among its logits counts as wrong. Allocates nothing if logits are a row-major
/// matrix, block or map. Throws std::invalid_argument under the conditions of SoftmaxCrossEntropy.
template <class Derived>
double accuracy(const Eigen::MatrixBase<Derived>& logits, IndexSpan targets,
                std::span<const std::uint8_t> valid = {}) {
  const MatrixRef<typename Derived::Scalar> rows(logits.derived());
  const Index classes = rows.cols();
  const Index counted = detail::count_targets("accuracy", rows.rows(), classes, targets, valid);
  Index right = 0;
  for (Index t = 0; t < rows.rows(); ++t) {
    const Index target = detail::target_of(targets, valid, t);
    if (target < 0) continue;
    const auto* row = detail::row_data(rows, t);
    bool largest = true;
    for (Index c = 0; c < classes; ++c) {
      largest = largest && (c < target ? row[c] < row[target] : row[c] <= row[target]);
    }
    right += largest;
  }
  return counted == 0 ? 0.0 : static_cast<double>(right) / static_cast<double>(counted);
}

}  // namespace moe
