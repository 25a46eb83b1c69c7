#pragma once

#include "moe/indexed_vector.hpp"
#include "moe/matrix.hpp"

/// \file
/// The result of a gate: the slots, token by token.

namespace moe {

/// The slots of a batch of T tokens (rows of x), as a gate made them; a slot is one (token, expert) pair.
/// Token t has the slots token_offsets[t], ..., token_offsets[t + 1] − 1; there may be none.
template <class Scalar>
struct Routing {
  Index experts = 0;                   ///< E
  IndexedVector<Index> token_offsets;  ///< T + 1
  IndexedVector<Index> expert;         ///< S, the expert of each slot, ascending within a token
  IndexedVector<Scalar> weight;        ///< S, the gate's weight G of each slot

  /// T
  Index tokens() const {
    return token_offsets.empty() ? 0 : static_cast<Index>(token_offsets.size()) - 1;
  }
  Index slots() const { return static_cast<Index>(expert.size()); }  ///< S
  /// The slots of token t.
  Range slots_of_token(Index t) const {
    return {token_offsets[t], token_offsets[t + 1] - token_offsets[t]};
  }
};

namespace detail {

/// Throws std::invalid_argument when a routing contradicts itself: a number of weights that is not S,
/// offsets that do not ascend from 0 to S, an expert outside [0, E), or experts of a token that do not
/// ascend. O(S + T).
template <class Scalar>
void check_routing(const Routing<Scalar>& routing) {
  const Index slots = routing.slots();
  require(routing.weight.size() == routing.expert.size(), "Routing.weight has ",
          routing.weight.size(), " entries for ", slots, " slots");
  require(!routing.token_offsets.empty() && routing.token_offsets.front() == 0 &&
              routing.token_offsets.back() == slots,
          "Routing.token_offsets must run from 0 to the number of slots, ", slots);
  for (Index t = 0; t < routing.tokens(); ++t) {
    require(routing.token_offsets[t] <= routing.token_offsets[t + 1],
            "Routing.token_offsets descends at token ", t + 1);
  }
  for (const Index e : routing.expert) {
    require(e >= 0 && e < routing.experts, "Routing.expert = ", e, ", must be in [0, ",
            routing.experts, ")");
  }
  for (Index t = 0; t < routing.tokens(); ++t) {
    const Range of_token = routing.slots_of_token(t);
    for (Index s = of_token.first + 1; s < of_token.first + of_token.count; ++s) {
      require(routing.expert[s - 1] < routing.expert[s], "Routing.expert does not ascend at slot ",
              s, " of token ", t);
    }
  }
}

}  // namespace detail
}  // namespace moe
