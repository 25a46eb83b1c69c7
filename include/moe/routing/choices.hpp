#pragma once

#include <algorithm>

#include "moe/parallel.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// What a gate chose, before some of it is dropped: the choices of a batch and their way into
/// slots.

namespace moe::detail {

/// K choices of each token, those of token t being t·K onwards, the best first.
template <class Scalar>
struct Choices {
  Index top_k = 0;                     ///< K
  IndexedVector<Index> expert;         ///< T·K
  IndexedVector<Scalar> weight;        ///< T·K
  IndexedVector<unsigned char> keeps;  ///< T·K, 0 where dropped
  IndexedVector<Index> slot;           ///< T·K, of those kept

  Index size() const { return static_cast<Index>(expert.size()); }
  Index tokens() const { return size() / top_k; }

  /// Keeps all.
  void resize(Index tokens, Index active_experts) {
    top_k = active_experts;
    detail::resize(expert, tokens * top_k);
    detail::resize(weight, tokens * top_k);
    detail::assign(keeps, tokens * top_k, static_cast<unsigned char>(1));
  }
};

/// Fills the gate's part of a routing with the choices that are kept, experts ascending and weights
/// times `scale`, and notes the slot of each. O(T·K·log(K)).
template <class Scalar>
void make_slots(Choices<Scalar>& choices, Scalar scale, Index experts, Routing<Scalar>& routing) {
  const Index tokens = choices.tokens();
  const Index top_k = choices.top_k;
  routing.experts = experts;
  resize(routing.token_offsets, tokens + 1);
  routing.token_offsets[0] = 0;
  for (Index t = 0; t < tokens; ++t) {
    const auto begin = choices.keeps.begin() + t * top_k;
    routing.token_offsets[to_size(t) + 1] =
        routing.token_offsets[t] + std::count(begin, begin + top_k, 1);
  }
  // As large as without drops, so that a batch that drops fewer finds the memory there.
  reserve(routing.expert, choices.size());
  reserve(routing.weight, choices.size());
  resize(routing.expert, routing.token_offsets.back());
  resize(routing.weight, routing.token_offsets.back());
  resize(choices.slot, choices.size());
  parallel_for_blocks(tokens, 64, function_work(choices.size()), [&](Index first, Index count) {
    const Index* expert_of = choices.expert.data();
    Index* expert = routing.expert.data();  // at first the number of the choice
    for (Index t = first; t < first + count; ++t) {
      const Index begin = routing.token_offsets[t];
      Index end = begin;
      for (Index c = t * top_k; c < (t + 1) * top_k; ++c) {
        if (choices.keeps[c] != 0) expert[end++] = c;
      }
      std::sort(expert + begin, expert + end,
                [&](Index a, Index b) { return expert_of[a] < expert_of[b]; });
      for (Index slot = begin; slot < end; ++slot) {
        const Index c = expert[slot];
        choices.slot[c] = slot;
        routing.weight[slot] = scale * choices.weight[c];
        expert[slot] = expert_of[c];
      }
    }
  });
}

}  // namespace moe::detail
