#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moe/experts/feed_forward.hpp"
#include "moe/layer/expert_pass.hpp"
#include "moe/layer/layer_checks.hpp"
#include "moe/layer/output_activation.hpp"
#include "moe/routing/noisy_top_k_gate.hpp"

/// \file
/// The sparsely-gated mixture-of-experts layer: dispatch, run, combine.

namespace moe {

/// y_t = act(Σ over the slots of t of G·E_i(x_t)) [S17 eq. 1]: a gate sends every token to a few
/// experts, each expert runs over the rows it got, and the results are added up by weight. The
/// layer drops no token, and computes and back-propagates nothing for an expert that got none. A
/// token that a gate gave no slot (some do, see docs/gates.md) has a y of act(0).
///
///     moe::MoELayer<moe::Expert<moe::FeedForward>> layer({.width = 128,
///                                                         .expert = {.hidden = 256},
///                                                         .gate = {.experts = 64, .active = 4},
///                                                         .seed = 1});
///     decltype(layer)::Tape tape;
///     const auto& y = layer.forward(x, tape, {.step = step});   // x is T x 128
///     const auto& dx = layer.backward(dy, tape);                // gradients are in the parameters
///     auto served = layer.evaluate(x);                          // no noise, no tape
///
/// The layer knows neither what a network computes nor how a gate chose. A const layer may be used
/// from several threads at once, each with its own tape. The same seed, input and step give the
/// same bits on any number of threads, and a token's y does not depend on the other rows of x
/// unless the gate's choice does. After a first call with the same shapes and number of slots
/// nothing is allocated, except what evaluate() without a tape returns.
template <class Expert, class Gate_ = NoisyTopKGate<typename Expert::Scalar>>
requires Gate<Gate_> && std::same_as<typename Expert::Scalar, typename Gate_::Scalar>
class MoELayer {
 public:
  using Scalar = typename Expert::Scalar;

  struct Config {
    Index width = 0;                           ///< D
    typename Expert::Config expert{};          ///< of every expert
    typename Gate_::Config gate{};             ///< says how many experts there are
    Activation output = Activation::identity;  ///< [S17 App. C.1] has a sigmoid here
    Seed seed;                                 ///< of the experts' start and the gate's noise

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("expert", self.expert);
      visit("gate", self.gate);
      visit("output", self.output);
      visit("seed", self.seed);
    }
  };

  /// What a pass leaves behind. One tape belongs to one pass at a time; several passes in flight
  /// take several tapes.
  struct Tape {
    typename Gate_::Tape gate;           ///< whatever the gate keeps; its routing and balance
    detail::ExpertTape<Expert> experts;  ///< whatever the experts keep, and scratch
    Matrix<Scalar> x;                    ///< T x D, a copy
    Matrix<Scalar> y;                    ///< T x D, the result
    Matrix<Scalar> dx;                   ///< T x D, the gradient with respect to x
    bool trained = false;                ///< whether the last pass was a forward() that ended well

    Matrix<Scalar> combined;      ///< T x D, y before the output activation, if there is one
    Matrix<Scalar> dcombined;     ///< T x D
    std::vector<Scalar> dweight;  ///< S, the gradients of the weights by slot

    /// The slots of the last pass.
    const Routing<Scalar>& routing() const { return gate.routing; }
    /// The losses and the figures to watch of the last pass.
    const Balance<Scalar>& balance() const { return gate.balance; }
  };

  /// Throws std::invalid_argument for a configuration out of range.
  explicit MoELayer(const Config& config)
      : config_(completed(config)), gate_(config_.gate, derive_seed(config.seed, 0)) {
    detail::require(gate_.experts() >= 1, "MoELayer: the gate has ", gate_.experts(),
                    " experts, must be at least 1");
    experts_.reserve(detail::to_size(gate_.experts()));
    for (Index e = 0; e < gate_.experts(); ++e) {
      experts_.emplace_back(config_.expert,
                            derive_seed(config.seed, static_cast<std::uint64_t>(e) + 1));
    }
  }

  /// The configuration with the widths that were left 0. Throws std::invalid_argument for one out
  /// of range.
  static Config completed(Config config) {
    detail::require(config.width >= 1, "MoELayer::Config.width = ", config.width,
                    ", must be at least 1");
    if (config.expert.width == 0) config.expert.width = config.width;
    if (config.gate.width == 0) config.gate.width = config.width;
    detail::require(config.expert.width == config.width,
                    "MoELayer::Config.expert.width = ", config.expert.width,
                    ", must be 0 or Config.width = ", config.width);
    detail::require(config.gate.width == config.width,
                    "MoELayer::Config.gate.width = ", config.gate.width,
                    ", must be 0 or Config.width = ", config.width);
    detail::require_activation("MoELayer::Config.output", config.output);
    return config;
  }

  // What is reached by these may get other weights. A pass throws std::invalid_argument where
  // something else was changed: the number of experts, a network's shape or a parameter's.

