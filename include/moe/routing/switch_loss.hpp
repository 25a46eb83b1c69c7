#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <string_view>
#include <utility>

#include "moe/kernels/column_sums.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/pass.hpp"

/// \file
/// The balance loss of Switch Transformer and most models since, E·Σ_i f_i·P_i [F22 eq. 4-6]: f_i is the
/// share of a batch, or of a sequence, that chose expert i, and P_i the mean probability of expert i
/// there. Only P has a gradient. [F22] is cited in capacity.hpp, [D3] in group_limit.hpp.

namespace moe {

/// What f_i counts. Published losses differ in this, so their weights can be compared only for the same
/// count. In perfect balance the loss is its weight times Σ f.
enum class SwitchCount {
  per_slot,  ///< all K choices of a token, over T·K: Σ f = 1 (DeepSeek, Megatron-Core, MegaBlocks)
  per_token,  ///< all K choices of a token, over T: Σ f = K (Hugging Face: Mixtral, OLMoE, Qwen)
  first_choice,  ///< a token's first choice only, over T: Σ f = 1 (GShard; Switch, where K = 1)
};
constexpr std::array<std::string_view, 3> enumerator_names(SwitchCount) {
  return {"per_slot", "per_token", "first_choice"};
}

/// The order of the rows of a batch of sequences of equal length.
enum class RowOrder {
  /// The first tokens of all sequences, then the second ones, and so on: row = step·sequences +
  /// sequence, as in moe::LSTM; a (time, batch, D) tensor of PyTorch.
  time_major,
  /// One whole sequence after the other: row = sequence·length + step; a (batch, time, D) tensor.
  sequence_major
};
constexpr std::array<std::string_view, 2> enumerator_names(RowOrder) {
  return {"time_major", "sequence_major"};
}

namespace detail {

inline Index sequence_of(Index row, Index rows, Index sequences, RowOrder order) {
  return order == RowOrder::time_major ? row % sequences : row / (rows / sequences);
}
/// The sequence of a token, where the number of rows of the whole batch is a multiple of `sequences`.
inline Index sequence_of_token(const ValidTokens& tokens, Index token, Index sequences,
                               RowOrder order) {
  return sequence_of(tokens.first_row + tokens.row_of(token), tokens.batch_rows, sequences, order);
}

/// The mean over sequences of E·Σ_i f_i·P_i, and what its gradient needs. With one sequence it is the
/// loss of the batch. f and P of a sequence are over its own valid tokens; a sequence without any does
/// not count in the mean.
template <class Scalar>
class SwitchLoss {
 public:
  /// The probabilities (N x E) are each row of `score` times its entry of `scale` (N). `choices` has the
  /// K choices of token 0, the first choice first, then those of token 1, and so on (N·K). The rows of
  /// the batch must be a multiple of `sequences`; a sequence may be spread over processes. Adds up the
  /// tokens of this process, and adds to `sum` what must be summed over the batch before finish().
  /// O(N·E).
  void accumulate(const Matrix<Scalar>& score, const Vector<Scalar>& scale,
                  std::span<const Index> choices, Index top_k, SwitchCount count, Index sequences,
                  RowOrder order, const ValidTokens& tokens, BatchSum& sum) {
    const Index step = count == SwitchCount::first_choice ? top_k : 1;
    counted_ = count == SwitchCount::per_slot ? top_k : 1;
    assign(tokens_, sequences, 0.0);
    resize_to_zero(chosen_, sequences, score.cols());
    resize_to_zero(total_, sequences, score.cols());
    resize(sequence_, score.rows());
    for (Index t = 0; t < score.rows(); ++t) {
      sequence_[t] = sequence_of_token(tokens, t, sequences, order);
      tokens_[sequence_[t]] += 1;
    }
    for (Index c = 0; c < top_k * score.rows(); c += step) {
      chosen_(sequence_[c / top_k], choices[to_size(c)]) += 1;
    }
    sum_probabilities(score, scale);
    sum.add(tokens_.data(), sequences);
    sum.add(chosen_.data(), chosen_.size());
    sum.add(total_.data(), total_.size());
  }

