#pragma once

#include "moe/gates/top_k_gate.hpp"

/// \file
/// The tape of TopKGate, and configurations of it for its tests.

namespace moe::test {

template <class Scalar>
using TopKTape = typename TopKGate<Scalar>::Tape;

inline constexpr Score all_scores[] = {Score::softmax, Score::softmax_of_chosen, Score::sigmoid,
                                       Score::sqrt_softplus};

/// Groups are chosen by biased scores, then experts in them, whose scores are normalised and scaled.
inline TopKConfig in_groups(Score score) {
  return {.width = 5,
          .experts = 12,
          .top_k = 2,
          .score = score,
          .renormalise = true,
          .scale = 2.5,
          .groups = 4,
          .top_k_groups = 2,
          .group_score = GroupScore::two_best,
          .selection_bias = true};
}

/// Everything at once.
inline TopKConfig everything(Score score = Score::sigmoid) {
  TopKConfig config = in_groups(score);
  config.bias = true;
  config.jitter = 0.1;
  config.random_second = true;
  config.capacity_factor = 1;
  config.place_order = PlaceOrder::largest_weight;
  config.switch_loss_weight = 0.3;
  config.sequence_loss_weight = 0.2;
  config.sequences = 2;
  config.z_loss_weight = 0.1;
  return config;
}

}  // namespace moe::test
