#pragma once

#include <span>
#include <vector>

#include "moe/gates/gate.hpp"
#include "moe/routing/noisy_top_k.hpp"

/// \file
/// The gate of [S17]: linear scores with learned Gaussian noise, the K largest, a softmax over
/// them.

namespace moe {

/// Noisy top-k gating [S17 eq. 2-5] with the importance and load losses [S17 eq. 6-11].
///
///     c = x·W_g                       clean scores                     T x E
///     s = softplus(x·W_noise) + s0    scale of the noise               T x E
///     h = c + n ⊙ s                   n standard normal, keyed by (seed, step, token, expert), times
///                                     Pass::noise_factor
///     G = softmax of h over its K largest, 0 elsewhere
///
/// Both weight matrices start at zero [S17 App. A], so training starts in balance. With K = 1 the
/// softmax is the constant 1 and the gate learns from the load loss only. With K = E every expert
/// is always chosen and the load has no gradient. A token with NaN or infinity in x gets K experts
/// like any other, but its weights, the importance loss and, where the load has a gradient, the
/// load loss are NaN.
///
/// It has the functions forward(), evaluate() and backward() of the concept Gate.
template <class Scalar_ = float>
class NoisyTopKGate : public detail::GateBase<NoisyTopKGate<Scalar_>, Scalar_> {
  using Base = detail::GateBase<NoisyTopKGate<Scalar_>, Scalar_>;
  friend Base;

 public:
  using Scalar = typename Base::Scalar;                 ///< float or double
  static constexpr const char* name = "NoisyTopKGate";  ///< in messages and files

  /// The configuration; the constructor checks it.
  struct Config {
    Index width = 0;    ///< D; 0 inside a layer's configuration stands for the layer's width
    Index experts = 0;  ///< E
    Index top_k = 0;    ///< K, experts chosen for a token, 1 <= K <= E
    bool noise = true;  ///< false: scores are clean in training too, and the load has no gradient
    double noise_floor = 0.01;       ///< s0 > 0
    double importance_weight = 0.1;  ///< w_importance >= 0
    double load_weight = 0.1;        ///< w_load >= 0

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("experts", self.experts);
      visit("top_k", self.top_k);
      visit("noise", self.noise);
      visit("noise_floor", self.noise_floor);
      visit("importance_weight", self.importance_weight);
      visit("load_weight", self.load_weight);
    }
  };

  /// The weights of the gate's losses, see Config.
  using LossWeights = BalanceLossWeights;

  /// The scores and what else backward needs, of the N valid tokens.
  struct Tape : GateTape<Scalar>, detail::NoisyTopKTape<Scalar> {
    LossWeights loss_weights;      ///< of the pass
    Vector<Scalar> dimportance;    ///< E
    Vector<Scalar> dload;          ///< E
    IndexedVector<Scalar> dscore;  ///< S, the gradient w.r.t. G, then w.r.t. the chosen h
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is that of the noise.
  NoisyTopKGate(const Config& config, std::uint64_t seed)
      : config_(checked(config)),
        top_k_({config.width, config.experts, config.top_k, config.noise, config.noise_floor},
               seed) {}

  /// The configuration as it is now.
  const Config& config() const { return config_; }
  Index experts() const { return config_.experts; }  ///< E

  /// The number of values of Pass::noise for a row of x: E (n of each expert), or 0 without Config.noise.
  Index noise_columns() const { return config_.noise ? config_.experts : 0; }

  /// The calls of a SharedBatch that a pass makes, for mpi::RankDispatch.
  detail::SharedCalls shared_calls(bool, Index, Index) const {
    return detail::shared_calls({}, detail::balance_figures(experts()));
  }

  /// Changes the weights of the losses from the next pass on. Throws std::invalid_argument for one
  /// out of range.
  void set_loss_weights(const LossWeights& weights) {
    detail::set_balance_weights(name, weights, config_);
  }

