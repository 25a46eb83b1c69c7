#pragma once

#include "moe/matrix.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// What a layer asks of its caller and of its gate. All throw std::invalid_argument.

namespace moe::detail {

/// `name` is the matrix's in the message.
template <class Scalar>
void check_layer_width(const MatrixRef<Scalar>& matrix, const char* name, Index width) {
  require(matrix.cols() == width, "MoELayer: ", name, " has ", matrix.cols(),
          " columns, Config.width = ", width);
}

/// What can be asked of a gate before its backward pass: that somebody put none of another width in
/// its place, and that the tape is its own.
template <class Gate>
void check_gate(const Gate& gate, const typename Gate::Tape& tape, Index width) {
  if constexpr (requires { gate.config().width; }) {
    require(gate.config().width == width, "MoELayer: the gate's width is ", gate.config().width,
            ", the layer's ", width);
  }
  if constexpr (requires { gate.check_tape(tape); }) gate.check_tape(tape);
}

/// The dx that a gate added to, for an x of tokens x width.
template <class Scalar>
void check_left_by_gate(const Matrix<Scalar>& dx, Index tokens, Index width) {
  require(dx.rows() == tokens && dx.cols() == width, "MoELayer: the gate left a dx of ", dx.rows(),
          " x ", dx.cols(), " for an x of ", tokens, " x ", width);
}

/// Groups the slots that a gate made by expert, after checking that they are of these experts and
/// tokens.
template <class Scalar>
void group_checked(Routing<Scalar>& routing, Index experts, Index tokens) {
  require(routing.experts == experts, "MoELayer: the gate's routing has ", routing.experts,
          " experts, the layer has ", experts);
  require(routing.tokens() == tokens, "MoELayer: the gate's routing has ", routing.tokens(),
          " tokens, x has ", tokens);
  group_by_expert(routing);
}

}  // namespace moe::detail
