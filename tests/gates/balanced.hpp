#pragma once

#include <algorithm>

#include "moe/gates/balanced_gate.hpp"
#include "token_choice_checks.hpp"

/// \file
/// What the tests of BalancedGate need.

namespace moe::test {

/// m, the tokens that every expert takes in training.
inline Index taken(const BalancedGate<double>::Config& config, Index tokens) {
  return std::max<Index>(tokens == 0 ? 0 : 1, config.top_k * tokens / config.experts);
}

}  // namespace moe::test
