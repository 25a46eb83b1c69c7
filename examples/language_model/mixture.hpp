#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <moe/moe.hpp>
#include <moe/weights/serving_layer.hpp>
#include <string>
#include <utility>

#include "options.hpp"

/// \file
/// A mixture of experts of the model, with any gate.

namespace language_model {

using moe::Index;

/// How many scores the gate makes for a token, each D multiply-adds: those of the noise, where it has any,
/// count too.
inline Index scores_of(const moe::NoisyTopKGate<float>::Config& gate) {
  return (gate.noise ? 2 : 1) * gate.experts;
}
inline Index scores_of(const moe::HierarchicalGate<float>::Config& gate) {
  return (gate.noise ? 2 : 1) * (gate.groups + gate.top_k_groups * gate.group_experts);
}
inline Index scores_of(const moe::ProductKeyGate<float>::Config& gate) {
  return (gate.noise ? 2 : 1) * (gate.row_keys + gate.column_keys);
}
inline Index scores_of(const moe::BalancedGate<float>::Config& gate) { return gate.experts; }
inline Index scores_of(const moe::TopKConfig& gate) { return gate.experts; }

/// How many experts a token goes to, on average where the gate lets it vary.
template <class GateConfig>
Index active_of(const GateConfig& gate) {
  return gate.top_k;
}
inline Index active_of(const moe::HierarchicalGate<float>::Config& gate) {
  return gate.top_k_groups * gate.top_k;
}

template <class GateConfig>
struct MixtureConfig {
  GateConfig gate{};
  Index hidden = 0;                                   ///< H, of an expert
  bool gated = false;                                 ///< SwiGLU; else plain, with ReLU
  moe::Activation output = moe::Activation::sigmoid;  ///< of the mixture
  double gate_deviation = 0;  ///< of the scores at the start, for inputs of mean square 1
};

/// `Layer` is a MoELayer, or has its verbs and its configuration, or is a ServingLayer, to serve.
template <class Gate, class Layer = moe::MoELayer<moe::Expert<moe::FeedForward>, Gate>>
class Mixture {
  using Matrix = moe::Matrix<float>;

 public:
  using Config = MixtureConfig<typename Gate::Config>;
  struct State {};  ///< nothing is carried from one batch to the next
  using Tape = typename Layer::Tape;
  /// With its experts in a narrow format.
  template <class Format>
  using Served = Mixture<Gate, moe::ServingLayer<Layer, Format>>;

  /// `surroundings`: what else the layer's constructor takes.
  template <class... Surroundings>
  Mixture(const Config& config, Index width, std::uint64_t seed,
          const Surroundings&... surroundings)
      : config_(config),
        layer_(
            {.width = width,
             .expert = {.hidden = config.hidden,
                        .activation = config.gated ? moe::Activation::silu : moe::Activation::relu,
                        .gated = config.gated},
             .gate = config.gate,
             .output = config.output,
             .seed = seed},
            surroundings...) {
    if (config.gate_deviation > 0) scatter_scores(config.gate_deviation, moe::derive_seed(seed, 9));
  }

  /// One that was trained, its experts' weights rounded.
  template <class Trained>
  Mixture(const Mixture<Gate, Trained>& trained, const moe::NarrowOptions& options)
      : config_(trained.config_), layer_(trained.layer_, options) {}

  /// One that was trained, with another layer in the place of its own.
  template <class Trained>
  Mixture(const Mixture<Gate, Trained>& trained, Layer layer)
      : config_(trained.config_), layer_(std::move(layer)) {}

  const Layer& layer() const { return layer_; }
  Index experts() const { return layer_.gate().experts(); }
  Index top_k() const { return active_of(config_.gate); }

  /// Multiply-adds a token: the gate, and the experts that are used.
  static Index operations_of(const Config& config, Index width) {
    const Index of_expert = maps_of(config.gated) * width * config.hidden;
    return scores_of(config.gate) * width + active_of(config.gate) * of_expert;
  }
  Index operations() const { return operations_of(config_, layer_.config().width); }

  State initial_state(Index) const { return {}; }

  /// Multiplies the gate's noise in forward(), from now on.
  void set_noise(double factor) { noise_factor_ = factor; }

  const Matrix& forward(const Matrix& x, State&, Tape& tape, const moe::NoiseKey& key) const {
    return layer_.forward(
        x, tape, {.step = key.step, .first_token = key.first_token, .noise_factor = noise_factor_});
  }
  const Matrix& backward(const Matrix& dy, Tape& tape) { return layer_.backward(dy, tape); }
  const Matrix& evaluate(const Matrix& x, State&, Tape& tape) const {
    return layer_.evaluate(x, tape);
  }

  /// What a gate does by itself between updates.
  void after_update(const Tape& tape) {
    if constexpr (requires { layer_.update_selection_bias(tape); }) {
      layer_.update_selection_bias(tape);
    }
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Layer::visit_parameters(self.layer_, visit);
  }

 private:
  template <class, class>
  friend class Mixture;

  /// The library's gates start with scores of 0, so that at first noise alone chooses. Where scores
  /// differ from the start, experts get tokens of their own from the start too.
  void scatter_scores(double deviation, std::uint64_t seed) {
    const auto scale =
        static_cast<float>(deviation / std::sqrt(static_cast<double>(layer_.config().width)));
    std::uint64_t matrix = 0;
    moe::for_each_parameter(layer_, [&](const std::string& name, auto& parameter) {
      if (!name.starts_with("gate.") || !name.ends_with("weight")) return;
      if (name.ends_with("noise_weight")) return;
      moe::fill_normal(parameter.value, scale, moe::derive_seed(seed, matrix++));
    });
  }

  Config config_;
  Layer layer_;
  double noise_factor_ = 1;
};

/// Makes of a mixture the paper's, or one like those of today's models.
template <class Config>
void set_style(Config& config, const Options& o) {
  config.output = o.pre_norm ? moe::Activation::identity : moe::Activation::sigmoid;
  config.gated = o.gated;
  config.gate_deviation = o.gate_deviation;
}

}  // namespace language_model
