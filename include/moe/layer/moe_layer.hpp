#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/experts/feed_forward.hpp"
#include "moe/gates/gate.hpp"
#include "moe/gates/noisy_top_k_gate.hpp"
#include "moe/layer/changed_experts.hpp"
#include "moe/layer/expert_pass.hpp"
#include "moe/layer/identity_experts.hpp"
#include "moe/layer/layer_checks.hpp"
#include "moe/layer/layer_config.hpp"
#include "moe/layer/local_dispatch.hpp"
#include "moe/layer/output_activation.hpp"
#include "moe/routing/config_checks.hpp"
#include "moe/routing/dispatch.hpp"

/// \file
/// The sparsely-gated mixture-of-experts layer: route, dispatch, compute, combine.

namespace moe {

/// y_t = act(Σ over the slots of t of G·E_i(x_t)) [S17 eq. 1]: a gate sends every token to a few
/// experts, each expert computes the rows it got, and the outputs are summed with the gate's weights.
/// act is Config.output, by default the identity.
/// (With FeedForward::Config.weighted_input the rows of x are weighted and not the outputs.) The
/// layer drops no token, and an expert without tokens takes no time. A token to which the gate gave
/// no slot (some gates do that, see docs/gates.md) has y = act(0). With Config.identity_experts the
/// last experts of the gate have no network: E_i(x) = x.
///
///     moe::MoELayer<moe::Expert<moe::FeedForward>> layer({.width = 128,
///                                                         .expert = {.hidden = 256},
///                                                         .gate = {.experts = 64, .top_k = 4},
///                                                         .seed = 1});
///     decltype(layer)::Tape tape;
///     const auto& y = layer.forward(x, tape, {.step = step});   // x is T x 128
///     const auto& dx = layer.backward(dy, tape);                // gradients are in the parameters
///     auto served = layer.evaluate(x);                          // no noise, no tape
///
/// `Dispatch_` says where the experts are: LocalDispatch, or mpi::RankDispatch if they are spread over
/// processes. A const layer may be used from several threads at once, each with its own tape. The
/// same seed, input and step give the same bits on any number of threads, and a token's y does not
/// depend on the other rows of x unless the gate's choice does. After a first call with the same
/// shapes and number of slots nothing is allocated, except by evaluate() without a tape.
template <class Expert_, class Gate_ = NoisyTopKGate<typename Expert_::Scalar>,
          class Dispatch_ = LocalDispatch>
class MoELayer {
  // First, so that a compiler's first error is this one.
  static_assert(
      detail::is_expert<Expert_>,
      "the experts of a MoELayer are of type moe::Expert<Network>, not the network itself");
  static_assert(detail::check_gate_requirements<Gate_>());
  static_assert(std::is_same_v<typename Expert_::Scalar, typename Gate_::Scalar>,
                "a layer's gate must have the Scalar of its experts");

 public:
  using Expert = Expert_;                                          ///< see Expert
  using Gate = Gate_;                                              ///< see the concept Gate
  using DispatchPolicy = Dispatch_;                                ///< see LocalDispatch
  using Scalar = typename Expert::Scalar;                          ///< float or double
  using LossWeights = typename detail::LossWeightsOf<Gate>::type;  ///< the gate's

  /// The same layer with another dispatch policy.
  template <class OtherDispatch>
  using WithDispatch = MoELayer<Expert, Gate, OtherDispatch>;

  using Config = MoELayerConfig<Expert, Gate>;  ///< see MoELayerConfig

  /// What forward() saves for backward(), and the results of a pass. A tape holds one pass: to call
  /// forward() several times before backward(), use several tapes.
  struct Tape {
    typename Gate::Tape gate;            ///< the gate's tape, with the routing and its balance
    Dispatch<Scalar> dispatch;           ///< the slots by expert
    detail::ExpertTape<Expert> experts;  ///< what the experts save, and scratch
    typename DispatchPolicy::template Tape<Expert> exchange;  ///< the dispatch policy's tape
    Matrix<Scalar> x;                                         ///< T x D, a copy
    Matrix<Scalar> y;                                         ///< T x D, the result
    Matrix<Scalar> dx;            ///< T x D, the gradient with respect to x
    bool trained = false;         ///< whether the last pass was a forward() that completed
    std::uint64_t structure = 0;  ///< of the layer in the last forward(): which experts it had
    Index networks = 0;           ///< the number of experts that were not the identity

