#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../naive_layer.hpp"
#include "../sanitized.hpp"
#include "gates.hpp"
#include "moe/gates/balanced_gate.hpp"
#include "moe/gates/expert_choice_gate.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/noisy_top_k_gate.hpp"
#include "moe/gates/product_key_gate.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "top_k.hpp"

/// \file
/// The gates under one interface, for tests of what each of them must do.

namespace moe::test {

/// What is the same for most gates; a Law has besides
///     config()
///     choices(tape)    what the gate chose, equal where a step of differences crossed no tie
/// and, where the gate has noise, drawn_noise(gate, seed, x, pass), the numbers of Pass::noise that the
/// pass would draw.
template <class Gate_>
struct GateLaw {
  using Gate = Gate_;
  using Scalar = typename Gate::Scalar;
  using Config = typename Gate::Config;
  using Tape = typename Gate::Tape;
  using LossWeights = typename detail::LossWeightsOf<Gate>::type;
  using Weight = double LossWeights::*;

  static constexpr const char* name = Gate::name;  ///< the class in messages
  static constexpr std::uint64_t seed = 7;
  static constexpr const char* loss_name = name;  ///< the class in messages of loss weights
  static constexpr std::array<std::pair<const char*, Weight>, 0> loss_weights{};
  static constexpr bool whole_batch = false;    ///< a token's choice depends on the other tokens
  static constexpr Index sequences = 1;         ///< of a batch whose loss by sequence is on
  static constexpr bool infinity_shows = true;  ///< a token with infinity in x has weights of NaN
  static constexpr Index shared_experts = 0;

