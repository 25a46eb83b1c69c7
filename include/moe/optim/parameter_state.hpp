#pragma once

#include <cmath>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/parameter.hpp"

namespace moe::detail {

inline void check_learning_rate(std::string_view optimizer, double learning_rate) {
  require(learning_rate >= 0 && std::isfinite(learning_rate), optimizer,
          "::update: learning_rate = ", learning_rate, ", must be finite and at least 0");
}

/// What an optimizer remembers of a module: a matrix for each parameter, of its shape and in the
/// order of for_each_parameter.
template <class Scalar>
class ParameterState {
 public:
  /// The first call makes matrices of zeros; a later one throws std::invalid_argument if the module
  /// has other parameters than at the first.
  template <class Module>
  void match(const Module& module, std::string_view optimizer) {
    if (matrices_.empty()) {
      std::vector<Matrix<Scalar>> zeros;
      walk_parameters(module, [&](const ParameterName&, const Parameter<Scalar>& p) {
        zeros.push_back(detail::zeros<Scalar>(p.value.rows(), p.value.cols()));
      });
      matrices_ = std::move(zeros);
      return;
    }
    const auto known = static_cast<Index>(matrices_.size());
    Index count = 0;
    walk_parameters(module, [&](const ParameterName& name, const Parameter<Scalar>& p) {
      const Index index = count++;
      if (index >= known) return;
      const Matrix<Scalar>& mine = (*this)[index];
      if (p.value.rows() == mine.rows() && p.value.cols() == mine.cols()) return;
      require(false, optimizer, "::update: ", name.string(), " is ", p.value.rows(), " x ",
              p.value.cols(), ", was ", mine.rows(), " x ", mine.cols(), " at the first update");
    });
    require(count == known, optimizer, "::update: the module has ", count, " parameters, had ",
            known, " at the first update");
  }

  /// Calls f(name, matrix) for every matrix, named "what.name of the parameter".
  template <class Module, class F>
  void for_each(const Module& module, std::string_view what, F&& f) {
    Index index = 0;
    walk_parameters(module, [&](const ParameterName& name, const Parameter<Scalar>&) {
      f(std::string(what) + '.' + name.string(), (*this)[index++]);
    });
  }

  Index size() const { return static_cast<Index>(matrices_.size()); }
  Matrix<Scalar>& operator[](Index parameter) { return matrices_[to_size(parameter)]; }
  const Matrix<Scalar>& operator[](Index parameter) const { return matrices_[to_size(parameter)]; }

 private:
  std::vector<Matrix<Scalar>> matrices_;
};

}  // namespace moe::detail
