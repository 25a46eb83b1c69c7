#pragma once

#include <utility>

#include "moe/nn/linear.hpp"
#include "moe/weights/narrow_gemm.hpp"
#include "moe/weights/narrow_weight.hpp"

namespace moe {

/// A Linear with narrow weights for inference: y = x·weight + bias, with a bias of floats. Made by
/// narrow(). Its weight is not trained, but it has the gradient with respect to x.
template <detail::NarrowFormat Format>
class NarrowLinear {
 public:
  using Scalar = float;  ///< the type of x and y

  /// The caller's scratch.
  struct Tape {
    Matrix<float> y;   ///< T x outputs
    Matrix<float> dx;  ///< T x inputs
  };

  /// Rounds the weights. Throws std::invalid_argument if one cannot be narrowed, or the format does not
  /// support options.activations.
  explicit NarrowLinear(const Linear<float>& linear, const NarrowOptions& options = {})
      : weight_(linear.weight.value, "weight", options), bias_(linear.bias.value) {}

  /// The narrow weight, inputs x outputs.
  const NarrowMatrix<Format>& weight() const { return weight_.matrix; }
  Index inputs() const { return weight().rows(); }   ///< K of the product
  Index outputs() const { return weight().cols(); }  ///< N of the product

  /// Returns tape.y (T x outputs). Throws std::invalid_argument if x is not T x inputs or overlaps tape.y.
  const Matrix<float>& evaluate(const MatrixRef<float>& x, Tape& tape) const {
    detail::require(x.cols() == inputs(), "NarrowLinear: x has ", x.cols(),
                    " columns, the layer has ", inputs(), " inputs");
    detail::require_apart("NarrowLinear::evaluate", "x", x, {tape.y});
    detail::resize(tape.y, x.rows(), outputs());
    detail::gemm(detail::GemmNN<float, detail::NarrowOperand<Format>>{
        .a = x,
        .b = detail::operand(weight_),
        .c = tape.y,
        .bias = {.values = bias_.size() > 0 ? bias_.data() : nullptr}});
    return tape.y;
  }
  /// The same with a tape of its own, which allocates.
  Matrix<float> evaluate(const MatrixRef<float>& x) const {
    Tape tape;
    evaluate(x, tape);
    return std::move(tape.y);
  }

  /// Returns tape.dx = dy·weightᵀ (T x inputs), the gradient with respect to x. Throws
  /// std::invalid_argument if dy is not T x outputs or overlaps tape.dx.
  const Matrix<float>& input_gradient(const MatrixRef<float>& dy, Tape& tape) const {
    detail::require(dy.cols() == outputs(), "NarrowLinear::input_gradient: dy has ", dy.cols(),
                    " columns, the layer has ", outputs(), " outputs");
    detail::require_apart("NarrowLinear::input_gradient", "dy", dy, {tape.dx});
    detail::resize(tape.dx, dy.rows(), inputs());
    detail::gemm(detail::GemmNT<float, detail::NarrowOperand<Format>>{
        .a = dy, .b = detail::operand(weight_), .c = tape.dx});
    return tape.dx;
  }

 private:
  detail::NarrowWeight<Format> weight_;
  Matrix<float> bias_;  ///< 1 x outputs; empty without one
};

/// Rounds the weights of a Linear to a format: `moe::narrow<moe::Int8>(linear)`. Throws as the constructor
/// of NarrowLinear does.
template <detail::NarrowFormat Format>
NarrowLinear<Format> narrow(const Linear<float>& linear, const NarrowOptions& options = {}) {
  return NarrowLinear<Format>(linear, options);
}

}  // namespace moe
