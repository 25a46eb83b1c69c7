#pragma once

#include <vector>

#include "moe/nn/packed_rows.hpp"
#include "moe/reinforce/policy.hpp"
#include "moe/reinforce/returns.hpp"
#include "moe/reinforce/rollout.hpp"

/// \file
/// The steps that REINFORCE trains.

namespace moe {

/// The argument of a baseline: the sampled steps of an update, in the order of the rows of the logits,
/// and their returns. Forced steps and padding are not among them. It refers to the tape of the update
/// and is valid only during the call.
template <Policy P>
class SampledSteps {
 public:
  using Scalar = typename P::Scalar;  ///< that of the policy

  /// Refers to its arguments. `samples` is the number of sampled rows of each input; `greedy` is empty
  /// unless the baseline needs it.
  SampledSteps(const Rollout& rollout, const PackedRows& sampled,
               const std::vector<double>& returns, Index samples, const Rollout& greedy,
               const std::vector<double>& greedy_returns, const P& policy,
               const typename P::Tape& tape)
      : rollout_(rollout),
        sampled_(sampled),
        returns_(returns),
        samples_(samples),
        greedy_(greedy),
        greedy_returns_(greedy_returns),
        policy_(policy),
        tape_(tape) {}

  /// The number of sampled steps.
  Index count() const { return sampled_.count(); }

  /// The row of the i-th sampled step in the rollout.
  Index row(Index i) const { return sampled_.rows[detail::to_size(i)] % rollout_.rows(); }
  /// The step of the i-th sampled step in its sequence.
  Index t(Index i) const { return sampled_.rows[detail::to_size(i)] / rollout_.rows(); }
  /// The input of the i-th sampled step.
  Index input(Index i) const { return row(i) / rollout_.samples; }

  /// R_t of the i-th sampled step.
  double return_at(Index i) const { return returns_[rollout_.at(row(i), t(i))]; }

  /// The number of sequences sampled for an input.
  Index samples() const { return samples_; }
  /// The first row of an input.
  Index first_row(Index input) const { return input * rollout_.samples; }

  /// The return of a sequence: R at its first sampled step, which it must have.
  double return_of(Index row) const { return detail::return_of(rollout_, returns_, row); }

  /// The mean of return_of() over the sequences that have a sampled step; there must be one.
  double mean_return() const {
    double sum = 0;
    Index sequences = 0;
    for (Index row = 0; row < rollout_.rows(); ++row) {
      if (!detail::has_sampled(rollout_, row)) continue;
      sum += return_of(row);
      ++sequences;
    }
    return sum / static_cast<double>(sequences);
  }

  /// The return of the policy's greedy sequence for an input, after the same prefix. Only for baselines
  /// with needs_greedy_rollout.
  double greedy_return(Index input) const {
    return detail::return_of(greedy_, greedy_returns_, input);
  }

  /// Copies the policy's state at the sampled steps to `packed` (count() x W). Throws
  /// std::invalid_argument unless the policy's hidden(tape) has a row for each row of the logits.
  void pack_hidden(Matrix<Scalar>& packed) const requires PolicyWithHidden<P> {
    const Matrix<Scalar>& hidden = policy_.hidden(tape_);
    const Index rows = rollout_.steps * rollout_.rows();
    detail::require(hidden.rows() == rows, "Reinforce: the policy's hidden state is ",
                    hidden.rows(), " x ", hidden.cols(), " for ", rows, " rows of logits");
    sampled_.pack(hidden, packed);
  }

 private:
  const Rollout& rollout_;
  const PackedRows& sampled_;
  const std::vector<double>& returns_;
  Index samples_;
  const Rollout& greedy_;
  const std::vector<double>& greedy_returns_;
  const P& policy_;
  const typename P::Tape& tape_;
};

namespace detail {

/// The rows of the logits that are sampled steps.
inline void list_sampled(const Rollout& rollout, PackedRows& sampled) {
  sampled.rows.clear();
  for (Index t = 0; t < rollout.steps; ++t) {
    for (Index row = 0; row < rollout.rows(); ++row) {
      if (t >= rollout.forced[to_size(row)] && t < rollout.length[to_size(row)]) {
        sampled.rows.push_back(t * rollout.rows() + row);
      }
    }
  }
}

}  // namespace detail
}  // namespace moe
