#pragma once

#include "moe/gates/gate.hpp"
#include "moe/matrix.hpp"
#include "moe/routing/pass.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// Checks of a layer's arguments and of what its gate made. All throw std::invalid_argument.

namespace moe::detail {

/// Checks that a matrix has `width` columns; `name` is its name in the message.
template <class Scalar>
void check_layer_width(const MatrixRef<Scalar>& matrix, const char* name, Index width) {
  require(matrix.cols() == width, "MoELayer: ", name, " has ", matrix.cols(),
          " columns, Config.width = ", width);
}

/// Checks that a routing has this number of experts and `tokens` rows, and that padding has no
/// slots. (That the slots are in order is checked where they are sorted.)
template <class Scalar>
void check_made_by_gate(const Routing<Scalar>& routing, Index experts, Index tokens,
                        std::span<const std::uint8_t> valid) {
  require(routing.experts == experts, "MoELayer: the gate's routing has ", routing.experts,
          " experts, the layer has ", experts);
  require(routing.tokens() == tokens, "MoELayer: the gate's routing has ", routing.tokens(),
          " tokens, x has ", tokens);
  for (Index t = 0; t < static_cast<Index>(valid.size()); ++t) {
    require(valid[to_size(t)] != 0 || routing.slots_of_token(t).count <= 0, "MoELayer: row ", t,
            " of x is not valid, but the gate gave it a slot");
  }
}

/// Checks that the gate did not change the shape of dx, tokens x width.
template <class Scalar>
void check_left_by_gate(const Matrix<Scalar>& dx, Index tokens, Index width) {
  require(dx.rows() == tokens && dx.cols() == width, "MoELayer: the gate changed dx to ", dx.rows(),
          " x ", dx.cols(), ", must be as x, ", tokens, " x ", width);
}

}  // namespace moe::detail
