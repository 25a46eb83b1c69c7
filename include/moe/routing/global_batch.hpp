#pragma once

#include <span>

#include "moe/matrix.hpp"
#include "moe/routing/balance_loss.hpp"

/// \file
/// The batch that a gate's x is a part of, where several processes share one.

namespace moe {

/// A batch whose tokens are spread over several processes, each with a few rows of it: first those
/// of process 0, then those of process 1, and so on. A gate that looks at a batch as a whole, for
/// the sums of its losses or for a choice among tokens, finds it in tape.batch; where that is null,
/// x is all of the batch. moe::mpi::ExpertParallel makes one.
///
/// Sums and gathers are collective: every process makes the same ones in the same order. They
/// throw, on every process, when one of them has thrown since the call before. A gate inside of
/// another gets the pointer in each of its passes, backward() too: it is not valid from one to the
/// next.
template <class Scalar>
class GlobalBatch {
 public:
  virtual ~GlobalBatch() = default;

  virtual Index tokens() const = 0;       ///< of all processes
  virtual Index first_token() const = 0;  ///< the place of this process's first one among them

  /// Replaces each number by its sum over the processes, which has the same bits on all.
  virtual void sum(std::span<Scalar> numbers) const = 0;
  virtual void sum(std::span<Index> numbers) const = 0;

  /// Puts the numbers of all processes one behind the other: this one has `per_token` of each of
  /// its tokens, and `all` has room for those of tokens().
  virtual void gather(std::span<const Scalar> numbers, Index per_token,
                      std::span<Scalar> all) const = 0;
  virtual void gather(std::span<const Index> numbers, Index per_token,
                      std::span<Index> all) const = 0;
};

namespace detail {

// What gates do with a batch that may be null.

template <class Scalar>
Index batch_tokens(const GlobalBatch<Scalar>* batch, Index own) {
  return batch != nullptr ? batch->tokens() : own;
}
template <class Scalar>
Index first_token(const GlobalBatch<Scalar>* batch) {
  return batch != nullptr ? batch->first_token() : 0;
}

template <class Scalar>
void sum_over_batch(const GlobalBatch<Scalar>* batch, Index count, Scalar* numbers) {
  if (batch != nullptr) batch->sum(std::span<Scalar>(numbers, to_size(count)));
}

/// measure_importance() of the whole batch.
template <class Scalar>
void measure_importance(const Routing<Scalar>& routing, const GlobalBatch<Scalar>* batch,
                        Balance<Scalar>& balance) {
  measure_importance(routing, balance);
  if (batch == nullptr) return;
  sum_over_batch(batch, balance.importance.size(), balance.importance.data());
  batch->sum(std::span<Index>(balance.tokens_per_expert));
}

/// count_load() of the whole batch.
template <class Scalar>
void count_load(const Routing<Scalar>& routing, const GlobalBatch<Scalar>* batch,
                Balance<Scalar>& balance) {
  count_load(routing, balance);
  sum_over_batch(batch, balance.load.size(), balance.load.data());
}

}  // namespace detail
}  // namespace moe