  /// The number of values that accumulate() adds to `sum`.
  static Index figures(Index experts, Index sequences) { return sequences * (1 + 2 * experts); }

  /// The loss of the batch; 0 without tokens.
  Scalar finish() {
    resize_to_zero(share_, chosen_.rows(), chosen_.cols());
    resize_to_zero(probability_, chosen_.rows(), chosen_.cols());
    sequences_with_tokens_ = 0;
    double loss = 0;
    for (Index s = 0; s < share_.rows(); ++s) {
      if (tokens_[s] == 0) continue;
      ++sequences_with_tokens_;
      const double count = tokens_[s] * static_cast<double>(counted_);
      const Scalar one = static_cast<Scalar>(share_.cols()) / static_cast<Scalar>(count);
      for (Index i = 0; i < share_.cols(); ++i) {
        share_(s, i) = static_cast<Scalar>(chosen_(s, i)) * one;
        probability_(s, i) = static_cast<Scalar>(total_(s, i) / tokens_[s]);
      }
      loss +=
          static_cast<double>(dot(share_.cols(), row_data(share_, s), row_data(probability_, s)));
    }
    const double sequences = static_cast<double>(std::max<Index>(1, sequences_with_tokens_));
    return static_cast<Scalar>(loss / sequences);
  }

  /// Adds weight·∂loss/∂probability of a token to dp (E), that is weight·E·f_i / (T_s·n), T_s being
  /// the number of tokens of its sequence and n the number of sequences that have tokens.
  void add_gradient(Scalar weight, Index token, Scalar* dp) const {
    const Index s = sequence_[token];
    const double tokens = tokens_[s] * static_cast<double>(sequences_with_tokens_);
    add_scaled(share_.cols(), weight / static_cast<Scalar>(tokens), row_data(share_, s), dp);
  }

  const Matrix<Scalar>& share() const { return share_; }              ///< E·f
  const Matrix<Scalar>& probability() const { return probability_; }  ///< P

 private:
  /// Columns of a task: for each token a few cache lines.
  static constexpr Index columns = 512;

  /// Adds up some tokens at a time in Scalar, and these sums in double.
  void sum_probabilities(const Matrix<Scalar>& score, const Vector<Scalar>& scale) {
    const Index tokens = score.rows();
    const Index sequences = total_.rows();
    const Index few = std::max(summed_rows, sequences);
    resize_to_zero(probability_, sequences, score.cols());
    parallel_for_blocks(score.cols(), columns, element_work(score.size()),
                        [&](Index first, Index size) {
                          for (Index begin = 0; begin < tokens; begin += few) {
                            for (Index t = begin; t < std::min(tokens, begin + few); ++t) {
                              add_scaled(size, scale[t], row_data(score, t) + first,
                                         row_data(probability_, sequence_[t]) + first);
                            }
                            for (Index s = 0; s < sequences; ++s) {
                              Scalar* sum = row_data(probability_, s) + first;
                              double* total = row_data(total_, s) + first;
                              for (Index i = 0; i < size; ++i) {
                                total[i] += static_cast<double>(std::exchange(sum[i], Scalar{0}));
                              }
                            }
                          }
                        });
  }

  Index counted_ = 1;  ///< the choices per token by which f is divided
  Index sequences_with_tokens_ = 0;
  IndexedVector<Index> sequence_;  ///< N, of each token
  IndexedVector<double> tokens_;   ///< T_s of each sequence of the batch
  Matrix<double> chosen_;          ///< sequences x E, how often each expert was chosen
  Matrix<double> total_;           ///< sequences x E, the sums of the probabilities
  Matrix<Scalar> share_;           ///< sequences x E
  Matrix<Scalar> probability_;     ///< sequences x E
};

}  // namespace detail
}  // namespace moe
