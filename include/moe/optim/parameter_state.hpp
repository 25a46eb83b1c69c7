#pragma once

#include <cmath>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/optim/parameter_groups.hpp"
#include "moe/parameter.hpp"

namespace moe::detail {

/// What `{}` is, where a constructor also takes a configuration: a scalar type is the better match.
enum class Defaults {};

// Fields of an optimizer's configuration.

inline void check_decay_rate(std::string_view optimizer, std::string_view field, double value) {
  require(value >= 0 && value < 1, optimizer, "::Config.", field, " = ", value,
          ", must be in [0, 1)");
}
inline void check_weight_decay(std::string_view optimizer, double value) {
  require(value >= 0 && std::isfinite(value), optimizer, "::Config.weight_decay = ", value,
          ", must be finite and at least 0");
}

/// Throws std::invalid_argument unless a module has the parameters of the first update: `known` of
/// them, shape_of(index) giving the rows and columns of each.
template <class Module, class ShapeOf>
void require_same_parameters(const Module& module, std::string_view optimizer, Index known,
                             ShapeOf&& shape_of) {
  Index count = 0;
  walk_parameters(module, [&](const ParameterName& name, const auto& p) {
    const Index index = count++;
    if (index >= known) return;
    const auto [rows, columns] = shape_of(index);
    if (p.value.rows() == rows && p.value.cols() == columns) return;
    require(false, optimizer, "::update: ", name.string(), " is ", p.value.rows(), " x ",
            p.value.cols(), ", was ", rows, " x ", columns, " at the first update");
  });
  require(count == known, optimizer, "::update: the module has ", count, " parameters, had ", known,
          " at the first update");
}

/// How many updates an optimizer made, and how many of each parameter: as many, but for those at
/// which it was idle or its rate_factor 0.
class UpdateCounts {
 public:
  void match(Index parameters) { of_parameter_.resize(to_size(parameters)); }

  Index total() const { return total_; }
  Index operator[](Index parameter) const { return of_parameter_[to_size(parameter)]; }

  /// Counts an update of a module.
  template <class Module>
  void add(const Module& module, Updates updates, const ResolvedGroups& groups) {
    ++total_;
    Index index = 0;
    walk_parameters(module, [&](const ParameterName&, const auto& parameter) {
      const Index i = index++;
      if (!is_idle(parameter, updates) && !groups.is_fixed(i)) ++of_parameter_[to_size(i)];
    });
  }

  /// Calls f(name, numbers) with "steps" and "updates".
  template <class F>
  void for_each(F&& f) {
    f(std::string("steps"), std::span<Index>(&total_, 1));
    f(std::string("updates"), std::span<Index>(of_parameter_));
  }

 private:
  Index total_ = 0;
  std::vector<Index> of_parameter_;
};

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
    require_same_parameters(module, optimizer, size(), [&](Index index) {
      const Matrix<Scalar>& mine = (*this)[index];
      return std::pair(mine.rows(), mine.cols());
    });
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