    Matrix<Scalar> combined;   ///< T x D, y before the output activation, if there is one
    Matrix<Scalar> dcombined;  ///< T x D, the gradient with respect to it
    IndexedVector<Scalar> sorted_dweight;  ///< S, the gradients of the weights by expert
    IndexedVector<Scalar> dweight;         ///< S, by slot

    /// The slots of the last pass.
    const Routing<Scalar>& routing() const { return gate.routing; }
    /// The losses and the figures to watch of the last pass.
    const Balance<Scalar>& balance() const { return gate.balance; }
  };

  /// Throws std::invalid_argument for a configuration out of range.
  explicit MoELayer(const Config& config, DispatchPolicy policy = DispatchPolicy());

  /// A layer made of an existing gate and existing experts: those of this process, see experts().
  /// Throws std::invalid_argument for a configuration out of range, or if they do not fit it.
  MoELayer(const Config& config, Gate gate, std::vector<Expert> experts,
           DispatchPolicy policy = DispatchPolicy())
      : policy_(std::move(policy)),
        config_(policy_.together("MoELayer::MoELayer", [&] { return completed(config); })),
        gate_(policy_.together("MoELayer: the gate",
                               [&] { return checked(std::move(gate), config_); })),
        experts_(std::move(experts)) {
    if constexpr (detail::ChangesExperts<Gate>) config_.gate = gate_.config();
    policy_.place(config_, gate_, networks());
    policy_.together("MoELayer: the experts", [&] {
      const Range here = policy_.experts_here(networks());
      detail::require(static_cast<Index>(experts_.size()) == here.count,
                      "MoELayer: ", experts_.size(), " experts, must be ", here.count,
                      " in this process");
      for (const Expert& expert : experts_) {
        detail::require(expert.width() == config_.width, "MoELayer: an expert of width ",
                        expert.width(), ", Config.width = ", config_.width);
      }
    });
    // The gate and the experts may come from a layer whose experts were changed.
    mark_structure(gate_);
    for (Expert& expert : experts_) mark_structure(expert);
  }

  /// The configuration with the layer's width in place of widths of 0. Throws std::invalid_argument for
  /// one out of range.
  static Config completed(Config config) {
    detail::require(config.width >= 1, "MoELayer::Config.width = ", config.width,
                    ", must be at least 1");
    detail::complete_width("MoELayer", "expert", config.width, config.expert.width);
    detail::complete_width("MoELayer", "gate", config.width, config.gate.width);
    detail::require_activation("MoELayer::Config.output", config.output);
    return config;
  }

  /// The configuration as it is now, completed().
  const Config& config() const { return config_; }
  /// The gate. To change its parameters or those of the experts, use for_each_parameter().
  const Gate& gate() const { return gate_; }
  /// The experts of this process: with LocalDispatch, all.
  std::span<const Expert> experts() const { return experts_; }
  /// Where the experts are.
  const DispatchPolicy& dispatch_policy() const { return policy_; }

  /// Training pass over x (T x D); returns tape.y (T x D). The losses and the figures to watch are
  /// in tape.balance(). Give every update its own step: the same step draws the same noise.
  /// O(S·D·H), and what the gate costs. x may be tape.x as a whole, or any part of tape.y. Throws
  /// std::invalid_argument when x is not D wide or the pass does not fit x. Also throws it when x
  /// is only a part of tape.x, when the gate refuses the pass, or when its routing contradicts
  /// itself; then backward() refuses the tape until another forward().
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape, const Pass& pass) const;

