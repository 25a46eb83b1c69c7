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
/// What the layer needs of a gate. NoisyTopKGate is one; a user's own class is as good.

namespace moe {

/// What every gate leaves behind; a gate's own Tape derives from it.
template <class Scalar>
struct GateTape {
  Routing<Scalar> routing;  ///< the slots
  Balance<Scalar> balance;  ///< importance, load and their loss
  bool trained = false;     ///< whether the last pass was a forward() that ended well

  // What this library's gates keep of the pass, see detail::GateBase.
  detail::ValidTokens tokens;  ///< the rows of x that are no padding
  double loss_scale = 1;       ///< Pass::loss_scale
};

/// A gate makes a Routing and takes back the gradient of its weights.
///
///     forward(x, tape, pass)           const; training: sets tape.routing and tape.balance
///     evaluate(x, tape, pass)          const; serving: the same without noise; pass is an
///                                      EvaluationPass
///     backward(x, dweight, tape, dx)   after forward, with the same x: dweight is S numbers, the
///                                      gradient of the loss with respect to the weight of each
///                                      slot; adds to the gradients of the gate's parameters, its
///                                      own losses included, and the gate's share to dx (T x D)
///
/// A gate keeps no copy of x: the layer has one. A row that the pass says is not valid gets no slot.
///
/// It may have, and the layer uses where it is there:
///
///     check_tape(tape)                 const; throws where backward() would not take the tape; the
///                                      layer calls it before it changes anything
///     experts_together()               const; how many experts in a row mpi::RankDispatch should
///                                      place on one rank, 1 where it is missing
///     shared_experts()                 const; how many experts, the first ones, get every token,
///                                      which are placed apart, 0 where it is missing
///     set_loss_weights(LossWeights)    changes the weights of the gate's losses between updates
///     update_selection_bias(tape)      what a gate does after an update of the weights
///     config()                         const; its Config, as it is now
///     change_experts(sources, seed, noise_stddev)
///                                      with config(): gives the gate other experts, as ExpertSources
///                                      lists them, in its Config and in what its parameters have an
///                                      expert: those of before keep their bits, a copy's get normal
///                                      noise, fresh ones begin anew, drawn by the seed. Gradients are
///                                      zero afterwards. Returns a std::vector<ParameterSource>, an
///                                      entry for each parameter, in their order. Throws
///                                      std::invalid_argument, with nothing changed, where it cannot.
///                                      Without it the layer's experts cannot come and go.
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

/// A gate whose experts can come and go.
template <class G>
concept ChangesExperts = requires(G& gate, const G& constant, const ExpertSources& sources,
                                  std::uint64_t seed) {
  { constant.config() } -> std::convertible_to<typename G::Config>;
  { gate.change_experts(sources, seed, 0.0) } -> std::convertible_to<std::vector<ParameterSource>>;
};

template <class Derived, class Scalar_>
class GateBase;
/// A gate of this library, which says what it calls of a SharedBatch, see SharedCalls. A class that
/// derives from one may call more, so it is not asked.
template <class G>
concept NamesSharedCalls = std::derived_from<G, GateBase<G, typename G::Scalar>> &&
    requires(const G& gate) {
  { gate.shared_calls(true, Index{0}) } -> std::same_as<SharedCalls>;
};
template <class G>
SharedCalls shared_calls_of(const G& gate, bool training, Index rows) {
  if constexpr (NamesSharedCalls<G>) return gate.shared_calls(training, rows);
  return {};
}

/// Of a gate without losses.
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

/// What MoELayer says when a class is no Gate: one message for each thing that can be missing.
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

/// What backward() of every gate needs of its arguments, before it changes anything.
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

/// The verbs that this library's gates have alike. `Derived` has a `name` for messages, a Config with
/// a width, check_tape(), and what is different:
///
///     check_forward(x, pass) const              throws for what only this gate minds
///     route(x, pass, tape) const                of a Pass and of an EvaluationPass: tape.routing and
///                                               tape.balance, of the rows in tape.tokens
///     route_backward(x, dweight, tape, dx)      of arguments that fit the tape
///     shared_calls(training, rows) const        of forward() or evaluate() on a batch of these rows
template <class Derived, class Scalar_>
class GateBase {
 public:
  using Scalar = Scalar_;

  /// Throws what only this gate's forward() would, besides what every gate checks.
  void check_forward(const MatrixRef<Scalar>&, const Pass&) const {}

  /// Numbers of Pass::noise for a row of x.
  Index noise_columns() const { return 0; }

  /// Training pass over x (T x D). Give every update its own step: the same one draws the same
  /// noise. Throws std::invalid_argument when x is not D wide or the pass does not fit it; then the
  /// tape is as good as before. O(T·D·E), and as the class says.
  template <class Tape>
  const Routing<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape, const Pass& pass) const {
    check_gate_input(self(), Derived::name, x);
    check_pass(Derived::name, pass, x.rows());
    check_noise(Derived::name, pass, x.rows(), self().noise_columns());
    self().check_forward(x, pass);
    tape.trained = false;
    tape.loss_scale = pass.loss_scale;
    find_valid_tokens(x.rows(), pass.valid, pass.batch, tape.tokens);
    self().route(x, pass, tape);
    tape.trained = true;
    return tape.routing;
  }

  /// Routing without noise, and its balance. Leaves nothing that backward() could use.
  template <class Tape>
  const Routing<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape,
                                  const EvaluationPass& pass = {}) const {
    check_gate_input(self(), Derived::name, x);
    check_valid(Derived::name, pass.valid, x.rows());
    tape.trained = false;
    tape.loss_scale = 1;
    find_valid_tokens(x.rows(), pass.valid, pass.batch, tape.tokens);
    self().route(x, pass, tape);
    return tape.routing;
  }
  Routing<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    typename Derived::Tape tape;
    return evaluate(x, tape);
  }

  /// Takes the x of forward() and dweight, the gradient of the loss with respect to the weight of
  /// each slot (S), and adds that of the gate's own losses once. Adds to the gradients of the
  /// parameters, and to dx (T x D). At fixed noise and choice this is the exact derivative. Throws
  /// std::invalid_argument when an argument does not belong to the tape, before anything is changed.
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