  /// The rows that are valid or not together, so that the valid ones are sequences of equal length.
  static Index flag_of_row(Index row, Index) { return row / sequences; }
  /// Changes random parameters so that a gate is not far from what it is for.
  static void prepare(Gate&) {}
  static std::vector<double> drawn_noise(const Gate&, std::uint64_t, const Matrix<Scalar>&,
                                         const Pass&) {
    return {};
  }
};

template <class Scalar>
std::vector<Index> as_vector(const IndexedVector<Scalar>& values) {
  return {values.begin(), values.end()};
}
inline std::vector<Index> joined(std::vector<Index> a, const std::vector<Index>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// With the losses of importance and load.
template <class Gate>
struct BalanceLossLaw : GateLaw<Gate> {
  using typename GateLaw<Gate>::LossWeights;
  static constexpr std::array loss_weights{std::pair{"importance", &LossWeights::importance},
                                           std::pair{"load", &LossWeights::load}};
};

template <class Scalar, bool noise = true>
struct NoisyTopKLaw : BalanceLossLaw<NoisyTopKGate<Scalar>> {
  using Gate = NoisyTopKGate<Scalar>;
  static typename Gate::Config config() {
    return {.width = 5,
            .experts = 7,
            .top_k = 2,
            .noise = noise,
            .importance_weight = 0.7,
            .load_weight = 1.3};
  }
  static std::vector<Index> choices(const typename Gate::Tape& tape) {
    return as_vector(tape.best);
  }
  static std::vector<double> drawn_noise(const Gate& gate, std::uint64_t, const Matrix<Scalar>& x,
                                         const Pass& pass) {
    if (!noise) return {};
    typename Gate::Tape tape;
    gate.forward(x, tape, pass);
    return {tape.noise.data(), tape.noise.data() + tape.noise.size()};
  }
};

template <class Scalar>
struct HierarchicalLaw : BalanceLossLaw<HierarchicalGate<Scalar>> {
  using Gate = HierarchicalGate<Scalar>;
  static typename Gate::Config config() {
    return {.width = 5,
            .groups = 3,
            .group_experts = 4,
            .top_k_groups = 2,
            .top_k = 2,
            .importance_weight = 0.7,
            .load_weight = 1.3};
  }
  static std::vector<Index> choices(const typename Gate::Tape& tape) {
    return joined(as_vector(tape.primary.best), as_vector(tape.secondary.best));
  }
  /// NaN for the groups that are not chosen, whose noise is not used.
  static std::vector<double> drawn_noise(const Gate& gate, std::uint64_t, const Matrix<Scalar>& x,
                                         const Pass& pass) {
    const typename Gate::Config& c = gate.config();
    typename Gate::Tape tape;
    gate.forward(x, tape, pass);
    Matrix<double> drawn = Matrix<double>::Constant(x.rows(), gate.noise_columns(), std::nan(""));
    drawn.leftCols(c.groups) = tape.primary.noise.template cast<double>();
    for (Index i = 0; i < c.groups; ++i) {
      for (Index row = tape.groups.offsets[i]; row < tape.groups.offsets[i + 1]; ++row) {
        drawn.block(tape.groups.token[row], c.groups + i * c.group_experts, 1, c.group_experts) =
            tape.secondary.noise.row(row).template cast<double>();
      }
    }
    return {drawn.data(), drawn.data() + drawn.size()};
  }
};

template <class Scalar>
struct ProductKeyLaw : BalanceLossLaw<ProductKeyGate<Scalar>> {
  using Gate = ProductKeyGate<Scalar>;
  static typename Gate::Config config() {
    return {.width = 5,
            .row_keys = 4,
            .column_keys = 5,
            .top_k = 3,
            .importance_weight = 0.7,
            .load_weight = 1.3};
  }
  static std::vector<Index> choices(const typename Gate::Tape& tape) {
    return joined(joined(as_vector(tape.rows.best), as_vector(tape.columns.best)),
                  as_vector(tape.routing.expert));
  }
  static std::vector<double> drawn_noise(const Gate& gate, std::uint64_t, const Matrix<Scalar>& x,
                                         const Pass& pass) {
    typename Gate::Tape tape;
    gate.forward(x, tape, pass);
    Matrix<double> drawn(x.rows(), gate.noise_columns());
    drawn << tape.rows.noise.template cast<double>(), tape.columns.noise.template cast<double>();
    return {drawn.data(), drawn.data() + drawn.size()};
  }
};

/// What is the same for all configurations of TopKGate.
template <class Scalar>
struct TopKLaw : GateLaw<TopKGate<Scalar>> {
  using Gate = TopKGate<Scalar>;
  using typename GateLaw<Gate>::LossWeights;
  static constexpr std::array loss_weights{std::pair{"switch_loss", &LossWeights::switch_loss},
                                           std::pair{"sequence", &LossWeights::sequence},
                                           std::pair{"z", &LossWeights::z}};
  static std::vector<Index> choices(const typename Gate::Tape& tape) {
    return joined(as_vector(tape.choices.expert), as_vector(tape.choices.keeps));
  }
  static std::vector<double> drawn_noise(const Gate& gate, std::uint64_t seed,
                                         const Matrix<Scalar>& x, const Pass& pass) {
    const auto word = [&](std::uint64_t stream, Index row, Index i) {
      const auto words = detail::noise_words(derive_seed(seed, stream), pass.key(), row, i / 4);
      return static_cast<double>(uniform(words[static_cast<std::size_t>(i % 4)]));
    };
    std::vector<double> drawn;
    for (Index row = 0; row < x.rows(); ++row) {
      for (Index i = 0; gate.config().jitter > 0 && i < x.cols(); ++i) {
        drawn.push_back(2 * word(1, row, i) - 1);
      }
      for (Index i = 0; gate.config().drawn_second && i < gate.experts(); ++i) {
        const auto words = detail::noise_words(derive_seed(seed, 3), pass.key(), row, i / 4);
        drawn.push_back(
            static_cast<double>(standard_gumbel(words[static_cast<std::size_t>(i % 4)])));
      }
      if (gate.config().random_second) drawn.push_back(word(2, row, 0));
    }
    return drawn;
  }
};

template <class Scalar>
struct SoftmaxLaw : TopKLaw<Scalar> {
  static constexpr Index sequences = 2;
  static Index flag_of_row(Index row, Index) { return row / sequences; }
  static TopKConfig config() {
    return {.width = 5,
            .experts = 6,
            .top_k = 2,
            .bias = true,
            .switch_loss_weight = 0.7,
            .sequence_loss_weight = 0.4,
            .sequences = sequences,
            .z_loss_weight = 0.3};
  }
};
template <class Scalar>
struct SigmoidLaw : TopKLaw<Scalar> {
  static constexpr bool whole_batch = true;
  static constexpr bool infinity_shows = false;
  static TopKConfig config() {
    TopKConfig config = in_groups(Score::sigmoid);
    config.top_k = 3;
    config.capacity_factor = 0.9;
    config.evaluation_capacity_factor = 0.7;
    config.place_order = PlaceOrder::first_choices;
    config.switch_loss_weight = 0.7;
    config.switch_count = SwitchCount::per_token;
    config.z_loss_weight = 0.2;
    return config;
  }
};
template <class Scalar>
struct SoftmaxOfChosenLaw : TopKLaw<Scalar> {
  static constexpr bool whole_batch = true;
  static constexpr Index sequences = 3;
  static Index flag_of_row(Index row, Index rows) { return row % (rows / sequences); }
  static TopKConfig config() {
    return {.width = 5,
            .experts = 6,
            .top_k = 2,
            .score = Score::softmax_of_chosen,
            .drawn_second = true,
            .capacity = 2,
            .place_order = PlaceOrder::largest_weight,
            .sequence_loss_weight = 0.3,
            .switch_count = SwitchCount::first_choice,
            .sequences = sequences,
            .row_order = RowOrder::sequence_major};
  }
};
template <class Scalar>
struct JitterLaw : TopKLaw<Scalar> {
  static TopKConfig config() {
    return {.width = 5,
            .experts = 6,
            .top_k = 2,
            .bias = true,
            .renormalise = true,
            .jitter = 0.2,
            .random_second = true,
            .switch_loss_weight = 0.5,
            .z_loss_weight = 0.2};
  }
};

template <class Scalar>
struct RootLaw : TopKLaw<Scalar> {
  static constexpr bool whole_batch = true;
  static constexpr bool infinity_shows = false;
  static TopKConfig config() {
    return {.width = 5,
            .experts = 6,
            .top_k = 3,
            .score = Score::sqrt_softplus,
            .renormalise = true,
            .renormalise_epsilon = 0.1,
            .renormalise_norm = 2,
            .renormalise_after_drops = true,
            .capacity_factor = 0.8,
            .switch_loss_weight = 0.5,
            .z_loss_weight = 0.2};
  }
};

template <class Scalar>
struct BalancedLaw : GateLaw<BalancedGate<Scalar>> {
  using Gate = BalancedGate<Scalar>;
  using typename GateLaw<Gate>::LossWeights;
  static constexpr std::array loss_weights{std::pair{"threshold", &LossWeights::threshold}};
  static constexpr bool whole_batch = true;
  static typename Gate::Config config() {
    return {.width = 5, .experts = 4, .top_k = 2, .threshold_weight = 0.3};
  }
  /// Thresholds of the size of p, so that the two masks agree in some places only.
  static void prepare(Gate& gate) {
    Matrix<Scalar>& threshold = parameter(gate, "threshold").value;
    threshold = (threshold.array() * Scalar(0.4) + Scalar{1}).abs().matrix() / Scalar{4};
  }
  static std::vector<Index> choices(const typename Gate::Tape& tape) {
    std::vector<Index> all =
        joined(as_vector(tape.routing.token_offsets), as_vector(tape.routing.expert));
    for (Index i = 0; i < tape.difference.size(); ++i) {
      all.push_back(static_cast<Index>(tape.difference.data()[i]));
    }
    return all;
  }
};

template <class Scalar>
struct ExpertChoiceLaw : GateLaw<ExpertChoiceGate<Scalar>> {
  using Gate = ExpertChoiceGate<Scalar>;
  static constexpr bool whole_batch = true;
  static typename Gate::Config config() {
    return {.width = 5, .experts = 6, .capacity_factor = 1.5};
  }
  static std::vector<Index> choices(const typename Gate::Tape& tape) {
    return joined(as_vector(tape.routing.token_offsets), as_vector(tape.routing.expert));
  }
};

/// A gate of shared experts around that of another law.
template <class Routed, bool gated, bool tied = false>
struct SharedExpertLaw : GateLaw<SharedExpertGate<typename Routed::Gate>> {
  using Base = GateLaw<SharedExpertGate<typename Routed::Gate>>;
  using typename Base::Config, typename Base::Tape, typename Base::Gate, typename Base::Scalar;
  static constexpr const char* loss_name = Routed::name;
  static constexpr auto loss_weights = Routed::loss_weights;
  static constexpr bool whole_batch = Routed::whole_batch;
  static constexpr bool infinity_shows = Routed::infinity_shows;
  static constexpr Index shared_experts = 2;
  static constexpr Index sequences = Routed::sequences;
  static Index flag_of_row(Index row, Index rows) { return Routed::flag_of_row(row, rows); }
  static Config config() {
    return {.width = 5,
            .shared = shared_experts,
            .gated = gated,
            .tied = tied,
            .scale = tied ? 0.7 : 1,
            .routed = Routed::config()};
  }
  static std::vector<Index> choices(const Tape& tape) { return Routed::choices(tape.routed); }
  static std::vector<double> drawn_noise(const Gate& gate, std::uint64_t seed,
                                         const Matrix<Scalar>& x, const Pass& pass) {
    return Routed::drawn_noise(gate.routed(), seed, x, pass);
  }
};

template <class Scalar>
using GateLawsOf =
    std::tuple<NoisyTopKLaw<Scalar>, NoisyTopKLaw<Scalar, false>, HierarchicalLaw<Scalar>,
               ProductKeyLaw<Scalar>, SoftmaxLaw<Scalar>, SigmoidLaw<Scalar>,
               SoftmaxOfChosenLaw<Scalar>, JitterLaw<Scalar>, RootLaw<Scalar>, BalancedLaw<Scalar>,
               ExpertChoiceLaw<Scalar>, SharedExpertLaw<NoisyTopKLaw<Scalar>, true>,
               SharedExpertLaw<SigmoidLaw<Scalar>, false>,
               SharedExpertLaw<SoftmaxLaw<Scalar>, true, true>>;
using GateLawsInDouble = GateLawsOf<double>;
// In double where the tests are optimised, in float where sanitizers look for faults of memory, so that
// .ci/run has both: to compile these is what takes longest.
#if defined(MOE_TEST_SANITIZED)
using GateLaws = GateLawsOf<float>;
#else
using GateLaws = GateLawsInDouble;
#endif

}  // namespace moe::test
