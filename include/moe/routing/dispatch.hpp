#pragma once

#include <span>

#include "moe/indexed_vector.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// The slots sorted by expert, and the gradients of their weights in the order of the tokens again.

namespace moe {

/// The slots of a Routing sorted by expert, and those of an expert by token. Expert e has the positions
/// offsets[e], ..., offsets[e + 1] − 1.
template <class Scalar>
struct Dispatch {
  IndexedVector<Index> offsets;          ///< E + 1
  IndexedVector<Index> token;            ///< S, the token at each position
  IndexedVector<Scalar> weight;          ///< S, its weight
  IndexedVector<Index> sorted_slot;      ///< S, the slot at each position
  IndexedVector<Index> sorted_position;  ///< S, the position of each slot

  Index experts() const {
    return offsets.empty() ? 0 : static_cast<Index>(offsets.size()) - 1;
  }                                                                 ///< E
  Index slots() const { return static_cast<Index>(token.size()); }  ///< S
  /// The number of slots of expert e.
  Index slots_of(Index e) const { return offsets[e + 1] - offsets[e]; }
};

namespace detail {

/// Where each expert's positions start when slots are sorted by expert: offsets (E + 1). O(S + E).
inline void count_offsets(std::span<const Index> expert, Index experts,
                          IndexedVector<Index>& offsets) {
  assign(offsets, experts + 1, Index{0});
  for (const Index e : expert) ++offsets[e + 1];
  for (Index e = 1; e <= experts; ++e) offsets[e] += offsets[e - 1];
}

/// The slot at each position: a stable sort of the slots by expert, by counting. O(S + E).
inline void sort_slots(std::span<const Index> expert, IndexedVector<Index>& offsets,
                       IndexedVector<Index>& sorted_slot) {
  resize(sorted_slot, static_cast<Index>(expert.size()));
  // Each offset walks to the start of the next expert and is then shifted back into place, which
  // spares a second array of E cursors.
  for (std::size_t slot = 0; slot < expert.size(); ++slot) {
    sorted_slot[offsets[expert[slot]]++] = static_cast<Index>(slot);
  }
  for (std::size_t e = offsets.size() - 1; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

}  // namespace detail

/// Sorts the slots by expert. Throws std::invalid_argument when the routing contradicts itself: a number of
/// weights that is not S, offsets that do not ascend from 0 to S, an expert outside [0, E), or experts of a
/// token that do not ascend. O(S + E + T).
template <class Scalar>
void sort_by_expert(const Routing<Scalar>& routing, Dispatch<Scalar>& dispatch) {
  detail::check_routing(routing);
  const Index slots = routing.slots();
  detail::count_offsets(routing.expert, routing.experts, dispatch.offsets);
  detail::sort_slots(routing.expert, dispatch.offsets, dispatch.sorted_slot);
  detail::resize(dispatch.sorted_position, slots);
  detail::resize(dispatch.token, slots);
  detail::resize(dispatch.weight, slots);
  for (Index position = 0; position < slots; ++position) {
    const Index slot = dispatch.sorted_slot[position];
    dispatch.sorted_position[slot] = position;
    dispatch.weight[position] = routing.weight[slot];
  }
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index s = routing.token_offsets[t]; s < routing.token_offsets[t + 1]; ++s) {
      dispatch.token[dispatch.sorted_position[s]] = t;
    }
  }
}

/// The backward of the weights: dweight (S, by slot) from the gradients sorted by expert (S).
template <class Scalar>
void sort_by_expert_backward(const Dispatch<Scalar>& dispatch, std::span<const Scalar> by_position,
                             IndexedVector<Scalar>& dweight) {
  detail::resize(dweight, dispatch.slots());
  for (Index position = 0; position < dispatch.slots(); ++position) {
    dweight[dispatch.sorted_slot[position]] = by_position[detail::to_size(position)];
  }
}

}  // namespace moe
