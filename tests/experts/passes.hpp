#pragma once

#include <numeric>
#include <utility>
#include <vector>

#include "../support.hpp"
#include "moe/experts/expert.hpp"

/// \file
/// Whole passes over a slice, through both halves of an Expert or of a FusedNetwork.

namespace moe::test {

/// Rows of x, each a token of its own, and what belongs to them.
template <class Scalar>
class Passes {
 public:
  /// Of a module with the verbs of an expert; the rows of x may be any.
  template <class Module>
  Passes(const Module& module, const GatheredRows<Scalar>& x)
      : x_(x),
        token_(detail::to_size(x.count())),
        ones_(Matrix<Scalar>::Ones(1, x.count())),
        scratch_(x.count(), module.scratch_width()),
        saved(x.count(), module.tape_width()),
        y(Matrix<Scalar>::Zero(x.count(), x.width())),
        dx(Matrix<Scalar>::Zero(x.count(), x.width())),
        dweight(1, x.count()) {
    std::iota(token_.begin(), token_.end(), Index{0});
    scratch_.setConstant(std::numeric_limits<Scalar>::quiet_NaN());
    saved.setConstant(std::numeric_limits<Scalar>::quiet_NaN());
  }

  /// The network's outputs, not weighted.
  template <class Module>
  const Matrix<Scalar>& forward(const Module& module, bool save = true) {
    return forward(module, ones_, save);
  }
  /// What the slots add to their tokens.
  template <class Module>
  const Matrix<Scalar>& forward(const Module& module, const Matrix<Scalar>& weight,
                                bool save = true) {
    const ExpertBlock<Scalar> rows = block(weight);
    if constexpr (PreparedNetwork<Module>) module.prepare_hidden(rows);
    with_scratch(module, [&](auto&... scratch) {
      module.hidden(rows, {0, module.columns()}, save, scratch...);
    });
    if constexpr (PreparedNetwork<Module>) module.prepare_output(rows);
    y.setZero();
    module.output(rows, {0, x_.width()}, view(y));
    return y;
  }
  template <class Module>
  const Matrix<Scalar>& evaluate(const Module& module) {
    return forward(module, false);
  }

  /// dx and dweight from dy, the gradient of the sum of outputs by weight, after forward().
  template <class Module>
  void backward(Module& module, const Matrix<Scalar>& dy, const Matrix<Scalar>& weight) {
    const ExpertBlock<Scalar> rows = block(weight);
    scratch_.setConstant(std::numeric_limits<Scalar>::quiet_NaN());  // other experts had it since
    if constexpr (PreparedNetwork<Module>) module.prepare_hidden_backward(rows, dy);
    with_scratch(module, [&](auto&... scratch) {
      module.hidden_backward(rows, dy, {0, module.columns()}, scratch...);
    });
    if constexpr (PreparedNetwork<Module>) module.prepare_output_backward(rows);
    module.add_gradients(rows, dy, {0, module.gradient_rows()});
    dx.setZero();
    module.output_backward(rows, {0, x_.width()}, view(dx));
    module.weight_gradients(rows, dy, dweight.data());
  }

 private:
  ExpertBlock<Scalar> block(const Matrix<Scalar>& weight) {
    return {x_, token_.data(), weight.data(), view(saved), view(scratch_)};
  }
  template <class Module, class F>
  static void with_scratch(const Module& module, F&& f) {
    if constexpr (requires { typename Module::Scratch; }) {
      typename Module::Scratch scratch;
      module.reserve(scratch);
      f(scratch);
    } else {
      f();
    }
  }

  GatheredRows<Scalar> x_;
  std::vector<Index> token_;
  Matrix<Scalar> ones_;
  Matrix<Scalar> scratch_;

 public:
  Matrix<Scalar> saved, y, dx, dweight;
};

}  // namespace moe::test
