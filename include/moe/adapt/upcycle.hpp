#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/experts/expert_change.hpp"
#include "moe/experts/feed_forward.hpp"
#include "moe/gates/gate.hpp"
#include "moe/layer/changed_experts.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/random.hpp"

/// \file
/// Makes a layer whose experts are copies or slices of a dense network.
///
/// [K23] A. Komatsuzaki, J. Puigcerver, J. Lee-Thorp, C. Riquelme Ruiz, B. Mustafa, J. Ainslie, Y. Tay,
/// M. Dehghani, N. Houlsby, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", ICLR
/// 2023 (arXiv 2212.05055).
/// [H24] E. He, A. Khattar, R. Prenger, V. Korthikanti, Z. Yan, T. Liu, S. Fan, A. Aithal, M. Shoeybi,
/// B. Catanzaro, "Upcycling Large Language Models into Mixture of Experts", 2024 (arXiv 2410.07524).

namespace moe {

/// The configuration of upcycle(), for a dense network of width D with H hidden units.
template <class Gate>
struct UpcycleConfig {
  typename Gate::Config gate{};  ///< has the number of experts, E; its width is 0 or D
  /// G, the number of slices of the network, of H/G hidden units each; every slice is an expert. At
  /// least 1. Must divide H and E, and, if the gate's Config (or its `routed` Config) has these fields, top_k
  /// and the experts of a group.
  Index slices = 1;
  /// Standard deviation of the normal noise on the parameters of all experts but the first G, finite and
  /// at least 0. At 0 all copies are equal, and only the gate makes them differ in training.
  double noise_stddev = 0;
  Seed seed;  ///< of the gate's initial weights and noise, and of the noise on copies
};

namespace detail {

/// One of several equal parts of the hidden units of a network, as a network of its own. W_2 is
/// multiplied by the number of parts, since the gate will give each of them 1/slices of the weight.
/// `part` is any network of the shape of a slice.
template <class Scalar>
FeedForward<Scalar> slice_of(const FeedForward<Scalar>& dense, Index slice, Index slices,
                             FeedForward<Scalar> part) {
  const Index hidden = part.config().hidden;
  const Index first = slice * hidden;
  std::vector<const Parameter<Scalar>*> whole;
  walk_together(part, dense, whole, [&](auto& p, const auto& from) {
    p.trained = from.trained;
    if (p.value.rows() != from.value.rows()) {
      p.value = static_cast<Scalar>(slices) * from.value.middleRows(first, hidden);
    } else if (p.value.cols() != from.value.cols()) {
      p.value = from.value.middleCols(first, hidden);
    } else {
      p.value = from.value;
    }
  });
  return part;
}

/// Gives the experts of one copy of the network equal scores: those of the first of them.
template <class Gate>
void tie_slices(Gate& gate, Index slices, std::uint64_t seed) {
  if (slices == 1) return;
  if constexpr (ChangesExperts<Gate>) {
    std::vector<Index> sources = same_sources(gate.experts());
    for (Index& source : sources) source -= source % slices;
    const ExpertSources all("upcycle", std::move(sources), gate.experts());
    try {
      gate.change_experts(all, seed, 0.0);
    } catch (const std::invalid_argument& error) {
      require(false, "upcycle: slices = ", slices, ", must be 1 with this gate: ", error.what());
    }
  } else {
    require(false, "upcycle: slices = ", slices,
            ", must be 1 with a gate that has no change_experts()");
  }
}

inline void check_slices_divide(Index slices, std::string_view of, Index number) {
  require(number % slices == 0, "upcycle: slices = ", slices, ", must divide ", of, " = ", number);
}

/// Throws std::invalid_argument unless a gate with this number of experts chooses all slices of a copy
/// together. `gate` is its Config, and `name` is in front of the names of the fields.
template <class Config>
void check_gate_slices(const Config& gate, const std::string& name, Index experts, Index slices) {
  check_slices_divide(slices, name + "experts", experts);
  if constexpr (requires { Index{gate.top_k}; }) {
    check_slices_divide(slices, name + "top_k", gate.top_k);
  }
  if constexpr (requires { Index{gate.groups}; }) {
    check_slices_divide(slices, name + "experts / groups", experts / gate.groups);
  }
  if constexpr (requires { gate.random_second, gate.drawn_second; }) {
    require(slices == 1 || !gate.random_second, "upcycle: slices = ", slices, ", must be 1 with ",
            name, "random_second, which drops one slice of a copy");
    require(slices == 1 || !gate.drawn_second, "upcycle: slices = ", slices, ", must be 1 with ",
            name, "drawn_second, which draws a slice of another copy");
  }
  if constexpr (requires { Index{gate.shared}, gate.routed; }) {
    check_gate_slices(gate.routed, name + "routed.", experts - gate.shared, slices);
  }
}

/// Throws std::invalid_argument unless the network can be cut into these slices and the gate can
/// choose all slices of a copy together.
template <class Gate>
void check_slices(const FeedForwardConfig& dense, const UpcycleConfig<Gate>& config,
                  Index experts) {
  const Index slices = config.slices;
  require(slices >= 1, "upcycle: slices = ", slices, ", must be at least 1");
  check_slices_divide(slices, "the network's hidden", dense.hidden);
  check_gate_slices(config.gate, "the gate's ", experts, slices);
  require(slices == 1 || !dense.weighted_input, "upcycle: slices = ", slices,
          ", must be 1 for a network with weighted_input");
}

}  // namespace detail

/// A layer whose experts are copies of a dense network [K23] or slices of it [H24], and whose y is the
/// network's output before training:
///
///     auto layer = moe::upcycle<moe::TopKGate<>>(
///         dense, {.gate = {.experts = 8, .top_k = 2, .renormalise = true}, .seed = 1});
///
/// Expert e is a copy of slice e mod G, with W_2 multiplied by G and b_2 as it is. The G experts
/// from a multiple of G on are one copy of the network. Where G > 1 they start with the same
/// scores, those that the gate drew for the first of them, so a token that gets one of them gets
/// all, with equal weights ("virtual groups" [H24]). Hence, without noise and up to rounding,
///
///     y_t = (sum of the weights of t's slots)·dense(x_t)
///
/// which is dense(x_t) where weights add up to 1:
/// - NoisyTopKGate, HierarchicalGate, ProductKeyGate, and TopKGate with `renormalise` or
///   Score::softmax_of_chosen, a renormalise_norm of 1, a renormalise_epsilon of 0 and a scale of 1. With
///   Score::softmax and without these, the weights of a TopKGate add up to about K/E at first; a scale of
///   E/K makes that about 1.
/// - BalancedGate, for the tokens that an expert took.
/// - SharedExpertGate, if the weights of the shared experts (`scale` each, at first scale/2 if `gated`) and
///   those of the wrapped gate add up to 1. ExpertChoiceGate's weights do not.
///
/// Two things break the sum of slices. In a noisy gate's training passes noise separates experts of equal
/// scores, so a token may get one slice twice and another one not at all; evaluate() has no noise.
/// And where single slots of a token are dropped, as by a capacity, slices are missing. TopKGate's
/// random_second and drawn_second would break it in every training pass, so G must be 1 with them. Where
/// the network has weighted_input, the weight of a slot multiplies x: y is the network's where each
/// token has one slot, of weight 1, and G must be 1.
///
/// The experts' configuration is the network's, with H/G hidden units; parameters that are not
/// `trained` in the network are not trained in the copies either. mpi::scatter_parameters() spreads
/// such a layer over ranks. Throws std::invalid_argument for a field out of range, as the gate does
/// for its Config, where a parameter of the network has another shape than its Config says, and for
/// G > 1 where the network has weighted_input, the second choice is random or the gate cannot give two
/// experts the same score: HierarchicalGate, ProductKeyGate, SharedExpertGate with shared experts, and a gate without
/// change_experts().
template <class Gate>
MoELayer<Expert<FeedForward, typename Gate::Scalar>, Gate> upcycle(
    const FeedForward<typename Gate::Scalar>& dense, const UpcycleConfig<Gate>& config) {
  using Network = Expert<FeedForward, typename Gate::Scalar>;
  using Layer = MoELayer<Network, Gate>;
  detail::ChangeDraws{config.seed, config.noise_stddev}.check("upcycle");
  detail::check_shapes(dense, "upcycle");
  typename Layer::Config of_layer{.width = dense.config().width,
                                  .expert = dense.config(),
                                  .gate = config.gate,
                                  .seed = config.seed};
  of_layer = Layer::completed(of_layer);
  Gate gate(of_layer.gate, detail::gate_seed(config.seed));
  const Index experts = gate.experts();
  detail::check_slices(dense.config(), config, experts);
  detail::tie_slices(gate, config.slices, config.seed);
  if constexpr (detail::ChangesExperts<Gate>) of_layer.gate = gate.config();  // completed too
  of_layer.expert.hidden /= config.slices;

  const auto zeros = FeedForward<typename Gate::Scalar>::zeros(of_layer.expert);
  std::vector<FeedForward<typename Gate::Scalar>> slices;
  for (Index s = 0; s < config.slices; ++s) {
    slices.push_back(detail::slice_of(dense, s, config.slices, zeros));
  }
  std::vector<Network> copies;
  copies.reserve(detail::to_size(experts));
  for (Index e = 0; e < experts; ++e) {
    copies.emplace_back(slices[detail::to_size(e % config.slices)], of_layer.width);
    if (e < config.slices) continue;
    detail::add_copy_noise(copies.back(), config.noise_stddev,
                           derive_seed(config.seed, static_cast<std::uint64_t>(e) + 1));
  }
  return Layer(of_layer, std::move(gate), std::move(copies));
}

}  // namespace moe
