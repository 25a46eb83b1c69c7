#pragma once

#include <concepts>
#include <cstdint>
#include <span>

#include "moe/parameter.hpp"
#include "moe/random.hpp"
#include "moe/routing/balance_loss.hpp"
#include "moe/routing/global_batch.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// What the layer asks of a gate. NoisyTopKGate is one; a user's own class is as good.

namespace moe {

/// What every gate leaves behind; a gate's own Tape derives from it.
template <class Scalar>
struct GateTape {
  Routing<Scalar> routing;  ///< the slots
  Balance<Scalar> balance;  ///< importance, load and their loss
  bool trained = false;     ///< whether the last pass was a forward() that ended well

  /// Set during every pass, backward() too, where x is a part of a larger batch; then `balance` is
  /// that of the whole batch, and so is the gradient of its loss.
  const GlobalBatch<Scalar>* batch = nullptr;
};

/// A gate makes a Routing and takes back the gradient of its weights.
///
///     forward(x, tape, noise)          const; training: sets the gate's part of tape.routing, and
///                                      tape.balance
///     evaluate(x, tape)                const; serving: the same without noise
///     backward(x, dweight, tape, dx)   after forward, with the same x: dweight is S numbers, the
///                                      gradient of the loss with respect to the weight of each
///                                      slot; adds to the gradients of the gate's parameters, the
///                                      balance loss included, and the gate's share to dx (T x D)
///
/// A gate keeps no copy of x: the layer has one. It may have check_tape(tape), const, which throws
/// where backward() would not take the tape; the layer asks before it changes anything.
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
      gate.forward(x, tape, NoiseKey{.step = 0});
      gate.evaluate(x, tape);
      trained.backward(x, dweight, tape, dx);
      G::visit_parameters(trained, detail::AnyVisitor{});
    };
// clang-format on

namespace detail {

/// What forward() and evaluate() of every gate ask, `name` being the gate's in messages.
template <class G>
void check_gate_input(const G& gate, const char* name, const MatrixRef<typename G::Scalar>& x) {
  require(x.cols() == gate.config().width, name, ": x has ", x.cols(),
          " columns, Config.width = ", gate.config().width);
  check_shapes(gate, name);
}

/// What backward() of every gate asks of its arguments, before it changes anything.
template <class Scalar>
void check_gate_backward(const char* call, Index width, const MatrixRef<Scalar>& x,
                         std::span<const Scalar> dweight, const GateTape<Scalar>& tape,
                         const Matrix<Scalar>& dx) {
  const Index tokens = tape.routing.tokens();
  require(x.rows() == tokens && x.cols() == width, call, ": x is ", x.rows(), " x ", x.cols(),
          ", in forward() it was ", tokens, " x ", width);
  require(static_cast<Index>(dweight.size()) == tape.routing.slots(), call, ": dweight has ",
          dweight.size(), " entries for ", tape.routing.slots(), " slots");
  require(dx.rows() == tokens && dx.cols() == width, call, ": dx is ", dx.rows(), " x ", dx.cols(),
          ", x is ", tokens, " x ", width);
  require_apart(call, "x", x, {dx});
}

}  // namespace detail
}  // namespace moe
