#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "catch.hpp"
#include "moe/function_ref.hpp"
#include "moe/parallel.hpp"
#include "moe/parameter.hpp"
#include "moe/random.hpp"

/// \file
/// What several test files need: reproducible matrices, gradient checks against differences,
/// comparison of bits, and a fixed number of threads.

namespace moe::test {

/// Normal deviates: the same on every platform, so a test's point stays away from ties everywhere.
template <class Scalar = double>
Matrix<Scalar> random_matrix(Index rows, Index columns, std::uint64_t seed, double scale = 1.0) {
  Matrix<Scalar> matrix(rows, columns);
  fill_normal(matrix, static_cast<Scalar>(scale), derive_seed(seed, 0x7E57));
  return matrix;
}

/// Largest error over largest entry; 0 when both are zero.
template <class A, class B>
double relative_error(const A& actual, const B& expected) {
  if (actual.size() == 0) return 0.0;
  const double scale = std::max(static_cast<double>(actual.cwiseAbs().maxCoeff()),
                                static_cast<double>(expected.cwiseAbs().maxCoeff()));
  const double error = static_cast<double>((actual - expected).cwiseAbs().maxCoeff());
  return scale == 0.0 ? error : error / scale;
}

/// A function of the parameters as they are. What takes one is compiled once, and not for every lambda.
using Loss = moe::detail::FunctionRef<double()>;

/// Derivative of loss() by every entry of `value`, by the five-point rule, whose error is of
/// fourth order: with step 1e-4 about 1e-16 from cutting off and 1e-12·|loss| from rounding.
inline Matrix<double> difference_gradient(Matrix<double>& value, Loss loss, double step = 1e-4) {
  Matrix<double> gradient(value.rows(), value.cols());
  for (Index i = 0; i < value.size(); ++i) {
    double& x = value.data()[i];
    const double saved = x;
    const auto at = [&](double offset) {
      x = saved + offset;
      return loss();
    };
    const double near = at(step) - at(-step);
    const double far = at(2 * step) - at(-2 * step);
    x = saved;
    gradient.data()[i] = (8.0 * near - far) / (12.0 * step);
  }
  return gradient;
}

/// for_each_parameter(), compiled once for each type of module that names its Scalar, and not for every lambda.
template <class Module, class F>
void visit_each(Module& module, F&& f) {
  if constexpr (requires { typename Module::Scalar; }) {
    using Found = Parameter<typename Module::Scalar>;
    using Visited = std::conditional_t<std::is_const_v<Module>, const Found, Found>;
    for_each_parameter(module, moe::detail::FunctionRef<void(const std::string&, Visited&)>(f));
  } else {
    for_each_parameter(module, f);
  }
}

/// Checks the gradients that a backward pass left in every parameter of `module`; loss() must give
/// the loss at the parameters as they are.
template <class Module>
void check_parameter_gradients(Module& module, Loss loss, double tolerance = 1e-7,
                               double step = 1e-4) {
  visit_each(module, [&](const std::string& name, Parameter<double>& parameter) {
    INFO("parameter " << name);
    const Matrix<double> expected = difference_gradient(parameter.value, loss, step);
    CHECK(relative_error(parameter.gradient(), expected) < tolerance);
  });
}

/// Checks dx, and the gradients that a backward pass left in every parameter of `module`, with steps
/// in proportion to what they change: 1e-4·steep of the parameters' and of x's scale, `steep` below 1
/// where the loss is steep. A gradient that is small beside the loss cannot be seen better than the
/// differences' rounding, which is allowed for.
template <class Module>
void check_scaled_gradients(Module& module, const Matrix<double>& dx, Matrix<double>& x, Loss loss,
                            double parameter_scale, double x_scale, double steep) {
  const double size = std::max(1.0, std::abs(loss()));
  const auto check = [&](const Matrix<double>& actual, Matrix<double>& value, double scale) {
    const double step = 1e-4 * steep * scale;
    const Matrix<double> expected = difference_gradient(value, loss, step);
    const double error = (actual - expected).cwiseAbs().maxCoeff();
    CHECK(error <= 1e-7 * expected.cwiseAbs().maxCoeff() + 2e-15 * size / step);
  };
  {
    INFO("x");
    check(dx, x, x_scale);
  }
  visit_each(module, [&](const std::string& name, Parameter<double>& parameter) {
    INFO("parameter " << name);
    check(parameter.gradient(), parameter.value, parameter_scale);
  });
}

/// Whether f() throws std::invalid_argument.
template <class F>
bool is_refused(F&& f) {
  try {
    f();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

/// Equal to the last bit; NaN equals the same NaN.
template <class A, class B>
bool same_bits(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); ++j) {
      const auto x = a(i, j);
      const auto y = b(i, j);
      if (std::memcmp(&x, &y, sizeof(x)) != 0) return false;
    }
  }
  return true;
}

/// Sets the number of OpenMP threads for a scope; without OpenMP there is always one.
class Threads {
 public:
  explicit Threads(int count) : before_(static_cast<int>(worker_count())) { set(count); }
  ~Threads() { set(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  static void set([[maybe_unused]] int count) {
#ifdef _OPENMP
    omp_set_num_threads(count);
#endif
  }
  int before_;
};

/// Accuracy that a computation in Scalar can be held to.
template <class Scalar>
inline constexpr double tolerance = sizeof(Scalar) == sizeof(float) ? 2e-5 : 1e-12;

}  // namespace moe::test