  /// Takes dy, the gradient of the loss with respect to y (T x D), after forward() on the same tape.
  /// Adds to every parameter's gradient, the gate's own losses included once; returns the gradient
  /// with respect to x (T x D), which is tape.dx. The parameters must be those of the forward pass.
  /// Throws std::invalid_argument, before anything is changed, when dy has another shape than y or
  /// overlaps tape.dx or tape.dcombined, or when the tape does not hold a forward pass of a layer of this
  /// shape. (That it was this layer's is not checked.) A second backward() on a tape adds the same gradients
  /// once more. std::bad_alloc, which only the first pass of its shapes can throw, can leave gradients that
  /// were added to in part: zero them before going on.
  const Matrix<Scalar>& backward(const MatrixRef<Scalar>& dy, Tape& tape);

  /// Inference over x (T x D): returns tape.y (T x D), without noise. Sets tape.routing() and
  /// tape.balance() too, so that they can be watched, but saves nothing for backward(). Throws
  /// std::invalid_argument when x is not D wide, when the pass does not fit x, when x overlaps tape.y or
  /// tape.combined, or when the gate refuses the pass or its routing contradicts itself.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape,
                                 const EvaluationPass& pass = {}) const;
  /// The same with a tape of its own, which allocates.
  Matrix<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    evaluate(x, tape);
    return std::move(tape.y);
  }

  /// Puts an expert with the same shapes in the place of expert `e`, one of this process. Throws
  /// std::invalid_argument if `e` is not one of this process, or if a parameter has another shape.
  void replace_expert(Index e, const Expert& expert) {
    const Range here = policy_.experts_here(networks());
    detail::require(e >= here.first && e < here.first + here.count,
                    "MoELayer::replace_expert: expert = ", e,
                    ", must be one of this process and below ", networks());
    Expert& replaced = experts_[detail::to_size(e - here.first)];
    detail::check_same_shapes(replaced, expert,
                              "MoELayer::replace_expert: experts." + std::to_string(e) + '.');
    replaced = expert;
    detail::track_gradients(replaced);
    mark_structure(replaced);
  }

  /// \name Adding, copying and removing experts
  ///
  /// For gates that have change_experts(), see Gate. The experts that stay keep their order and every
  /// bit, and so do their columns of the gate; gradients are zero afterwards, and config() has the new
  /// number of experts. backward() refuses a tape from before the change. Pass the returned change
  /// to the optimizer: optimizer.follow(model, layer, change). Each throws std::invalid_argument,
  /// with nothing changed, if the gate or its Config cannot have these experts, if `experts` is empty
  /// or names one that does not exist or is the identity, if remove_experts() gets one twice or
  /// would leave none, if `count` is below 1, or if noise_stddev is negative or not finite.
  /// \{

  /// Adds `count` fresh experts after the others. Equal seeds draw equal numbers: give every layer
  /// and every call a seed of its own.
  template <detail::ChangesExperts G = Gate>
  ExpertChange add_experts(Index count, Seed seed) {
    constexpr const char* verb = "MoELayer::add_experts";
    return change_experts(verb, {seed},
                          [&](Index before) { return detail::add_sources(verb, before, count); });
  }

  /// Adds a copy of each of these experts after the others, with normal noise of the given standard
  /// deviation on its parameters and on its weights in the gate. Parameters that are frozen in the
  /// original are frozen in the copy. An expert may be named more than once.
  template <detail::ChangesExperts G = Gate>
  ExpertChange copy_experts(const std::vector<Index>& experts, const CopyNoise& noise) {
    constexpr const char* verb = "MoELayer::copy_experts";
    return change_experts(verb, {noise.seed, noise.noise_stddev}, [&](Index before) {
      return detail::copy_sources(verb, before, experts);
    });
  }

  /// Removes these experts; the others move up.
  template <detail::ChangesExperts G = Gate>
  ExpertChange remove_experts(const std::vector<Index>& experts) {
    constexpr const char* verb = "MoELayer::remove_experts";
    return change_experts(
        verb, {0}, [&](Index before) { return detail::remove_sources(verb, before, experts); });
  }
  /// \}

  /// Changes the weights of the gate's losses from the next pass on, for a schedule. Throws
  /// std::invalid_argument for one out of range.
  template <class G = Gate>
  requires requires(G& gate, const LossWeights& weights) { gate.set_loss_weights(weights); }
  void set_loss_weights(const LossWeights& weights) {
    static_assert(detail::check_loss_weights_requirements<G>());
    gate_.set_loss_weights(weights);
    // Files of the layer store config(), so it must follow.
    config_.gate = gate_.config();
  }

  /// Moves the gate's selection bias, after each update: see TopKGate::update_selection_bias().
  /// This one uses the load of one training pass.
  template <class G = Gate>
  requires requires(G& gate, const typename G::Tape& tape) { gate.update_selection_bias(tape); }
  void update_selection_bias(const Tape& tape) { gate_.update_selection_bias(tape.gate); }
  /// The same given the load (E) of all passes of the update.
  template <class G = Gate>
  requires requires(G& gate, const Vector<Scalar>& load) { gate.update_selection_bias(load); }
  void update_selection_bias(const Vector<Scalar>& load) { gate_.update_selection_bias(load); }

  /// "gate.weight", "gate.noise_weight", "experts.0.up.weight", ...
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    self.policy_.visit_parts(self.gate_, self.experts_, visit);
  }

 private:
  static Gate checked(Gate gate, const Config& config) {
    detail::require(gate.experts() >= 1, "MoELayer: the gate has ", gate.experts(),
                    " experts, must be at least 1");
    detail::require(config.identity_experts >= 0 && config.identity_experts < gate.experts(),
                    "MoELayer::Config.identity_experts = ", config.identity_experts,
                    ", must be at least 0 and below the gate's ", gate.experts(), " experts");
    return gate;
  }

  /// The number of experts that are not the identity.
  Index networks() const { return gate_.experts() - config_.identity_experts; }

  /// A layer that was moved from has no experts.
  void check_structure() const {
    const Range here = policy_.experts_here(networks());
    detail::require(static_cast<Index>(experts_.size()) == here.count,
                    "MoELayer: ", experts_.size(), " experts where there should be ", here.count,
                    ": the layer was moved from");
  }

  /// Adds, copies or removes experts: make_sources(experts) lists where the experts after the
  /// change come from.
  template <class F>
  ExpertChange change_experts(const char* verb, const detail::ChangeDraws& draws,
                              F&& make_sources) {
    using Changed = detail::ChangedExperts<Expert, DispatchPolicy>;
    ExpertChange change;
    std::optional<ExpertSources> sources;
    std::optional<Gate> gate;
    std::optional<typename Changed::Placement> placement;
    std::optional<Changed> changed;
    policy_.together(verb, [&] {
      check_structure();
      draws.check(verb);
      sources.emplace(verb, make_sources(networks()), networks());
      const ExpertSources gate_sources = with_identity_experts(verb, *sources);
      gate.emplace(gate_);
      change.parameters =
          gate->change_experts(gate_sources, derive_seed(draws.seed, 0), draws.noise_stddev);
      detail::require(gate->experts() == gate_sources.experts(), verb, ": the gate has ",
                      gate->experts(), " experts afterwards, not ", gate_sources.experts());
      placement.emplace(policy_.placement_for(*gate, sources->experts()));
      change.structure_before = structure_;
      change.structure = detail::next_structure(structure_, *sources);
      change.sources = sources->list();
      const auto gate_parameters = detail::count_parameters(gate_);
      changed.emplace(policy_, *placement, *sources, config_.expert, draws, gate_parameters,
                      experts(), change);
    });
    policy_.agree_on_change(verb, change.structure, draws);
    policy_.exchange(verb, true, changed->sent, changed->received);
    changed->unpack();

    changed->take(experts_);
    gate_ = std::move(*gate);
    config_.gate = gate_.config();
    policy_.set_placement(*placement);
    structure_ = change.structure;
    has_gradients_ = false;
    for (Expert& expert : experts_) mark_structure(expert);
    mark_structure(gate_);
    zero_gradients(*this, Updates::lazy);
    return change;
  }
  /// The sources of the gate's experts: the identity stays after the networks.
  ExpertSources with_identity_experts(const char* verb, const ExpertSources& sources) const {
    std::vector<Index> list = sources.list();
    for (Index e = networks(); e < gate_.experts(); ++e) list.push_back(e);
    return ExpertSources(verb, std::move(list), gate_.experts());
  }
  template <class Module>
  void mark_structure(Module& module) const {
    detail::walk_parameters(module,
                            [&](const ParameterName&, auto& p) { p.structure = structure_; });
  }

  template <class F>
  auto begin(const char* verb, bool training, const Pass& pass, Index rows, Tape& tape,
             F&& check) const {
    return policy_.begin(verb, gate_, training, pass, rows, tape.dispatch, tape.exchange, check);
  }

  void sort_slots(Index rows, std::span<const std::uint8_t> valid, Tape& tape) const {
    detail::check_made_by_gate(tape.gate.routing, gate_.experts(), rows, valid);
    sort_by_expert(tape.gate.routing, tape.dispatch);
  }

  /// y = act(Σ G·experts(x)), x being T x D.
  void run_experts(const MatrixRef<Scalar>& x, Tape& tape, bool save) const {
    const bool has_activation = config_.output != Activation::identity;
    Matrix<Scalar>& sum = has_activation ? tape.combined : tape.y;
    policy_.forward(experts(), x, save, tape.dispatch, tape.experts, tape.exchange, sum, [&] {
      detail::resize_to_zero(sum, x.rows(), config_.width);
      if (has_activation) detail::resize(tape.y, x.rows(), config_.width);
    });
    if (config_.identity_experts > 0) {
      detail::add_identity_experts<Scalar>(tape.dispatch, networks(), x, sum);
    }
    if (has_activation) detail::activate_output(config_.output, sum, tape.y);
  }

  /// The share of the identity in dx and in the gradients of the slots' weights.
  void identity_backward(const MatrixRef<Scalar>& dy, Tape& tape) const {
    if (config_.identity_experts == 0) return;
    const bool has_activation = config_.output != Activation::identity;
    const MatrixRef<Scalar> dsum = has_activation ? MatrixRef<Scalar>(tape.dcombined) : dy;
    detail::identity_weight_gradients<Scalar>(tape.dispatch, networks(), tape.x, dsum,
                                              tape.sorted_dweight);
    detail::add_identity_experts<Scalar>(tape.dispatch, networks(), dsum, tape.dx);
  }

  /// Throws before anything is changed, and makes room.
  void prepare_backward(const MatrixRef<Scalar>& dy, Tape& tape) {
    check_structure();
    detail::require(tape.trained, "MoELayer::backward without a forward pass on this tape");
    detail::check_layer_width<Scalar>(dy, "dy", config_.width);
    const Index tokens = tape.x.rows();
    detail::require(dy.rows() == tokens, "MoELayer: dy has ", dy.rows(), " rows, y has ", tokens);
    detail::require(
        tape.routing().experts == gate_.experts() && tape.x.cols() == config_.width &&
            (experts_.empty() || tape.experts.saved_width == experts_.front().tape_width()),
        "MoELayer::backward: the tape is another layer's, of ", tape.routing().experts,
        " experts and width ", tape.x.cols());
    detail::require(tape.networks == networks(),
                    "MoELayer::backward: the tape is another layer's, of ", tape.networks,
                    " experts that are not the identity");
    detail::require(tape.structure == structure_,
                    "MoELayer::backward: the tape is of other experts: some were added, copied or"
                    " removed after its forward pass");
    if constexpr (requires { gate_.check_tape(tape.gate); }) gate_.check_tape(tape.gate);
    detail::require_apart("MoELayer::backward", "dy", dy, {tape.dx, tape.dcombined});
    if (!has_gradients_) detail::reserve_gradients(*this);
    has_gradients_ = true;
    detail::resize_to_zero(tape.dx, tokens, config_.width);
    detail::resize(tape.sorted_dweight, tape.dispatch.slots());
    detail::resize(tape.dweight, tape.dispatch.slots());
  }

  DispatchPolicy policy_;
  Config config_;
  Gate gate_;
  std::vector<Expert> experts_;  ///< those of this process
  std::uint64_t structure_ = 0;  ///< of the parameters; every change gives a new number
  bool has_gradients_ = false;   ///< a first backward pass has made room for them
};

