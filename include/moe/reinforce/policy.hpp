#pragma once

#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moe/parameter.hpp"
#include "moe/random.hpp"

/// \file
/// The concept Policy: a network that writes sequences, for Reinforce.

namespace moe {

/// A policy writes a sequence of symbols for an input, one symbol per step: its recurrent state is
/// the state of the agent, the next symbol the action.
///
/// A batch has R = inputs·samples rows; row r writes for input r / samples, so an encoder need read
/// each input only once. At each step a row reads the symbol that it wrote before (at the first step
/// the start symbol), or a negative number if it has ended. So `previous` says which rows are valid:
/// the others are padding. Their logits are not read, their rows of dlogits are 0, and they must reach
/// neither a gate nor a loss. A policy that calls a layer with all rows passes it the mask made by
/// mark_valid(); for layers without a mask it packs the rows, see PackedRows.
///
///     symbols()                                        V, the number of symbols
///     begin(inputs, samples, noise, state)             const; sets the state before the first step
///     step(previous, state)                            const; R symbols to logits R x V; advances the
///                                                      state
///     forward(inputs, samples, previous, noise, tape)  const; all steps of all rows at once: previous
///                                                      is steps·R numbers, those of step t from t·R
///                                                      on; logits (steps·R) x V
///     backward(dlogits, tape)                          after forward: adds to the parameters'
///                                                      gradients. dlogits is 0 in padding
///
/// Given the same numbers, step and forward give the same logits. `noise` is the key of all random
/// numbers of the policy: those of a mixture's gate, of dropout. Without a key nothing is drawn, as in
/// evaluation. With the same key forward must draw the same numbers as the steps. For that, step()
/// counts the rows that it passed to a mixture at earlier steps (padding too, if a mask marks it),
/// and adds their number to NoiseKey::first_token.
///
/// A logit of -infinity forbids a symbol. The backward of a MoELayer in the policy includes the layer's
/// own losses, once and unscaled, whatever the objective.
// clang-format off
template <class P>
concept Policy =
    requires {
      typename P::Scalar;
      typename P::Input;
      typename P::State;
      typename P::Tape;
    } &&
    requires(const P& policy, P& trained, std::span<const typename P::Input> inputs, Index samples,
             const std::optional<NoiseKey>& noise, std::span<const Index> previous,
             typename P::State& state, typename P::Tape& tape,
             const Matrix<typename P::Scalar>& dlogits) {
      { policy.symbols() } -> std::same_as<Index>;
      policy.begin(inputs, samples, noise, state);
      { policy.step(previous, state) } -> std::same_as<const Matrix<typename P::Scalar>&>;
      { policy.forward(inputs, samples, previous, noise, tape) }
          -> std::same_as<const Matrix<typename P::Scalar>&>;
      trained.backward(dlogits, tape);
      P::visit_parameters(trained, detail::AnyVisitor{});
    };

/// A policy with access to its state, for LinearBaseline: hidden(tape), after forward, has a row for each
/// row of the logits, (steps·R) x W; rows of padding may have any values.
template <class P>
concept PolicyWithHidden = Policy<P> && requires(const P& policy, const typename P::Tape& tape) {
  { policy.hidden(tape) } -> std::same_as<const Matrix<typename P::Scalar>&>;
};

namespace detail {

template <class T>
concept HasInput = requires { typename T::Input; };
template <class T>
concept HasState = requires { typename T::State; };
// clang-format on

/// The compile errors for a class that is not a Policy: a message for each missing member.
template <class P>
constexpr bool check_policy_requirements() {
  static_assert(HasScalar<P>, "a policy must have a type Scalar");
  static_assert(HasInput<P>, "a policy must have a type Input");
  static_assert(HasState<P>, "a policy must have a type State");
  static_assert(HasTape<P>, "a policy must have a type Tape");
  if constexpr (HasScalar<P> && HasInput<P> && HasState<P> && HasTape<P>) {
    using Logits = Matrix<typename P::Scalar>;
    using Inputs = std::span<const typename P::Input>;
    using Noise = std::optional<NoiseKey>;
    static_assert(
        requires(const P& policy) {
          { policy.symbols() } -> std::same_as<Index>;
        },
        "a policy must have moe::Index symbols() const");
    static_assert(
        requires(const P& policy, Inputs inputs, Index samples, const Noise& noise,
                 typename P::State& state) { policy.begin(inputs, samples, noise, state); },
        "a policy must have begin(std::span<const Input>, moe::Index samples, const "
        "std::optional<moe::NoiseKey>&, State&) const");
    static_assert(
        requires(const P& policy, std::span<const Index> previous, typename P::State& state) {
          { policy.step(previous, state) } -> std::same_as<const Logits&>;
        },
        "a policy must have const moe::Matrix<Scalar>& step(std::span<const moe::Index> previous, "
        "State&) const");
    static_assert(
        requires(const P& policy, Inputs inputs, Index samples, std::span<const Index> previous,
                 const Noise& noise, typename P::Tape& tape) {
          { policy.forward(inputs, samples, previous, noise, tape) } -> std::same_as<const Logits&>;
        },
        "a policy must have const moe::Matrix<Scalar>& forward(std::span<const Input>, moe::Index "
        "samples, std::span<const moe::Index> previous, const std::optional<moe::NoiseKey>&, "
        "Tape&) "
        "const");
    static_assert(
        requires(P & policy, const Logits& dlogits, typename P::Tape& tape) {
          policy.backward(dlogits, tape);
        },
        "a policy must have backward(const moe::Matrix<Scalar>& dlogits, Tape&)");
    static_assert(
        requires(P & policy) { P::visit_parameters(policy, AnyVisitor{}); },
        "a policy must have a static visit_parameters(self, visit)");
  }
  return true;
}

}  // namespace detail

/// The mask of padding for layers and SoftmaxCrossEntropy: valid[i] = 1 if row i reads a symbol, 0 if it
/// has ended. Store it in the tape: it must outlive the pass.
inline void mark_valid(IndexSpan previous, std::vector<std::uint8_t>& valid) {
  valid.resize(previous.size());
  for (std::size_t i = 0; i < previous.size(); ++i) valid[i] = previous[i] >= 0 ? 1 : 0;
}

}  // namespace moe
