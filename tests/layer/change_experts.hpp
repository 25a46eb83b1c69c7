#pragma once

#include <initializer_list>
#include <tuple>
#include <vector>

#include "../naive_layer.hpp"
#include "moe/gates/balanced_gate.hpp"
#include "moe/gates/expert_choice_gate.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/product_key_gate.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/layer/moe_layer.hpp"

/// \file
/// Layers with every gate, to add, copy and remove experts.

namespace moe::test::change {

using Sources = std::vector<Index>;

template <class Gate>
using LayerOf = MoELayer<Expert<FeedForward, typename Gate::Scalar>, Gate>;
using Noisy = NoisyTopKGate<double>;
using TopK = TopKGate<double>;
using Shared = SharedExpertGate<Noisy>;
using Hierarchical = HierarchicalGate<double>;
using Values = Named;

inline constexpr Index width = 5;

/// A gate's configuration for `experts` in units of Law::unit, after Law::shared that stay.
template <class Gate_, Index unit_ = 1, Index shared_ = 0>
struct Law {
  using Gate = Gate_;
  static constexpr Index unit = unit_;
  static constexpr Index shared = shared_;
};
struct NoisyLaw : Law<Noisy> {
  static Noisy::Config config(Index experts) { return {.experts = experts, .top_k = 2}; }
};
struct TopKLaw : Law<TopK> {
  static TopK::Config config(Index experts) {
    return {.experts = experts,
            .top_k = 2,
            .bias = true,
            .score = Score::sigmoid,
            .selection_bias = true,
            .jitter = 0.1};
  }
};
struct BalancedLaw : Law<BalancedGate<double>> {
  static Gate::Config config(Index experts) { return {.experts = experts, .top_k = 2}; }
};
struct ExpertChoiceLaw : Law<ExpertChoiceGate<double>> {
  static Gate::Config config(Index experts) { return {.experts = experts, .capacity_factor = 2}; }
};
struct SharedLaw : Law<Shared, 1, 2> {
  static Shared::Config config(Index experts) {
    return {.shared = 2, .gated = true, .routed = {.experts = experts - 2, .top_k = 2}};
  }
};
struct HierarchicalLaw : Law<Hierarchical, 3> {
  static Hierarchical::Config config(Index experts) {
    return {.groups = experts / 3, .group_experts = 3, .top_k_groups = 2, .top_k = 2};
  }
};
struct ProductKeyLaw : Law<ProductKeyGate<double>, 3> {
  static Gate::Config config(Index experts) {
    return {.row_keys = experts / 3, .column_keys = 3, .top_k = 3};
  }
};
struct SharedHierarchicalLaw : Law<SharedExpertGate<Hierarchical>, 3, 2> {
  static Gate::Config config(Index experts) {
    return {.shared = 2, .routed = HierarchicalLaw::config(experts - 2)};
  }
};
using Laws = std::tuple<NoisyLaw, TopKLaw, BalancedLaw, ExpertChoiceLaw, SharedLaw, HierarchicalLaw,
                        ProductKeyLaw, SharedHierarchicalLaw>;

template <class Law>
auto make_layer(Index units) {
  LayerOf<typename Law::Gate> layer({.width = width,
                                     .expert = {.hidden = 7},
                                     .gate = Law::config(Law::shared + units * Law::unit),
                                     .seed = 3});
  randomize(layer, 4, 0.5);
  return layer;
}

/// The experts of a unit.
template <class Law>
Sources experts_of(std::initializer_list<Index> units) {
  Sources experts;
  for (const Index u : units) {
    for (Index i = 0; i < Law::unit; ++i) experts.push_back(Law::shared + u * Law::unit + i);
  }
  return experts;
}

inline bool same_values(const Values& a, const Values& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [name, value] : a) {
    if (!b.contains(name) || !same_bits(value, b.at(name))) return false;
  }
  return true;
}

}  // namespace moe::test::change
