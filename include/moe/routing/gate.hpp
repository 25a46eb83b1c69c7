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
  Matrix<Scalar> x;         ///< T x D, the input; the experts read it from here too
  Routing<Scalar> routing;  ///< the slots
  Balance<Scalar> balance;  ///< importance, load and their loss
  Matrix<Scalar> dx;        ///< T x D, the gradient of the input, left by backward
  bool trained = false;     ///< whether the last pass was a forward() that ended well

  /// Set during every pass, backward() too, where x is a part of a larger batch; then `balance` is
  /// that of the whole batch, and so is the gradient of its loss.
  const GlobalBatch<Scalar>* batch = nullptr;
};

/// A gate makes a Routing and takes back the gradient of its weights.
///
///     forward(x, tape, noise)   const; training: sets tape.x, the gate's part of tape.routing and
///                               tape.balance
///     evaluate(x, tape)         const; serving: the same without noise, and without tape.x
///     backward(dweight, tape)   after forward: dweight is S numbers, the gradient of the loss by
///                               the weight of each slot; adds to the gate's parameters' gradients,
///                               the balance loss included, and fills tape.dx, which comes as T x D
///                               zeros, with the gate's share
///
/// It may have check_tape(tape), const, which throws where backward() would not take the tape; the
/// layer asks before it changes anything.
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
             const MatrixRef<typename G::Scalar>& x, std::span<const typename G::Scalar> dweight) {
      { config.width } -> std::convertible_to<Index>;
      { gate.experts() } -> std::same_as<Index>;
      gate.forward(x, tape, NoiseKey{});
      gate.evaluate(x, tape);
      trained.backward(dweight, tape);
      G::visit_parameters(trained, detail::AnyVisitor{});
    };
// clang-format on

}  // namespace moe
