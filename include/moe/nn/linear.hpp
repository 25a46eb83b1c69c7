#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "moe/kernels/column_sums.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/parameter.hpp"
#include "moe/random.hpp"

namespace moe {

/// y = x·weight + bias, x being T x inputs and y T x outputs.
///
///     moe::Linear<> layer({.inputs = 512, .outputs = 8000}, seed);
///     moe::Linear<>::Tape tape;
///     const auto& y = layer.forward(x, tape);
///     const auto& dx = layer.backward(dy, tape);
///
/// The weight is the transpose of PyTorch's. Both parameters are uniform in ±1/√inputs initially, as in
/// PyTorch.
template <class Scalar = float>
class Linear {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    Index inputs = 0;   ///< at least 1
    Index outputs = 0;  ///< at least 1
    bool bias = true;   ///< whether there is a bias

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("inputs", self.inputs);
      visit("outputs", self.outputs);
      visit("bias", self.bias);
    }
  };

  /// The caller's scratch: what one pass computes and what its backward needs.
  struct Tape {
    Matrix<Scalar> y;      ///< T x outputs
    bool trained = false;  ///< whether the last pass was a forward()
    Matrix<Scalar> x;      ///< T x inputs, a copy
    Matrix<Scalar> dx;     ///< T x inputs, the gradient with respect to x
  };

  Parameter<Scalar> weight;  ///< inputs x outputs
  Parameter<Scalar> bias;    ///< 1 x outputs; empty without a bias

  /// Throws std::invalid_argument for a configuration out of range.
  Linear(const Config& config, std::uint64_t seed) : config_(config) {
    detail::require(config.inputs >= 1, "Linear::Config.inputs = ", config.inputs,
                    ", must be at least 1");
    detail::require(config.outputs >= 1, "Linear::Config.outputs = ", config.outputs,
                    ", must be at least 1");
    const Scalar bound = Scalar{1} / std::sqrt(static_cast<Scalar>(config.inputs));
    weight = Parameter<Scalar>(config.inputs, config.outputs);
    fill_uniform(weight.value, bound, derive_seed(seed, 0));
    if (config.bias) {
      bias = Parameter<Scalar>(1, config.outputs);
      fill_uniform(bias.value, bound, derive_seed(seed, 1));
    }
  }

  /// The configuration.
  const Config& config() const { return config_; }

  /// Training pass: returns tape.y (T x outputs). Throws std::invalid_argument if x is not T x inputs, or is a
  /// part of tape.x, but not all of it.
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape) const {
    check_input(x);
    detail::copy_matrix(x, tape.x);  // first, since x may be this tape's y of a pass before
    run(tape.x, tape);
    tape.trained = true;
    return tape.y;
  }

  /// Adds xᵀ·dy and the column sums of dy to the gradients and returns dx = dy·weightᵀ. Throws
  /// std::invalid_argument unless dy is T x outputs and the last pass on the tape was a forward(), or if dy
  /// overlaps tape.dx.
  const Matrix<Scalar>& backward(const MatrixRef<Scalar>& dy, Tape& tape) {
    detail::check_shapes(*this, "Linear");
    detail::require(tape.trained && tape.x.cols() == config_.inputs,
                    "Linear::backward without a forward pass on this tape");
    detail::require(dy.rows() == tape.x.rows(), "Linear::backward: dy has ", dy.rows(),
                    " rows, x had ", tape.x.rows());
    detail::require(dy.cols() == config_.outputs, "Linear::backward: dy has ", dy.cols(),
                    " columns, the layer has ", config_.outputs, " outputs");
    detail::require_apart("Linear::backward", "dy", dy, {tape.dx});
    if (weight.trained) {
      detail::gemm(detail::GemmTN<Scalar>{
          .a = tape.x, .b = dy, .c = view(weight.gradient()), .start = detail::Start::accumulate});
    }
    if (config_.bias && bias.trained) detail::add_column_sums<Scalar>(dy, bias.gradient());
    detail::resize(tape.dx, dy.rows(), config_.inputs);
    detail::gemm(detail::GemmNT<Scalar>{.a = dy, .b = weight.value, .c = tape.dx});
    return tape.dx;
  }

  /// forward() without the copy of x that backward() needs. Throws std::invalid_argument if x is not T x
  /// inputs or overlaps tape.y.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    check_input(x);
    detail::require_apart("Linear::evaluate", "x", x, {tape.y});
    tape.trained = false;
    run(x, tape);
    return tape.y;
  }

  /// The same with a tape of its own, which allocates.
  Matrix<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    evaluate(x, tape);
    return std::move(tape.y);
  }

  /// "weight" and, with Config.bias, "bias".
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight);
    if (self.config_.bias) visit("bias", self.bias);
  }

 private:
  void check_input(const MatrixRef<Scalar>& x) const {
    detail::check_shapes(*this, "Linear");
    detail::require(x.cols() == config_.inputs, "Linear: x has ", x.cols(),
                    " columns, the layer has ", config_.inputs, " inputs");
  }

  void run(const MatrixRef<Scalar>& x, Tape& tape) const {
    detail::resize(tape.y, x.rows(), config_.outputs);
    detail::gemm(
        detail::GemmNN<Scalar>{.a = x,
                               .b = weight.value,
                               .c = tape.y,
                               .bias = {.values = config_.bias ? bias.value.data() : nullptr}});
  }

  Config config_;
};

}  // namespace moe
