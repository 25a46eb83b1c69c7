#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "moe/parallel.hpp"
#include "moe/routing/dispatch.hpp"
#include "moe/routing/select_largest.hpp"
#include "moe/routing/shared_batch.hpp"
#include "moe/routing/shared_selection.hpp"

/// \file
/// Experts choose tokens: each takes those that have the largest scores in its column.

namespace moe::detail {

/// The number of tokens that each of E experts takes if a token has `per_token` experts on average:
/// per_token·T/E rounded down, but at least one if there are tokens. (The factor 1 + 1e-12 gives the
/// whole number if only rounding errors in per_token put the share below it.)
inline Index tokens_to_take(double per_token, Index tokens, Index experts) {
  const double share = per_token * static_cast<double>(tokens) / static_cast<double>(experts);
  return std::min(tokens, std::max(Index{1}, static_cast<Index>(share * (1 + 1e-12))));
}

/// Scratch of choose_tokens().
template <class Scalar>
struct TokenChoice {
  IndexedVector<Index> taken;             ///< S, the tokens of expert 0, those of expert 1, ...
  IndexedVector<Index> order;             ///< S, the places in `taken` by token
  IndexedVector<Matrix<Scalar>> columns;  ///< one per worker: some columns of the scores, as rows
  SharedSelection<Scalar> shared;         ///< where processes share a batch
};

/// Makes slots: each expert gets the `count` tokens with the largest values in its column of `scores`
/// (T x E). 1 <= count <= T, or both are 0. Ties go to the lower token, NaN counts as -infinity.
/// Resizes the weights, whose values the gate sets. O(T·E) for scores in random order and a small
/// count, see select_largest().
template <class Scalar>
void choose_tokens(const Matrix<Scalar>& scores, Index count, TokenChoice<Scalar>& choice,
                   Routing<Scalar>& routing) {
  const Index tokens = scores.rows();
  const Index experts = scores.cols();
  MOE_ASSERT(count <= tokens && (count >= 1 || tokens == 0));
  resize(choice.taken, experts * count);
  // Columns are far apart in memory, so a task takes all those that share a cache line.
  constexpr Index strip = cache_line<Scalar>;
  if (static_cast<Index>(choice.columns.size()) < worker_count()) {
    resize(choice.columns, worker_count());
  }
  for (auto& columns : choice.columns) resize(columns, strip, padded_stride<Scalar>(tokens));

  parallel_for((experts + strip - 1) / strip, element_work(2 * scores.size()),
               [&](Index task, Index worker) {
                 const Index first = task * strip;
                 const Index width = std::min(strip, experts - first);
                 Matrix<Scalar>& columns = choice.columns[worker];
                 for (Index t = 0; t < tokens; ++t) {
                   const Scalar* row = row_data(scores, t) + first;
                   for (Index i = 0; i < width; ++i) columns(i, t) = row[i];
                 }
                 for (Index i = 0; i < width; ++i) {
                   select_largest(row_data(columns, i), tokens, count,
                                  choice.taken.data() + (first + i) * count);
                 }
               });

  // A stable sort by token leaves the experts of each ascending.
  count_offsets(choice.taken, tokens, routing.token_offsets);
  sort_slots(choice.taken, routing.token_offsets, choice.order);
  routing.experts = experts;
  resize(routing.expert, experts * count);
  resize(routing.weight, experts * count);
  for (std::size_t slot = 0; slot < routing.expert.size(); ++slot) {
    routing.expert[slot] = choice.order[slot] / count;
  }
}

/// The same if the rows of `scores` may be a part of a larger batch: experts choose among the tokens of
/// all processes; the slots are those of this process's tokens.
template <class Scalar>
void choose_tokens(const Matrix<Scalar>& scores, Index count, const SharedBatch* batch,
                   TokenChoice<Scalar>& choice, Routing<Scalar>& routing) {
  if (batch == nullptr) return choose_tokens(scores, count, choice, routing);
  const Index tokens = scores.rows();
  const Index experts = scores.cols();
  choice.shared.find(experts, count, *batch, [&](auto&& visit) {
    parallel_for_blocks(experts, cache_line<Scalar>, element_work(2 * scores.size()),
                        [&](Index first, Index width) {
                          for (Index t = 0; t < tokens; ++t) {
                            const Scalar* row = row_data(scores, t);
                            for (Index e = first; e < first + width; ++e) visit(e, row[e]);
                          }
                        });
  });
  routing.experts = experts;
  resize(routing.token_offsets, tokens + 1);
  routing.token_offsets[0] = 0;
  routing.expert.clear();
  for (Index t = 0; t < tokens; ++t) {
    const Scalar* row = row_data(scores, t);
    for (Index e = 0; e < experts; ++e) {
      if (choice.shared.takes(e, row[e])) routing.expert.push_back(e);
    }
    routing.token_offsets[t + 1] = routing.slots();
  }
  resize(routing.weight, routing.slots());
}

}  // namespace moe::detail
