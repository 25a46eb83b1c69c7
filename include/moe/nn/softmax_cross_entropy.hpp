#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "moe/kernels/softmax.hpp"
#include "moe/nn/targets.hpp"
#include "moe/parallel.hpp"

namespace moe {

/// The mean over tokens of -log softmax(logits[t])[targets[t]], in nats; e to this power is the
/// perplexity.
///
/// There are T tokens and V classes. A token with a negative target is ignored: it does not count in
/// the mean and has no gradient. If all are ignored, the loss is 0. A NaN in a row of logits makes the
/// loss and this row of the gradient NaN.
///
/// For sequences of unequal length: `valid` has T entries, 0 for rows of padding, or is empty if there
/// are none. A row of padding is ignored like one with a negative target, and neither its logits nor
/// its target are read. The loss and the other rows of the gradient have the same bits as without the
/// padding.
template <class Scalar = float>
class SoftmaxCrossEntropy {
 public:
  /// The caller's scratch: what one pass computes.
  struct Tape {
    std::vector<double> losses;  ///< T, 0 where ignored
    bool trained = false;        ///< whether the last pass was a forward()
    Matrix<Scalar> dlogits;      ///< T x V, gradient of the mean
  };

  /// Returns the loss, and writes its gradient to the tape. A row stays in L1 or L2 during its
  /// computation, so the pass reads the logits from memory once and writes the gradient once. Throws
  /// std::invalid_argument unless there are T targets, those of valid rows below V, and 0 or T entries
  /// in `valid`, or if logits overlap tape.dlogits.
  Scalar forward(const MatrixRef<Scalar>& logits, IndexSpan targets, Tape& tape,
                 std::span<const std::uint8_t> valid = {}) const {
    const Index counted =
        detail::count_targets("SoftmaxCrossEntropy", logits.rows(), logits.cols(), targets, valid);
    detail::require_apart("SoftmaxCrossEntropy::forward", "logits", logits, {tape.dlogits});
    detail::resize(tape.dlogits, logits.rows(), logits.cols());
    tape.trained = true;
    return run(logits, targets, valid, counted, tape.losses, tape.dlogits.data());
  }

  /// d loss / d logits = (softmax(logits) - onehot(target)) / counted tokens, T x V.
  /// Throws std::invalid_argument unless the last pass on the tape was a forward().
  const Matrix<Scalar>& backward(const Tape& tape) const {
    detail::require(tape.trained,
                    "SoftmaxCrossEntropy::backward without a forward pass on this tape");
    return tape.dlogits;
  }

  /// The loss, with the same bits as in forward(), without its gradient. Throws
  /// std::invalid_argument for targets and `valid` that forward() refuses.
  Scalar evaluate(const MatrixRef<Scalar>& logits, IndexSpan targets, Tape& tape,
                  std::span<const std::uint8_t> valid = {}) const {
    const Index counted =
        detail::count_targets("SoftmaxCrossEntropy", logits.rows(), logits.cols(), targets, valid);
    tape.trained = false;
    return run(logits, targets, valid, counted, tape.losses, nullptr);
  }
  /// The same with a tape of its own, which allocates.
  Scalar evaluate(const MatrixRef<Scalar>& logits, IndexSpan targets,
                  std::span<const std::uint8_t> valid = {}) const {
    Tape tape;
    return evaluate(logits, targets, tape, valid);
  }

  /// It has no parameters.
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}

 private:
  /// `dlogits` may be null.
  static Scalar run(const MatrixRef<Scalar>& logits, std::span<const Index> targets,
                    std::span<const std::uint8_t> valid, Index counted, std::vector<double>& losses,
                    Scalar* dlogits) {
    const Index classes = logits.cols();
    detail::resize(losses, logits.rows());
    const Index block = std::max<Index>(1, (Index{1} << 14) / std::max<Index>(1, classes));
    parallel_for_blocks(logits.rows(), block, function_work(logits.size()),
                        [&](Index first, Index count) {
                          for (Index t = first; t < first + count; ++t) {
                            losses[detail::to_size(t)] =
                                run_row(classes, logits.data() + t * logits.outerStride(),
                                        detail::target_of(targets, valid, t), counted,
                                        dlogits != nullptr ? dlogits + t * classes : nullptr);
                          }
                        });
    double sum = 0;
    for (const double loss : losses) sum += loss;
    return static_cast<Scalar>(counted == 0 ? 0.0 : sum / static_cast<double>(counted));
  }

  static double run_row(Index classes, const Scalar* x, Index target, Index counted, Scalar* dx) {
    if (target < 0) {
      if (dx != nullptr) std::fill_n(dx, classes, Scalar{0});
      return 0;
    }
    const detail::SoftmaxRow<Scalar> row = detail::softmax_row(classes, x, dx);
    if (dx != nullptr) {
      detail::softmax_row_backward(classes, row, target, 1, static_cast<double>(counted), dx);
    }
    return row.loss(x[target]);
  }
};

}  // namespace moe