// Out of the class, so that they are not inline: a program that links moe::compiled does not even
// instantiate them.

template <class Expert_, class Gate_, class Dispatch_>
MoELayer<Expert_, Gate_, Dispatch_>::MoELayer(const Config& config, DispatchPolicy policy)
    : policy_(std::move(policy)),
      config_(policy_.together("MoELayer::MoELayer", [&] { return completed(config); })),
      gate_(policy_.together("MoELayer: the gate", [&] {
        return checked(Gate(config_.gate, detail::gate_seed(config.seed)), config_);
      })) {
  if constexpr (detail::ChangesExperts<Gate>) config_.gate = gate_.config();  // completed too
  policy_.place(config_, gate_, networks());
  policy_.together("MoELayer: the experts", [&] {
    const Range here = policy_.experts_here(networks());
    experts_.reserve(detail::to_size(here.count));
    for (Index e = here.first; e < here.first + here.count; ++e) {
      experts_.emplace_back(config_.expert,
                            derive_seed(config.seed, static_cast<std::uint64_t>(e) + 1));
    }
  });
}

template <class Expert_, class Gate_, class Dispatch_>
auto MoELayer<Expert_, Gate_, Dispatch_>::forward(const MatrixRef<Scalar>& x, Tape& tape,
                                                  const Pass& pass) const -> const Matrix<Scalar>& {
  const auto check = [&] {
    check_structure();
    detail::check_layer_width<Scalar>(x, "x", config_.width);
    detail::check_pass("MoELayer", pass, x.rows());
  };
  const auto batch = begin("MoELayer::forward", true, pass, x.rows(), tape, check);
  tape.trained = false;
  policy_.route(tape.dispatch, tape.exchange, [&] {
    detail::copy_matrix(x, tape.x);
    gate_.forward(tape.x, tape.gate, batch.pass());
    sort_slots(tape.x.rows(), pass.valid, tape);
  });
  run_experts(tape.x, tape, true);
  tape.structure = structure_;
  tape.networks = networks();
  tape.trained = true;
  return tape.y;
}

