#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <vector>

#include "moe/experts/expert_change.hpp"
#include "moe/parameter.hpp"
#include "moe/routing/balance_loss.hpp"
#include "moe/routing/config_checks.hpp"
#include "moe/routing/pass.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// The concept Gate: what a layer needs of a gate, of the library's and of a user's own.

namespace moe {

/// The result of a gate's pass and what it saves for backward; the Tape of each gate derives from it.
template <class Scalar>
struct GateTape {
  Routing<Scalar> routing;  ///< the slots
  Balance<Scalar> balance;  ///< importance, load and the gate's losses
  bool trained = false;     ///< whether the last pass was a forward() that completed

  // Saved by the library's gates, see detail::GateBase.
  ValidTokens tokens;     ///< the rows of x that are not padding
  double loss_scale = 1;  ///< Pass::loss_scale
};

/// A gate makes a Routing, and takes the gradient of the loss w.r.t. the slots' weights in
/// backward. It is made by Gate(config, seed). It has the types Scalar, Config and Tape, which derives from
/// GateTape<Scalar>, and with set_loss_weights() a type LossWeights.
///
///     experts()                        const; E, the number of experts
///     forward(x, tape, pass)           const; training: sets tape.routing and tape.balance
///     evaluate(x, tape, pass)          const; serving: the same without noise; pass is an
///                                      EvaluationPass
///     backward(x, dweight, tape, dx)   after forward, with the same x: dweight is S numbers, the
///                                      gradient of the loss with respect to the weight of each
///                                      slot; adds to the gradients of the gate's parameters, its
///                                      own losses included, and the gate's share to dx (T x D)
///
/// A gate saves no copy of x: the layer has one. A row that is not valid (Pass::valid) gets no slot.
///
/// These are optional:
///
///     check_tape(tape)                 const; throws if backward() would refuse the tape; the layer
///                                      calls it before it changes anything
///     experts_together()               const; the number of consecutive experts that
///                                      mpi::RankDispatch should place on the same rank, by default 1
///     shared_experts()                 const; the number of experts, the first ones, that get every
///                                      token, which are placed on rank 0, by default 0
///     set_loss_weights(LossWeights)    changes the weights of the gate's losses between updates. Needs
///                                      config()
///     update_selection_bias(tape)      moves the gate's selection bias after an update of the weights
///     config()                         const; its Config, as it is now
///     noise_columns()                  const; the number of values of Pass::noise for a row of x. Without
///                                      it a SharedExpertGate around the gate refuses Pass::noise
///     change_experts(sources, seed, noise_stddev)
///                                      adds, copies and removes experts as listed in `sources`: in the
///                                      Config, and in each parameter that has a column per expert.
///                                      Columns of experts that stay keep their bits, columns of
///                                      copies get normal noise, those of fresh experts are drawn from
///                                      the seed. Gradients are zero afterwards. Returns a
///                                      std::vector<ParameterSource>, an entry for each parameter, in
///                                      their order. Throws std::invalid_argument, with nothing
///                                      changed, if it cannot. Needs config(). Without it, experts
///                                      cannot be added to the layer or removed.
///
/// Its Config has a member `width`; a width of 0 stands for the layer's. It names its parameters in
/// visit_parameters(self, visit), see for_each_parameter().
// clang-format off
template <class G>
concept Gate =
    requires {
      typename G::Scalar;
      typename G::Config;
      typename G::Tape;
    } &&
    std::derived_from<typename G::Tape, GateTape<typename G::Scalar>> &&
    std::constructible_from<G, const typename G::Config&, std::uint64_t> &&
    requires(const G& gate, G& trained, typename G::Config config, typename G::Tape& tape,
             const MatrixRef<typename G::Scalar>& x, std::span<const typename G::Scalar> dweight,
             Matrix<typename G::Scalar>& dx) {
      { config.width } -> std::convertible_to<Index>;
      { gate.experts() } -> std::same_as<Index>;
      gate.forward(x, tape, Pass{.step = 0});
      gate.evaluate(x, tape, EvaluationPass{});
      trained.backward(x, dweight, tape, dx);
      G::visit_parameters(trained, detail::AnyVisitor{});
    };
// clang-format on

namespace detail {

/// A gate with change_experts().
template <class G>
concept ChangesExperts = requires(G& gate, const G& constant, const ExpertSources& sources,
                                  std::uint64_t seed) {
  { constant.config() } -> std::convertible_to<typename G::Config>;
  { gate.change_experts(sources, seed, 0.0) } -> std::convertible_to<std::vector<ParameterSource>>;
};

template <class Derived, class Scalar_>
class GateBase;
/// A gate of this library, which lists the functions of SharedBatch it calls, see SharedCalls. A
/// class that derives from such a gate does not count, since it may call other functions.
template <class G>
concept NamesSharedCalls = std::derived_from<G, GateBase<G, typename G::Scalar>> &&
    requires(const G& gate) {
  { gate.shared_calls(true, Index{0}, Index{0}) } -> std::same_as<SharedCalls>;
};
template <class G>
SharedCalls shared_calls_of(const G& gate, bool training, Index rows, Index sequences) {
  if constexpr (NamesSharedCalls<G>) return gate.shared_calls(training, rows, sequences);
  return {};
}

/// The LossWeights of a gate without losses.
struct NoLossWeights {};
template <class G>
struct LossWeightsOf {
  using type = NoLossWeights;
};
template <class G>
requires requires { typename G::LossWeights; }
struct LossWeightsOf<G> {
  using type = typename G::LossWeights;
};

/// The compile error for a gate whose loss weights can be changed, but that cannot say what they are now.
template <class G>
constexpr bool check_loss_weights_requirements() {
  static_assert(
      requires(const G& gate) {
        { gate.config() } -> std::convertible_to<typename G::Config>;
      },
      "a gate with set_loss_weights must have config() const, its Config with the loss weights as "
      "they are now, for files");
  return true;
}

/// The compile errors for a class that is not a Gate: a message for each missing member.
template <class G>
constexpr bool check_gate_requirements() {
  static_assert(HasScalar<G>, "a gate must have a type Scalar");
  static_assert(HasConfig<G>, "a gate must have a type Config");
  static_assert(HasTape<G>, "a gate must have a type Tape");
  if constexpr (HasScalar<G> && HasConfig<G> && HasTape<G>) {
    using S = typename G::Scalar;
    using Tape = typename G::Tape;
    static_assert(std::derived_from<Tape, GateTape<S>>,
                  "a gate's Tape must derive from moe::GateTape<Scalar>");
    static_assert(std::constructible_from<G, const typename G::Config&, std::uint64_t>,
                  "a gate must have a constructor (const Config&, std::uint64_t seed)");
    static_assert(
        requires(typename G::Config config) {
          { config.width } -> std::convertible_to<Index>;
        },
        "a gate's Config must have a member moe::Index width");
    static_assert(
        requires(const G& gate) {
          { gate.experts() } -> std::same_as<Index>;
        },
        "a gate must have moe::Index experts() const");
    static_assert(
        requires(const G& gate, const MatrixRef<S>& x, Tape& tape) {
          gate.forward(x, tape, Pass{.step = 0});
        },
        "a gate must have forward(const MatrixRef<Scalar>& x, Tape&, const moe::Pass&) const");
    static_assert(
        requires(const G& gate, const MatrixRef<S>& x, Tape& tape) {
          gate.evaluate(x, tape, EvaluationPass{});
        },
        "a gate must have evaluate(const MatrixRef<Scalar>& x, Tape&, const moe::EvaluationPass&) "
        "const");
    static_assert(
        requires(G & gate, const MatrixRef<S>& x, std::span<const S> dweight, Tape& tape,
                 Matrix<S>& dx) { gate.backward(x, dweight, tape, dx); },
        "a gate must have backward(const MatrixRef<Scalar>& x, std::span<const Scalar> "
        "dweight, Tape&, moe::Matrix<Scalar>& dx), which adds to dx");
    static_assert(
        requires(G & gate) { G::visit_parameters(gate, AnyVisitor{}); },
        "a gate must have a static visit_parameters(self, visit)");
  }
  return true;
}

template <class G>
void check_gate_input(const G& gate, const char* name, const MatrixRef<typename G::Scalar>& x) {
  require(x.cols() == gate.config().width, name, ": x has ", x.cols(),
          " columns, Config.width = ", gate.config().width);
  check_shapes(gate, name);
}

// The arguments of every gate's forward() and evaluate(), which are checked before anything is changed.

template <class G>
void check_gate_forward(const G& gate, const char* name, const MatrixRef<typename G::Scalar>& x,
                        const Pass& pass) {
  check_gate_input(gate, name, x);
  check_pass(name, pass, x.rows());
  if constexpr (requires { gate.noise_columns(); }) {
    check_noise(name, pass, x.rows(), gate.noise_columns());
  }
  if constexpr (requires { gate.check_forward(x, pass); }) gate.check_forward(x, pass);
}
template <class G>
void check_gate_evaluate(const G& gate, const char* name, const MatrixRef<typename G::Scalar>& x,
                         const EvaluationPass& pass) {
  check_gate_input(gate, name, x);
  check_valid(name, pass.valid, x.rows());
  check_sequences(name, pass.sequences);
  if constexpr (requires { gate.check_evaluate(x, pass); }) gate.check_evaluate(x, pass);
}

/// Checks the arguments of every gate's backward(), before it changes anything.
template <class Scalar>
void check_gate_backward(const char* name, Index width, const MatrixRef<Scalar>& x,
                         std::span<const Scalar> dweight, const GateTape<Scalar>& tape,
                         const Matrix<Scalar>& dx) {
  const Index tokens = tape.routing.tokens();
  require(x.rows() == tokens && x.cols() == width, name, "::backward: x is ", x.rows(), " x ",
          x.cols(), ", in forward() it was ", tokens, " x ", width);
  require(static_cast<Index>(dweight.size()) == tape.routing.slots(), name,
          "::backward: dweight has ", dweight.size(), " entries for ", tape.routing.slots(),
          " slots");
  require(dx.rows() == tokens && dx.cols() == width, name, "::backward: dx is ", dx.rows(), " x ",
          dx.cols(), ", x is ", tokens, " x ", width);
  require_apart(name, "x", x, {dx});
}

/// What the library's gates have in common. `Derived` has a `name` for messages, a Config with a width,
/// check_tape(), and:
///
///     check_forward(x, pass) const              checks that only this gate makes, before forward()
///                                               changes the tape
///     check_evaluate(x, pass) const             the same of evaluate()
///     route(x, pass, tape) const                for a Pass and for an EvaluationPass: sets
///                                               tape.routing and tape.balance, of the rows in
///                                               tape.tokens
///     route_backward(x, dweight, tape, dx)      backward, for arguments that fit the tape
///     shared_calls(training, rows, sequences) const
///                                               the SharedCalls of forward() or evaluate() on a batch
///                                               of this number of rows, given Pass::sequences
template <class Derived, class Scalar_>
class GateBase {
 public:
  using Scalar = Scalar_;

