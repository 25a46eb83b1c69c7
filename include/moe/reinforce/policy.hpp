#pragma once

#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moe/parameter.hpp"
#include "moe/random.hpp"

/// \file
/// What Reinforce needs of a network that writes sequences.

namespace moe {

/// A policy writes a sequence of symbols for an input, one symbol a step: its recurrent state is
/// the state of the agent, the next symbol the action.
///
/// A batch has R = inputs·samples rows; row r writes for input r / samples, so an encoder need read
/// each input once. What a row reads at a step is the symbol it wrote before (at the first step the
/// start symbol), and a negative number where the row has ended. So `previous` says which rows are
/// valid: the others are padding, their logits are not read, their rows of dlogits are 0, and they
/// must reach neither a gate nor a loss. A policy that runs a layer over all rows at once hands it
/// the mask that mark_valid() makes; one whose layers have no mask packs the rows, see PackedRows.
///
///     symbols()                                        how many there are, V
///     begin(inputs, samples, noise, state)             const; the state before the first step
///     step(previous, state)                            const; R numbers to logits R x V; the state
///                                                      moves on
///     forward(inputs, samples, previous, noise, tape)  const; the steps of all rows at once,
///                                                      previous being steps·R numbers, those of
///                                                      step t from t·R on; logits (steps·R) x V
///     backward(dlogits, tape)                          after forward: adds to the parameters'
///                                                      gradients. dlogits is 0 in padding
///
/// Given the same numbers, step and forward give the same logits. `noise` is the key of whatever
/// the policy draws: a mixture's gate, dropout. Without a key nothing is drawn, as in evaluation.
/// With the same key forward must draw what the steps drew: step() counts the rows that it handed
/// to a mixture before, padding too where a mask marks it, and passes their number on as
/// NoiseKey::first_token.
///
/// A logit of -infinity forbids a symbol. The losses of a MoELayer inside the policy are in its
/// backward already, once and unscaled, whatever the objective.
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

/// A policy that shows its state, for LinearBaseline: hidden(tape), after forward, is one row for
/// each row of the logits, (steps·R) x W; rows of padding may hold anything.
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

/// What Reinforce says when a class is no Policy: one message for each thing that can be missing.
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

/// The mask of padding: valid[i] = 1 where row i reads a symbol, 0 where it has ended, in the form
/// that layers and SoftmaxCrossEntropy take. Keep it in the tape: it must outlive the pass.
inline void mark_valid(IndexSpan previous, std::vector<std::uint8_t>& valid) {
  valid.resize(previous.size());
  for (std::size_t i = 0; i < previous.size(); ++i) valid[i] = previous[i] >= 0 ? 1 : 0;
}

}  // namespace moe
