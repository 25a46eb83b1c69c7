#pragma once

#include "moe/gates/top_k_gate.hpp"

/// \file
/// Configurations of TopKGate for its tests.

namespace moe::test {

inline constexpr Score all_scores[] = {Score::softmax, Score::softmax_of_chosen, Score::sigmoid};

/// Everything at once.
inline TopKConfig everything(Score score = Score::sigmoid) {
  return {.width = 5,
          .experts = 12,
          .top_k = 2,
          .score = score,
          .renormalise = true,
          .scale = 2.5,
          .groups = 4,
          .top_k_groups = 2,
          .group_score = GroupScore::two_best,
          .selection_bias = true,
          .jitter = 0.1,
          .random_second = true,
          .capacity_factor = 1,
          .place_order = PlaceOrder::largest_weight,
          .switch_loss_weight = 0.3,
          .sequence_loss_weight = 0.2,
          .sequences = 2,
          .z_loss_weight = 0.1};
}

}  // namespace moe::test
