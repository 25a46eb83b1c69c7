#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "moe/kernels/simd.hpp"
#include "moe/parallel.hpp"
#include "moe/parameter.hpp"
#include "moe/routing/pass.hpp"

namespace moe {

namespace detail {

/// Modules whose passes take more than x and a tape, as a layer's do.
template <class Module>
concept TakesPass = requires(const Module& module, typename Module::Tape& tape) {
  module.forward(tape.y, tape, Pass{.step = 0});
};

/// Modules whose passes take nothing else.
template <class Module>
concept TakesRows = requires(const Module& module, typename Module::Tape& tape) {
  module.forward(tape.y, tape);
};

}  // namespace detail

/// y = x + module(x), x and y being T x D: a module that learns what to add to its input.
/// K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
///
///     moe::Residual<Layer> block({.width = 64, ...});  // a layer's configuration
///     moe::Residual<Layer>::Tape tape;
///     const auto& y = block.forward(x, tape, {.step = step});
///     const auto& dx = block.backward(dy, tape);
///
/// The module is any whose passes are forward(x, tape) or, as those of MoELayer, forward(x, tape, pass):
/// a layer, Linear, RMSNorm, or one of your own with a Config. (LSTM, which takes a state, and Dropout,
/// which takes a key, are not.) Configuration and parameters are the module's, under its own names, so
/// files of the bare module load.
template <class Module>
class Residual {
  static_assert(detail::HasConfig<Module>, "the module of a Residual must have a type Config");
  static_assert(detail::HasTape<Module>, "the module of a Residual must have a type Tape");
  static_assert(
      detail::TakesRows<Module> || detail::TakesPass<Module>,
      "the module of a Residual must have forward(x, tape) const or forward(x, tape, const "
      "moe::Pass&) const, x being of the type of tape.y");

 public:
  using Config = typename Module::Config;  ///< the module's
  /// float or double
  using Scalar = typename std::remove_cvref_t<decltype(Module::Tape::y)>::Scalar;

  /// The caller's scratch: what one pass computes and what its backward needs.
  struct Tape {
    Matrix<Scalar> y;              ///< T x D
    bool trained = false;          ///< whether the last pass was a forward()
    typename Module::Tape module;  ///< the module's
    Matrix<Scalar> dx;             ///< T x D, the gradient with respect to x

    /// The losses and figures of balance of the last pass, if the module is a mixture.
    const auto& balance() const requires requires(const typename Module::Tape& tape) {
      tape.balance();
    }
    { return module.balance(); }
  };

  /// Constructs the module from its configuration. Throws what the module's constructor throws.
  explicit Residual(const Config& config) requires std::constructible_from<Module, const Config&>
      : module_(config) {}
  /// The same for a module whose constructor takes a seed.
  Residual(const Config& config, std::uint64_t seed) requires
      std::constructible_from<Module, const Config&, std::uint64_t> : module_(config, seed) {}
  /// One around an existing module.
  explicit Residual(Module module) : module_(std::move(module)) {}

  /// The module's configuration.
  decltype(auto) config() const requires requires(const Module& module) { module.config(); }
  { return module_.config(); }
  /// The module. Its own functions may be called, such as MoELayer's set_loss_weights() or
  /// add_experts(), and a module of another width may be assigned: each pass compares the shapes
  /// anew.
  const Module& module() const { return module_; }
  /// The same to change.
  Module& module() { return module_; }

  /// Training pass: returns tape.y (T x D). Throws std::invalid_argument if the module refuses x, if the
  /// module's y is not of the shape of x, or if x overlaps the y of the tape or of the module's tape.
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape) const
      requires(!detail::TakesPass<Module>) {
    check_apart("Residual::forward", x, tape);
    return trained(add(x, module_.forward(x, tape.module), tape), tape);
  }
  /// The same for a module that takes a pass.
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape,
                                const Pass& pass) const requires detail::TakesPass<Module> {
    check_apart("Residual::forward", x, tape);
    return trained(add(x, module_.forward(x, tape.module, pass), tape), tape);
  }

  /// Adds to the gradients of the module's parameters and returns dx = dy + the module's dx. Throws
  /// std::invalid_argument unless dy is T x D and the last pass on the tape was a forward(), if dy
  /// overlaps tape.dx, or if the module refuses dy or its tape.
  const Matrix<Scalar>& backward(const MatrixRef<Scalar>& dy, Tape& tape) {
    detail::require(tape.trained, "Residual::backward without a forward pass on this tape");
    detail::require(dy.rows() == tape.y.rows(), "Residual::backward: dy has ", dy.rows(),
                    " rows, x had ", tape.y.rows());
    detail::require(dy.cols() == tape.y.cols(), "Residual::backward: dy has ", dy.cols(),
                    " columns, x had ", tape.y.cols());
    detail::require_apart("Residual::backward", "dy", dy, {tape.dx});
    sum(dy, module_.backward(dy, tape.module), tape.dx);
    return tape.dx;
  }

  /// forward() that saves nothing for backward(). Throws as forward() does.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    check_apart("Residual::evaluate", x, tape);
    return add(x, module_.evaluate(x, tape.module), tape);
  }
  /// The same for a module that takes a pass.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape, const EvaluationPass& pass)
      const requires detail::TakesPass<Module> {
    check_apart("Residual::evaluate", x, tape);
    return add(x, module_.evaluate(x, tape.module, pass), tape);
  }
  /// The same with a tape of its own, which allocates.
  Matrix<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    evaluate(x, tape);
    return std::move(tape.y);
  }

  /// Those of the module.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Module::visit_parameters(self.module_, visit);
  }

 private:
  /// x is read again once the module has written its own y.
  static void check_apart(const char* verb, const MatrixRef<Scalar>& x, const Tape& tape) {
    detail::require_apart(verb, "x", x, {tape.y, tape.module.y});
  }

  /// tape.y = x + of_module, a pass that backward() refuses.
  static const Matrix<Scalar>& add(const MatrixRef<Scalar>& x, const Matrix<Scalar>& of_module,
                                   Tape& tape) {
    tape.trained = false;
    detail::require(of_module.rows() == x.rows() && of_module.cols() == x.cols(), "Residual: x is ",
                    x.rows(), " x ", x.cols(), ", the module's y ", of_module.rows(), " x ",
                    of_module.cols());
    sum(x, of_module, tape.y);
    return tape.y;
  }
  static const Matrix<Scalar>& trained(const Matrix<Scalar>& y, Tape& tape) {
    tape.trained = true;
    return y;
  }

  static void sum(const MatrixRef<Scalar>& a, const Matrix<Scalar>& b, Matrix<Scalar>& to) {
    using P = detail::Packet<Scalar>;
    const Index D = a.cols();
    detail::resize(to, a.rows(), D);
    const Index block = std::max<Index>(1, (Index{1} << 13) / std::max<Index>(1, D));
    const auto plus = [](const P& left, const P& right) {
      return Eigen::internal::padd(left, right);
    };
    parallel_for_blocks(a.rows(), block, element_work(to.size()), [&](Index first, Index count) {
      for (Index t = first; t < first + count; ++t) {
        detail::map(D, detail::row_data(to, t), plus, detail::row_data(a, t),
                    detail::row_data(b, t));
      }
    });
  }

  Module module_;
};

}  // namespace moe