template <class Expert_, class Gate_, class Dispatch_>
auto MoELayer<Expert_, Gate_, Dispatch_>::backward(const MatrixRef<Scalar>& dy, Tape& tape)
    -> const Matrix<Scalar>& {
  policy_.backward(gate_, std::span<Expert>(experts_), tape.x, tape.dispatch, tape.experts,
                   tape.exchange, tape.sorted_dweight, tape.dx, [&] {
                     prepare_backward(dy, tape);
                     return detail::activate_output_backward(config_.output, tape.combined, dy,
                                                             tape.dcombined);
                   });
  policy_.gate_backward(gate_, tape.exchange, [&] {
    identity_backward(dy, tape);
    sort_by_expert_backward(tape.dispatch, std::span<const Scalar>(tape.sorted_dweight),
                            tape.dweight);
    gate_.backward(tape.x, std::span<const Scalar>(tape.dweight), tape.gate, tape.dx);
    detail::check_left_by_gate(tape.dx, tape.x.rows(), config_.width);
  });
  return tape.dx;
}

template <class Expert_, class Gate_, class Dispatch_>
auto MoELayer<Expert_, Gate_, Dispatch_>::evaluate(const MatrixRef<Scalar>& x, Tape& tape,
                                                   const EvaluationPass& pass) const
    -> const Matrix<Scalar>& {
  const Pass as_pass{
      .step = 0, .valid = pass.valid, .batch = pass.batch, .sequences = pass.sequences};
  const auto check = [&] {
    check_structure();
    detail::check_layer_width<Scalar>(x, "x", config_.width);
    detail::check_pass("MoELayer", as_pass, x.rows());
    detail::require_apart("MoELayer::evaluate", "x", x, {tape.y, tape.combined});
  };
  const auto batch = begin("MoELayer::evaluate", false, as_pass, x.rows(), tape, check);
  tape.trained = false;
  policy_.route(tape.dispatch, tape.exchange, [&] {
    gate_.evaluate(
        x, tape.gate,
        EvaluationPass{
            .valid = pass.valid, .batch = batch.pass().batch, .sequences = pass.sequences});
    sort_slots(x.rows(), pass.valid, tape);
  });
  run_experts(x, tape, false);
  return tape.y;
}

}  // namespace moe