  const Config& config() const { return config_; }
  const Gate_& gate() const { return gate_; }
  Gate_& gate() { return gate_; }
  const std::vector<Expert>& experts() const { return experts_; }
  std::vector<Expert>& experts() { return experts_; }

  /// Training pass over x (T x D); returns tape.y (T x D). The losses and the figures to watch are
  /// in tape.balance(). Give every update its own key.step: the same key draws the same noise.
  /// O(S·D·H), and what the gate costs. x may be all of this tape's x, and any part of its y. Throws
  /// std::invalid_argument when x is not D wide or another part of tape.x, and when a gate
  /// contradicts itself, which leaves the tape unusable.
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape, const NoiseKey& key) const {
    detail::check_layer_width<Scalar>(x, "x", config_.width);
    tape.trained = false;
    detail::copy_matrix(x, tape.x);
    gate_.forward(tape.x, tape.gate, key);
    detail::group_checked(tape.gate.routing, expert_count(), tape.x.rows());
    run_experts(tape.x, tape, true);
    tape.trained = true;
    return tape.y;
  }

  /// Takes dy, the gradient of the loss with respect to y (T x D), after forward() on the same tape.
  /// Adds to every parameter's gradient, the balance losses' included once; returns the gradient with
  /// respect to x (T x D), which is tape.dx. The parameters must be those of the forward pass. Throws
  /// std::invalid_argument when dy has another shape than y or lies in tape.dx, or the tape is not of
  /// a forward pass of such a layer, before anything is changed. A second backward() on a tape adds
  /// the same gradients once more, and the tape of another layer of the same shape is not told from
  /// this one's. std::bad_alloc, which only a first pass of its shapes can throw, may leave gradients
  /// that are added to in part: zero them before going on.
  const Matrix<Scalar>& backward(const MatrixRef<Scalar>& dy, Tape& tape) {
    detail::require(tape.trained, "MoELayer::backward without a forward pass on this tape");
    detail::check_layer_width<Scalar>(dy, "dy", config_.width);
    const Index tokens = tape.x.rows();
    detail::require(dy.rows() == tokens, "MoELayer: dy has ", dy.rows(), " rows, y has ", tokens);
    detail::require(tape.routing().experts == expert_count() && expert_count() >= 1 &&
                        tape.x.cols() == config_.width &&
                        tape.experts.kept_width == experts_.front().tape_width(),
                    "MoELayer::backward: the tape is another layer's, of ", tape.routing().experts,
                    " experts and width ", tape.x.cols());
    detail::check_gate(gate_, tape.gate, config_.width);
    detail::require_apart("MoELayer::backward", "dy", dy, {tape.dx, tape.dcombined});
    const detail::ExpertPass<Expert> pass(experts_, tape.routing(), tape.experts);
    pass.check_experts(config_.width);
    if (!has_gradients_) detail::reserve_gradients(*this);
    has_gradients_ = true;
    const MatrixRef<Scalar> dsum =
        detail::activate_output_backward(config_.output, tape.combined, dy, tape.dcombined);
    detail::resize_to_zero(tape.dx, tokens, config_.width);
    pass.run_backward(experts_, tape.x, dsum, tape.dweight, tape.dx);
    gate_.backward(tape.x, std::span<const Scalar>(tape.dweight), tape.gate, tape.dx);
    detail::check_left_by_gate(tape.dx, tokens, config_.width);
    return tape.dx;
  }

  /// y (T x D) without noise. Leaves tape.routing() and tape.balance() too, so a served or validated
  /// batch can be watched, but nothing that backward() could use. Throws std::invalid_argument
  /// when x is not D wide, or is this tape's own y or a part of it.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    detail::check_layer_width<Scalar>(x, "x", config_.width);
    detail::require_apart("MoELayer::evaluate", "x", x, {tape.y, tape.combined});
    tape.trained = false;
    gate_.evaluate(x, tape.gate);
    detail::group_checked(tape.gate.routing, expert_count(), x.rows());
    run_experts(x, tape, false);
    return tape.y;
  }
  Matrix<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    return evaluate(x, tape);
  }

  /// "gate.weight", "gate.noise_weight", "experts.0.up.weight", ...
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("gate", self.gate_);
    visit("experts", self.experts_);
  }

 private:
  Index expert_count() const { return static_cast<Index>(experts_.size()); }

  /// y = act(Σ G·experts(x)), x being T x D.
  void run_experts(const MatrixRef<Scalar>& x, Tape& tape, bool keeps) const {
    const bool plain = config_.output == Activation::identity;
    Matrix<Scalar>& sum = plain ? tape.y : tape.combined;
    const detail::ExpertPass<Expert> pass(experts_, tape.routing(), tape.experts);
    pass.check_experts(config_.width);
    detail::resize_to_zero(sum, x.rows(), config_.width);
    pass.run(x, keeps, sum);
    if (!plain) detail::activate_output(config_.output, sum, tape.y);
  }

  Config config_;
  Gate_ gate_;
  std::vector<Expert> experts_;
  bool has_gradients_ = false;  ///< a first backward pass has made room for them
};

}  // namespace moe
