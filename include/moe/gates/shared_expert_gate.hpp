#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "moe/gates/gate.hpp"
#include "moe/kernels/activations.hpp"
#include "moe/routing/linear_scores.hpp"

/// \file
/// Experts that every token uses, in addition to those that a gate chooses.

namespace moe {

/// A gate that adds shared experts to those of another gate, which it wraps: D. Dai et al.,
/// "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models", ACL
/// 2024 (arXiv 2401.06066), section 3.2.
///
///     moe::MoELayer<moe::Expert<moe::FeedForward>, moe::SharedExpertGate<moe::NoisyTopKGate<>>>
///         layer({.width = 128,
///                .expert = {.hidden = 256},
///                .gate = {.shared = 2, .routed = {.experts = 64, .top_k = 6}}});
///
/// Experts 0, ..., shared − 1 get every token, with the weight `scale`, or, if `gated`,
/// scale·sigmoid(x·W_shared). W_shared has a column for each of them, or one for all if `tied`. It is
/// zero initially, so that these weights are scale/2. Expert e of the wrapped gate is expert
/// shared + e here. A token without a slot from the wrapped gate still has its shared experts. With
/// shared = 0 the slots are those of the wrapped gate, to the bit, so that one type of layer serves for models
/// with and without shared experts.
///
/// tape.balance is that of the wrapped gate, for the routed experts only: its vectors have
/// routed().experts() entries. (The load of a shared expert is always T.)
///
/// All experts of a layer have the same hidden width H. A shared expert of width n·H is the same as n
/// shared experts of width H with equal weights, since a feed-forward network is a sum over its
/// hidden units (its second bias is the sum of theirs). So with `gated` and `tied`, n shared
/// experts are the one wide shared expert of Qwen1.5-MoE and Qwen2-MoE; without `tied` each of the
/// n has a weight of its own.
///
/// It has the functions forward(), evaluate() and backward() of the concept Gate.
template <class RoutedGate>
requires Gate<RoutedGate>
class SharedExpertGate
    : public detail::GateBase<SharedExpertGate<RoutedGate>, typename RoutedGate::Scalar> {
  using Base = detail::GateBase<SharedExpertGate<RoutedGate>, typename RoutedGate::Scalar>;
  friend Base;

 public:
  using Scalar = typename Base::Scalar;                    ///< float or double
  static constexpr const char* name = "SharedExpertGate";  ///< in messages and files

  /// The configuration; the constructor checks it.
  struct Config {
    Index width = 0;   ///< D; 0 inside a layer's configuration stands for the layer's width
    Index shared = 1;  ///< experts that every token uses, at least 0
    /// Their weights are sigmoid(x·W_shared) instead of 1, times `scale`; must be false if
    /// `shared` is 0.
    bool gated = false;
    /// W_shared has one column, and all of them one weight; must be false without `gated`.
    bool tied = false;
    double scale = 1;                      ///< of their weights, above 0
    typename RoutedGate::Config routed{};  ///< the wrapped gate's; width 0 stands for D

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("shared", self.shared);
      visit("gated", self.gated);
      visit("tied", self.tied);
      visit("scale", self.scale);
      visit("routed", self.routed);
    }
  };

  using LossWeights = typename detail::LossWeightsOf<RoutedGate>::type;  ///< the wrapped gate's

  /// The wrapped gate's tape, and what the shared weights need of the N valid tokens.
  struct Tape : GateTape<Scalar> {
    typename RoutedGate::Tape routed;      ///< the wrapped gate's
    IndexedVector<Scalar> routed_dweight;  ///< the gradient w.r.t. the routed slots' weights
    Matrix<Scalar> shared_weight;          ///< sigmoid(x·W_shared), N x columns of W_shared
    Matrix<Scalar> dscores;                ///< the gradient w.r.t. x·W_shared, same shape
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is the wrapped gate's.
  SharedExpertGate(const Config& config, std::uint64_t seed)
      : config_(completed(config)), routed_(config_.routed, seed) {
    if (config.gated) weight_ = Parameter<Scalar>(config.width, weight_columns());
  }

  /// The configuration as it is now.
  const Config& config() const { return config_; }
  const RoutedGate& routed() const { return routed_; }                  ///< the wrapped gate
  Index experts() const { return config_.shared + routed_.experts(); }  ///< shared and routed ones

  /// The number of shared experts, which are the first ones.
  Index shared_experts() const { return config_.shared; }
  /// As the wrapped gate: see Gate.
  Index experts_together() const {
    if constexpr (requires { routed_.experts_together(); }) {
      return routed_.experts_together();
    } else {
      return 1;
    }
  }
  /// The number of values of Pass::noise for a row of x: the wrapped gate's.
  Index noise_columns() const {
    if constexpr (requires { routed_.noise_columns(); }) {
      return routed_.noise_columns();
    } else {
      return 0;
    }
  }

  /// The calls of a SharedBatch that a pass makes, for mpi::RankDispatch: those of the wrapped gate.
  detail::SharedCalls shared_calls(bool training, Index rows, Index sequences)
      const requires detail::NamesSharedCalls<RoutedGate> {
    return routed_.shared_calls(training, rows, sequences);
  }