  /// Adds, copies and removes experts, see Gate: fresh columns are zero, as initially. Copies of W_g's
  /// columns get noise of this standard deviation. Returns where the parameters come from. Throws
  /// std::invalid_argument, with nothing changed, if Config would be out of range.
  std::vector<ParameterSource> change_experts(const ExpertSources& sources, std::uint64_t seed,
                                              double noise_stddev) {
    Config config = config_;
    config.experts = sources.experts();
    checked(config);
    top_k_.change_experts(sources, config.top_k, seed, noise_stddev);
    config_ = config;
    return {{0, sources.list()}, {1, sources.list()}};
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of a gate like this
  /// one, and the parameters have their original shapes.
  void check_tape(const Tape& tape) const {
    detail::require(tape.trained, "NoisyTopKGate::backward without a forward pass on this tape");
    detail::require(
        tape.clean.cols() == experts() && tape.routing.slots() == tape.tokens.count * config_.top_k,
        "NoisyTopKGate::backward: the tape is another gate's, of ", tape.clean.cols(),
        " experts and ", tape.routing.slots(), " slots of ", tape.routing.tokens(), " tokens");
    detail::check_shapes(*this, "NoisyTopKGate");
  }

  /// "weight" (W_g, D x E) and "noise_weight" (W_noise, D x E).
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    detail::NoisyTopK<Scalar>::visit_parameters(self.top_k_, visit);
  }

 private:
  static const Config& checked(const Config& config) {
    detail::check_at_least_one(name, "width", config.width);
    detail::check_at_least_one(name, "experts", config.experts);
    detail::check_choice(name, "top_k", config.top_k, "experts", config.experts);
    detail::check_noise_floor(name, config.noise_floor);
    detail::check_balance_weights(name, config);
    return config;
  }

  void route(const MatrixRef<Scalar>& x, const Pass& pass, Tape& tape) const {
    route(x, config_.noise, detail::noise_source(pass, noise_columns()), pass.batch, tape);
  }
  void route(const MatrixRef<Scalar>& x, const EvaluationPass& pass, Tape& tape) const {
    route(x, false, {.key = {.step = 0}}, pass.batch, tape);
  }
  void route(const MatrixRef<Scalar>& x, bool has_noise, const detail::NoiseSource& noise,
             const SharedBatch* batch, Tape& tape) const {
    const ValidTokens& tokens = tape.tokens;
    top_k_.prepare(tokens.count, has_noise, tape, tape.routing);
    top_k_.forward(tokens.rows_of(x), tokens.row_list(), noise, 0, tape, tape.routing);
    detail::insert_padding(tokens, tape.routing);
    detail::BatchSum sum(batch);
    if (has_noise) {
      detail::resize(tape.balance.load, experts());
      top_k_.compute_load(0, tokens.count, tape, tape.balance.load.data());
      sum.add(tape.balance.load.data(), experts());
      detail::measure_importance(tape.routing, sum, tape.balance);
    } else {
      detail::measure_balance(tape.routing, tape.routing.expert, sum, tape.balance);
    }
    tape.loss_weights = detail::balance_weights_of(config_);
    detail::measure_balance_loss(tape.loss_weights, tape.loss_scale, tape.balance);
  }

  /// The gradient of the load includes the part that goes through its threshold.
  void route_backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                      Matrix<Scalar>& dx) {
    detail::require_apart(name, "dweight", dweight, {tape.dscore});
    detail::balance_loss_backward(tape.balance, tape.loss_weights, tape.loss_scale,
                                  tape.dimportance, tape.dload);
    detail::resize(tape.dscore, tape.routing.slots());
    for (std::size_t slot = 0; slot < dweight.size(); ++slot) {
      tape.dscore[slot] = dweight[slot] + tape.dimportance[tape.routing.expert[slot]];
    }
    detail::softmax_of_chosen_backward(tape.routing, config_.top_k, tape.dscore);
    top_k_.prepare_backward(tape);
    top_k_.backward(tape.tokens.rows_of(x), 0, tape.dscore.data(), tape.dload.data(), tape,
                    tape.routing, tape.tokens.rows_of(dx));
  }

  Config config_;
  detail::NoisyTopK<Scalar> top_k_;
};

}  // namespace moe
