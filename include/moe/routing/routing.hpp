#pragma once

#include <span>
#include <vector>

#include "moe/matrix.hpp"

/// \file
/// Who goes where: the slots that a gate made, and the order that groups them by expert.

namespace moe {

/// The slots of a batch, a slot being one (token, expert) pair.
///
/// A gate fills the first part, token by token. The slots of token t are token_offsets[t] up to
/// token_offsets[t + 1]; there may be none. group_by_expert() fills the second part, in which a
/// slot has a row: the rows of expert e are expert_offsets[e] up to expert_offsets[e + 1], in the
/// order of their tokens.
template <class Scalar>
struct Routing {
  Index experts = 0;
  std::vector<Index> token_offsets;  ///< T + 1
  std::vector<Index> expert;         ///< S, the expert of each slot, ascending within a token
  std::vector<Scalar> weight;        ///< S, the gate's weight G of each slot

  std::vector<Index> expert_offsets;  ///< E + 1
  std::vector<Index> sorted_slot;        ///< S, the slot of each row
  std::vector<Index> sorted_token;       ///< S, the token of each row
  std::vector<Index> sorted_position;        ///< S, the row of each slot

  Index tokens() const {
    return token_offsets.empty() ? 0 : static_cast<Index>(token_offsets.size()) - 1;
  }
  Index slots() const { return static_cast<Index>(expert.size()); }
  Index slots_of(Index e) const {
    return expert_offsets[detail::to_size(e) + 1] - expert_offsets[detail::to_size(e)];
  }
};

namespace detail {

/// Where each expert's rows start when slots are grouped by expert: offsets (E + 1). O(S + E).
inline void count_offsets(std::span<const Index> expert, Index experts,
                          std::vector<Index>& offsets) {
  assign(offsets, experts + 1, Index{0});
  for (const Index e : expert) ++offsets[to_size(e) + 1];
  for (std::size_t e = 1; e < offsets.size(); ++e) offsets[e] += offsets[e - 1];
}

/// The slot of each row: a stable sort of the slots by expert, by counting. O(S + E).
inline void sort_slots(std::span<const Index> expert, std::vector<Index>& offsets,
                       std::vector<Index>& sorted_slot) {
  resize(sorted_slot, static_cast<Index>(expert.size()));
  // Each offset walks to the start of the next expert and is then shifted back into place, which
  // spares a second array of E cursors.
  for (std::size_t slot = 0; slot < expert.size(); ++slot) {
    sorted_slot[to_size(offsets[to_size(expert[slot])]++)] = static_cast<Index>(slot);
  }
  for (std::size_t e = offsets.size() - 1; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

}  // namespace detail

/// Groups the slots by expert. Throws std::invalid_argument when the gate's part contradicts
/// itself: offsets that do not ascend from 0 to S, an expert outside [0, E), or experts of a token
/// that do not ascend. O(S + E).
template <class Scalar>
void group_by_expert(Routing<Scalar>& routing) {
  using detail::require;
  using detail::to_size;
  const Index slots = routing.slots();
  require(routing.weight.size() == routing.expert.size(), "Routing.weight has ",
          routing.weight.size(), " entries for ", slots, " slots");
  require(!routing.token_offsets.empty() && routing.token_offsets.front() == 0 &&
              routing.token_offsets.back() == slots,
          "Routing.token_offsets must run from 0 to the number of slots, ", slots);
  for (std::size_t t = 1; t < routing.token_offsets.size(); ++t) {
    require(routing.token_offsets[t - 1] <= routing.token_offsets[t],
            "Routing.token_offsets descends at token ", t);
  }
  for (const Index e : routing.expert) {
    require(e >= 0 && e < routing.experts, "Routing.expert = ", e, " with ", routing.experts,
            " experts");
  }

  for (std::size_t t = 0; t + 1 < routing.token_offsets.size(); ++t) {
    for (Index s = routing.token_offsets[t] + 1; s < routing.token_offsets[t + 1]; ++s) {
      require(routing.expert[to_size(s - 1)] < routing.expert[to_size(s)],
              "Routing.expert does not ascend at slot ", s, " of token ", t);
    }
  }

  detail::count_offsets(routing.expert, routing.experts, routing.expert_offsets);
  detail::sort_slots(routing.expert, routing.expert_offsets, routing.sorted_slot);
  detail::resize(routing.sorted_position, slots);
  detail::resize(routing.sorted_token, slots);
  for (Index row = 0; row < slots; ++row) {
    routing.sorted_position[to_size(routing.sorted_slot[to_size(row)])] = row;
  }
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index s = routing.token_offsets[to_size(t)]; s < routing.token_offsets[to_size(t) + 1];
         ++s) {
      routing.sorted_token[to_size(routing.sorted_position[to_size(s)])] = t;
    }
  }
}

}  // namespace moe