  /// The checks of the wrapped gate.
  void check_forward(const MatrixRef<Scalar>& x, const Pass& pass) const {
    if constexpr (requires { routed_.check_forward(x, pass); }) routed_.check_forward(x, pass);
  }
  /// The checks of the wrapped gate.
  void check_evaluate(const MatrixRef<Scalar>& x, const EvaluationPass& pass) const {
    if constexpr (requires { routed_.check_evaluate(x, pass); }) routed_.check_evaluate(x, pass);
  }

  /// Changes the weights of the wrapped gate's losses from the next pass on. Throws as the wrapped
  /// gate does.
  template <class G = RoutedGate>
  requires requires(G& gate, const LossWeights& weights) { gate.set_loss_weights(weights); }
  void set_loss_weights(const LossWeights& weights) {
    static_assert(detail::check_loss_weights_requirements<G>());
    routed_.set_loss_weights(weights);
    config_.routed = routed_.config();
  }
  /// Moves the wrapped gate's selection bias, see TopKGate::update_selection_bias().
  template <class G = RoutedGate>
  requires requires(G& gate, const typename G::Tape& tape) { gate.update_selection_bias(tape); }
  void update_selection_bias(const Tape& tape) { routed_.update_selection_bias(tape.routed); }
  /// The same given a load, of the routed experts only.
  template <class G = RoutedGate>
  requires requires(G& gate, const Vector<Scalar>& load) { gate.update_selection_bias(load); }
  void update_selection_bias(const Vector<Scalar>& load) { routed_.update_selection_bias(load); }

  /// Adds, copies and removes experts of the wrapped gate, see Gate. Throws std::invalid_argument if a
  /// shared expert would be removed, moved or copied, and as the wrapped gate does.
  template <detail::ChangesExperts G = RoutedGate>
  std::vector<ParameterSource> change_experts(const ExpertSources& sources, std::uint64_t seed,
                                              double noise_stddev) {
    std::vector<Index> routed;
    for (Index e = 0; e < sources.experts(); ++e) {
      const bool stays = sources[e] == e;
      detail::require(e >= config_.shared || stays, "SharedExpertGate::change_experts: expert ", e,
                      " of ", config_.shared, " shared experts would not stay in its place");
      detail::require(e < config_.shared || sources.is_fresh(e) || sources[e] >= config_.shared,
                      "SharedExpertGate::change_experts: expert ", e, " would be a copy of ",
                      sources[e], ", one of ", config_.shared, " shared experts");
      if (e < config_.shared) continue;
      routed.push_back(sources.is_fresh(e) ? fresh_source : sources[e] - config_.shared);
    }
    const ExpertSources of_routed("SharedExpertGate::change_experts: routed", std::move(routed),
                                  routed_.experts());
    const Index parameters = detail::count_parameters(routed_);
    std::vector<ParameterSource> from = routed_.change_experts(of_routed, seed, noise_stddev);
    config_.routed = routed_.config();
    if (config_.gated) {
      from.push_back({parameters});
      zero_gradients(weight_);
    }
    return from;
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of a gate like this
  /// one, and the parameters have their original shapes.
  void check_tape(const Tape& tape) const {
    detail::require(tape.trained, "SharedExpertGate::backward without a forward pass on this tape");
    detail::require(tape.routing.experts == experts() &&
                        tape.routing.slots() ==
                            tape.routed.routing.slots() + config_.shared * tape.tokens.count &&
                        tape.shared_weight.cols() == weight_columns(),
                    "SharedExpertGate::backward: the tape is another gate's, of ",
                    tape.routing.experts, " experts");
    if constexpr (requires { routed_.check_tape(tape.routed); }) routed_.check_tape(tape.routed);
    detail::check_shapes(*this, "SharedExpertGate");
  }

  /// "routed.weight", ... and, if gated, "shared_weight" (W_shared).
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("routed", self.routed_);
    if (self.config_.gated) visit("shared_weight", self.weight_);
  }

 private:
  static Config completed(Config config) {
    detail::check_at_least_one(name, "width", config.width);
    detail::require(config.shared >= 0, "SharedExpertGate::Config.shared = ", config.shared,
                    ", must be at least 0");
    detail::complete_width(name, "routed", config.width, config.routed.width);
    detail::require(config.gated || !config.tied,
                    "SharedExpertGate::Config.tied = true, must be false without gated");
    detail::require(config.shared > 0 || !config.gated,
                    "SharedExpertGate::Config.gated = true, must be false with shared = 0");
    const auto scale = static_cast<Scalar>(config.scale);
    detail::require(std::isfinite(scale) && scale > 0,
                    "SharedExpertGate::Config.scale = ", config.scale,
                    ", must be finite and above 0 as a Scalar");
    return config;
  }

