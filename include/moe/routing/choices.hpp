#pragma once

#include <algorithm>

#include "moe/parallel.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// The choices of a gate for a batch, some of which may be dropped, and the slots made of the others.

namespace moe::detail {

/// K choices of each token: those of token t are t·K, ..., t·K + K − 1, the best first.
template <class Scalar>
struct Choices {
  Index top_k = 0;                     ///< K
  IndexedVector<Index> expert;         ///< T·K
  IndexedVector<Scalar> weight;        ///< T·K
  IndexedVector<unsigned char> keeps;  ///< T·K, 0 for dropped choices, else 1
  IndexedVector<Index> slot;           ///< T·K, the slot of each choice that is not dropped

  Index size() const { return static_cast<Index>(expert.size()); }
  Index tokens() const { return size() / top_k; }

  /// Makes room for `tokens` tokens, with no choice dropped.
  void resize(Index tokens, Index chosen) {
    top_k = chosen;
    detail::resize(expert, tokens * top_k);
    detail::resize(weight, tokens * top_k);
    detail::assign(keeps, tokens * top_k, static_cast<unsigned char>(1));
  }
};

/// Fills a routing with the choices that are not dropped, in ascending order of experts, with weights
/// times `scale`; sets the slot of each choice. O(T·K·log(K)).
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
  // As large as without drops, so that a batch with fewer drops need not allocate.
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
