#pragma once

#include <algorithm>
#include <span>
#include <utility>

#include "moe/kernels/column_sums.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/global_batch.hpp"

/// \file
/// The balance loss of today's models, E·Σ_i f_i·P_i [F22 eq. 4-6]: f_i the share of a batch, or of
/// a sequence, that chose expert i, P_i its mean probability there. Only P has a gradient. [F22] is
/// cited in capacity.hpp, [D3] in group_limit.hpp.

namespace moe {

/// What f_i counts. Published losses differ in nothing else, so their weights compare only for the
/// same count. In perfect balance the loss is its weight times the sum of f.
enum class SwitchCount {
  per_slot,  ///< all K choices of a token, over T·K: Σ f = 1 (DeepSeek, Megatron-Core, MegaBlocks)
  per_token,  ///< all K choices of a token, over T: Σ f = K (Hugging Face: Mixtral, OLMoE, Qwen)
  first_choice,  ///< a token's first choice only, over T: Σ f = 1 (GShard; Switch, where K = 1)
};

/// How the rows of a batch of sequences of equal length are laid out. `time_major`: all sequences'
/// first tokens, then all second ones, row = step·sequences + sequence, as in this library's
/// models; a (time, batch, D) tensor of PyTorch. `sequence_major`: one whole sequence after the
/// other, row = sequence·length + step; a (batch, time, D) tensor.
enum class RowOrder { time_major, sequence_major };

namespace detail {

inline Index sequence_of(Index row, Index rows, Index sequences, RowOrder order) {
  return order == RowOrder::time_major ? row % sequences : row / (rows / sequences);
}

/// The mean over sequences of E·Σ_i f_i·P_i, and what its gradient needs; with one sequence, the
/// loss of the batch.
template <class Scalar>
class SwitchLoss {
 public:
  /// score·scale, row by row, are the probabilities (T x E); of the choices (T·K) those of a token
  /// stand together, the first one first. Returns the loss; 0 without tokens. The T of the batch
  /// must be a multiple of `sequences`, which may span processes. O(T·E).
  Scalar measure(const Matrix<Scalar>& score, const Vector<Scalar>& scale,
                 std::span<const Index> choices, SwitchCount count, Index sequences, RowOrder order,
                 const GlobalBatch<Scalar>* batch = nullptr) {
    const Index rows = score.rows();
    tokens_ = batch_tokens(batch, rows);
    first_ = first_token(batch);
    const Index experts = score.cols();
    sequences_ = sequences;
    order_ = order;
    detail::resize_to_zero(share_, sequences, experts);
    detail::resize_to_zero(probability_, sequences, experts);
    if (tokens_ == 0) return Scalar{0};

    const Index active = rows > 0 ? static_cast<Index>(choices.size()) / rows : 1;
    const Index step = count == SwitchCount::first_choice ? active : 1;
    const Index counted = tokens_ / sequences * (count == SwitchCount::per_slot ? active : 1);
    const Scalar one = static_cast<Scalar>(experts) / static_cast<Scalar>(counted);
    resize_to_zero(totals_, sequences, experts);
    for (Index c = 0; c < active * rows; c += step) {
      totals_(sequence_of(c / active), choices[to_size(c)]) += 1;
    }
    for (Index i = 0; i < share_.size(); ++i) {
      share_.data()[i] = static_cast<Scalar>(totals_.data()[i]) * one;
    }

    const Scalar mean = static_cast<Scalar>(sequences) / static_cast<Scalar>(tokens_);
    // Sums of a few rows in Scalar, and of these sums in double.
    resize_to_zero(totals_, sequences, experts);
    const Index few = std::max(summed_rows, sequences);
    parallel_for_blocks(experts, columns, element_work(rows * experts),
                        [&](Index first, Index size) {
                          for (Index row = 0; row < rows; row += few) {
                            for (Index t = row; t < std::min(rows, row + few); ++t) {
                              add_scaled(size, mean * scale[t], row_data(score, t) + first,
                                         row_data(probability_, sequence_of(t)) + first);
                            }
                            for (Index s = 0; s < sequences; ++s) {
                              Scalar* sum = row_data(probability_, s) + first;
                              double* total = row_data(totals_, s) + first;
                              for (Index i = 0; i < size; ++i)
                                total[i] += static_cast<double>(std::exchange(sum[i], Scalar{0}));
                            }
                          }
                        });
    for (Index i = 0; i < totals_.size(); ++i) {
      probability_.data()[i] = static_cast<Scalar>(totals_.data()[i]);
    }
    sum_over_batch(batch, share_.size(), share_.data());
    sum_over_batch(batch, probability_.size(), probability_.data());
    Scalar total{0};
    for (Index s = 0; s < sequences; ++s) {
      total += dot(experts, row_data(share_, s), row_data(probability_, s));
    }
    return total / static_cast<Scalar>(sequences);
  }

  /// Adds weight·∂loss/∂probability of a row to dp (E): weight·E·f_i/T.
  void add_gradient(Scalar weight, Index row, Scalar* dp) const {
    add_scaled(share_.cols(), weight / static_cast<Scalar>(tokens_),
               row_data(share_, sequence_of(row)), dp);
  }

  Index sequences() const { return sequences_; }
  const Matrix<Scalar>& share() const { return share_; }              ///< E·f
  const Matrix<Scalar>& probability() const { return probability_; }  ///< P

 private:
  /// Wide enough that a row's part is a few lines of memory.
  static constexpr Index columns = 512;

  Index sequence_of(Index row) const {
    return detail::sequence_of(first_ + row, tokens_, sequences_, order_);
  }

  Index tokens_ = 0;  ///< of the batch
  Index first_ = 0;   ///< the place of row 0 in it
  Index sequences_ = 1;
  RowOrder order_ = RowOrder::time_major;
  Matrix<Scalar> share_;        ///< sequences x E
  Matrix<Scalar> probability_;  ///< sequences x E
  Matrix<double> totals_;       ///< sequences x E, scratch
};

}  // namespace detail
}  // namespace moe