  void route(const MatrixRef<Scalar>& x, const Pass& pass, Tape& tape) const {
    routed_.forward(x, tape.routed, pass);
    add_shared(x, tape);
  }
  void route(const MatrixRef<Scalar>& x, const EvaluationPass& pass, Tape& tape) const {
    routed_.evaluate(x, tape.routed, pass);
    add_shared(x, tape);
  }
  /// The wrapped gate's backward gets the part of dweight for its slots.
  void route_backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                      Matrix<Scalar>& dx) {
    detail::require_apart(name, "dweight", dweight, {tape.routed_dweight});
    split_backward(dweight, tape);
    routed_.backward(x, std::span<const Scalar>(tape.routed_dweight), tape.routed, dx);
    if (config_.gated) {
      linear_scores_backward(tape.tokens.rows_of(x), tape.dscores, weight_,
                             tape.tokens.rows_of(dx));
    }
  }

  /// A token's slots are its `shared` ones and then those of the wrapped gate.
  void add_shared(const MatrixRef<Scalar>& x, Tape& tape) const {
    const Index shared = config_.shared;
    const Routing<Scalar>& routed = tape.routed.routing;
    detail::require(routed.tokens() == x.rows(),
                    "SharedExpertGate: the wrapped gate's routing has ", routed.tokens(),
                    " tokens, x has ", x.rows());
    detail::require(!routed.token_offsets.empty() && routed.token_offsets.front() == 0 &&
                        routed.token_offsets.back() == routed.slots() &&
                        std::is_sorted(routed.token_offsets.begin(), routed.token_offsets.end()) &&
                        routed.weight.size() == routed.expert.size(),
                    "SharedExpertGate: the wrapped gate's token_offsets must ascend from 0 to its ",
                    routed.slots(), " slots, of which ", routed.weight.size(), " have a weight");
    compute_shared_weight(x, tape);
    const auto scale = static_cast<Scalar>(config_.scale);
    Routing<Scalar>& routing = tape.routing;
    routing.experts = experts();
    detail::resize(routing.token_offsets, x.rows() + 1);
    detail::resize(routing.expert, routed.slots() + shared * tape.tokens.count);
    detail::resize(routing.weight, routed.slots() + shared * tape.tokens.count);
    routing.token_offsets[0] = 0;
    Index slot = 0;
    Index token = 0;
    for (Index t = 0; t < x.rows(); ++t) {
      if (token < tape.tokens.count && tape.tokens.row_of(token) == t) {
        for (Index i = 0; i < shared; ++i, ++slot) {
          routing.expert[slot] = i;
          routing.weight[slot] =
              config_.gated ? scale * tape.shared_weight(token, weight_column(i)) : scale;
        }
        ++token;
      }
      for (Index s = routed.token_offsets[t]; s < routed.token_offsets[t + 1]; ++s, ++slot) {
        routing.expert[slot] = shared + routed.expert[s];
        routing.weight[slot] = routed.weight[s];
      }
      routing.token_offsets[t + 1] = slot;
    }
    detail::copy_balance(tape.routed.balance, tape.balance);
  }

  /// Copies the gradients of the routed slots to tape.routed_dweight. If gated, sets tape.dscores
  /// from the gradients of the shared slots: dweight·scale·s·(1 − s) with s = sigmoid(x·W_shared),
  /// and if tied the sum of these over the shared experts.
  void split_backward(std::span<const Scalar> dweight, Tape& tape) const {
    const Routing<Scalar>& routed = tape.routed.routing;
    detail::resize(tape.routed_dweight, routed.slots());
    if (config_.gated) detail::resize_to_zero(tape.dscores, tape.tokens.count, weight_columns());
    const auto scale = static_cast<Scalar>(config_.scale);
    std::size_t slot = 0;
    Index token = 0;
    for (Index t = 0; t < tape.routing.tokens(); ++t) {
      if (token < tape.tokens.count && tape.tokens.row_of(token) == t) {
        for (Index i = 0; i < config_.shared; ++i, ++slot) {
          if (!config_.gated) continue;
          const Index column = weight_column(i);
          const Scalar s = tape.shared_weight(token, column);
          tape.dscores(token, column) += dweight[slot] * scale * s * (Scalar{1} - s);
        }
        ++token;
      }
      for (Index s = routed.token_offsets[t]; s < routed.token_offsets[t + 1]; ++s, ++slot) {
        tape.routed_dweight[s] = dweight[slot];
      }
    }
  }

  Index weight_columns() const {
    if (!config_.gated) return 0;
    return config_.tied ? 1 : config_.shared;
  }
  /// The column of W_shared for a shared expert.
  Index weight_column(Index expert) const { return config_.tied ? 0 : expert; }

  void compute_shared_weight(const MatrixRef<Scalar>& x, Tape& tape) const {
    if (!config_.gated) {
      detail::resize(tape.shared_weight, tape.tokens.count, 0);
      return;
    }
    linear_scores(tape.tokens.rows_of(x), weight_, tape.shared_weight);
    detail::activate(Activation::sigmoid, tape.shared_weight.size(), tape.shared_weight.data(),
                     tape.shared_weight.data());
  }

  Config config_;
  RoutedGate routed_;
  Parameter<Scalar> weight_;  ///< W_shared, D x shared, or D x 1 if tied; empty if not gated
};

}  // namespace moe