  /// Checks that only this gate makes: none by default.
  void check_forward(const MatrixRef<Scalar>&, const Pass&) const {}
  void check_evaluate(const MatrixRef<Scalar>&, const EvaluationPass&) const {}  ///< the same

  /// The number of values of Pass::noise for a row of x.
  Index noise_columns() const { return 0; }

  /// Training pass over x (T x D). Give every update its own step: the same step draws the same
  /// noise. Throws std::invalid_argument, with the tape unchanged, when x is not D wide, the pass
  /// does not fit x, or a parameter no longer has its original shape. O(T·D·E) unless the class
  /// says otherwise.
  template <class Tape>
  const Routing<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape, const Pass& pass) const {
    check_gate_forward(self(), Derived::name, x, pass);
    tape.trained = false;
    tape.loss_scale = pass.loss_scale;
    find_valid_tokens(x.rows(), pass.valid, pass.batch, tape.tokens);
    self().route(x, pass, tape);
    tape.trained = true;
    return tape.routing;
  }

  /// Routing without noise, and its balance. Saves nothing for backward(). Throws
  /// std::invalid_argument, with the tape unchanged, when x is not D wide, the pass does not fit x,
  /// or a parameter no longer has its original shape.
  template <class Tape>
  const Routing<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape,
                                  const EvaluationPass& pass = {}) const {
    check_gate_evaluate(self(), Derived::name, x, pass);
    tape.trained = false;
    tape.loss_scale = 1;
    find_valid_tokens(x.rows(), pass.valid, pass.batch, tape.tokens);
    self().route(x, pass, tape);
    return tape.routing;
  }
  /// The same with a tape of its own; returns a copy of the routing.
  Routing<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    typename Derived::Tape tape;
    return evaluate(x, tape);
  }

  /// Takes the x of forward() and dweight (S), the gradient of the loss with respect to the weight of
  /// each slot. Adds to the gradients of the parameters and to dx (T x D), the gate's own losses
  /// included once. At fixed noise and choice this is the exact derivative. dweight must not
  /// overlap the tape. Throws std::invalid_argument, before anything is changed, when the last pass
  /// on the tape was no forward(), an argument or the shape of a parameter does not fit the tape,
  /// or x overlaps dx.
  template <class Tape>
  void backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                Matrix<Scalar>& dx) {
    self().check_tape(tape);
    check_gate_backward(Derived::name, self().config().width, x, dweight, tape, dx);
    self().route_backward(x, dweight, tape, dx);
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
  Derived& self() { return static_cast<Derived&>(*this); }
};

}  // namespace detail
}  // namespace moe
