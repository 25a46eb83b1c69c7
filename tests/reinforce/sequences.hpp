#pragma once

#include <span>
#include <vector>

#include "policies.hpp"

/// \file
/// Inputs, references and rewards of the tests of Reinforce.

namespace moe::test {

template <class Scalar = double>
using Helper = Reinforce<SmallPolicy<Scalar>>;
using AnyBaseline = Helper<>::Baseline;
using References = std::vector<std::vector<Index>>;

inline const std::vector<Index> inputs{2, 0, 3};
inline const References references{{1, 2}, {}, {2, 2, 1}};

/// By step and symbol, so that all sequences earn different sums.
inline double reward(Index input, std::span<const Index> sequence, bool done) {
  return 0.7 * static_cast<double>(sequence.back()) - 0.2 * static_cast<double>(sequence.size()) +
         0.1 * static_cast<double>(input) + (done ? 1 : 0);
}

inline double no_reward(Index, std::span<const Index>, bool) { return 0; }

}  // namespace moe::test
