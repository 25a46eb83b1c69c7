#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moe/experts/expert_change.hpp"
#include "moe/optim/model_change.hpp"
#include "moe/optim/parameter_groups.hpp"
#include "moe/parameter.hpp"

namespace moe {

/// The shape of a matrix in an optimizer's state.
struct StateShape {
  Index rows;     ///< those of the parameter, or 1
  Index columns;  ///< those of the parameter, or 1
};

namespace detail {

/// The type of `{}` where a constructor also takes a configuration: overload resolution prefers a
/// scalar type.
enum class Defaults {};

// Checks of the fields of an optimizer's configuration.

inline void check_decay_rate(std::string_view optimizer, std::string_view field, double value) {
  require(value >= 0 && value < 1, optimizer, "::Config.", field, " = ", value,
          ", must be in [0, 1)");
}
inline void check_weight_decay(std::string_view optimizer, double value) {
  require(value >= 0 && std::isfinite(value), optimizer, "::Config.weight_decay = ", value,
          ", must be finite and at least 0");
}

/// A parameter at the first update, or at the last follow().
struct KnownParameter {
  Index rows;
  Index columns;
  std::uint64_t structure;  ///< Parameter::structure
};

/// Throws std::invalid_argument unless a module has the parameters of the first update, or those
/// after the last follow().
template <class Module>
void require_same_parameters(const Module& module, std::string_view optimizer,
                             std::span<const KnownParameter> known) {
  std::size_t count = 0;
  walk_parameters(module, [&](const ParameterName& name, const auto& p) {
    if (count++ >= known.size()) return;
    const KnownParameter& before = known[count - 1];
    // The name is made only for a message, since an update must not allocate.
    const bool same_experts = p.structure == before.structure;
    if (same_experts && p.value.rows() == before.rows && p.value.cols() == before.columns) return;
    require(same_experts, optimizer, ": ", name.string(),
            " is of a layer whose experts were changed without a follow() of this optimizer: call "
            "it after every change");
    require(false, optimizer, ": ", name.string(), " is ", p.value.rows(), " x ", p.value.cols(),
            ", was ", before.rows, " x ", before.columns, " at the first update");
  });
  require(count == known.size(), optimizer, ": the module has ", count, " parameters, had ",
          known.size(), " at the first update");
}

/// The number of updates of an optimizer, and of each parameter: without those in which it was idle or its
/// rate_factor 0.
class UpdateCounts {
 public:
  void match(Index parameters) { of_parameter_.resize(to_size(parameters)); }

  /// The counts after a change of the experts, see ModelChange.
  template <class Module>
  UpdateCounts after(const Module&, const ModelChange& change) const {
    UpdateCounts counts;
    counts.total_ = total_;
    counts.match(change.parameters());
    for (Index i = 0; i < change.parameters() && !of_parameter_.empty(); ++i) {
      const Index from = change[i].parameter;
      if (from != fresh_source) counts.of_parameter_[to_size(i)] = of_parameter_[to_size(from)];
    }
    return counts;
  }
  /// The same functions as those of ParameterState: a number is remembered for every parameter.
  static constexpr bool remembers(Index) { return true; }
  static constexpr void set_remembered(Index, bool) {}
  /// The memory of a parameter's state.
  std::span<char> bytes_of(Index parameter) {
    return {reinterpret_cast<char*>(&of_parameter_[to_size(parameter)]), sizeof(Index)};
  }

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

/// The shape of a matrix in an optimizer's state: that of the parameter, or one column or row of it.
enum class StatePart { whole, rows_by_one, one_by_columns };

/// A part of an optimizer's state: a matrix for each parameter, in the order of for_each_parameter(). The
/// matrix of a parameter that was not `trained` in any call of match() is empty, 0 x 0, which stands for
/// zeros.
template <class Scalar>
class ParameterState {
 public:
  explicit ParameterState(StatePart part = StatePart::whole) : part_(part) {}

  /// Makes matrices of zeros for the trained parameters that have none yet. A later call throws
  /// std::invalid_argument if the module has other parameters than at the first.
  template <class Module>
  void match(const Module& module, std::string_view optimizer) {
    if (matrices_.empty()) {
      *this = zeros_for(module);
      return;
    }
    require_same_parameters(module, optimizer, known_);
    Index index = 0;
    walk_parameters(module, [&](const ParameterName&, const Parameter<Scalar>& p) {
      const Index i = index++;
      if (p.trained && !remembers(i)) set_remembered(i, true);
    });
  }

  /// The state after a change, for a module that was changed.
  template <class Module>
  ParameterState after(const Module& module, const ModelChange& change) const {
    if (matrices_.empty()) return ParameterState(part_);
    ParameterState state = zeros_for(module);
    for (Index i = 0; i < change.parameters(); ++i) {
      const auto [from, columns] = change[i];
      if (from == fresh_source || !remembers(from)) continue;
      if (columns.empty() || part_ == StatePart::rows_by_one) {
        state[i] = (*this)[from];
      } else {
        select_columns((*this)[from], columns, state[i]);
      }
    }
    return state;
  }
  bool remembers(Index parameter) const { return (*this)[parameter].size() > 0; }
  /// Sets the state of a parameter to zeros, or makes it empty.
  void set_remembered(Index parameter, bool remembered) {
    const StateShape shape = remembered ? shape_of(parameter) : StateShape{0, 0};
    resize_to_zero((*this)[parameter], shape.rows, shape.columns);
  }
  /// The memory of a parameter's state.
  std::span<char> bytes_of(Index parameter) { return detail::bytes_of((*this)[parameter]); }

  /// Calls f(name, matrix) for every matrix, named "what.name of the parameter", or f(name, matrix,
  /// shape) where f takes the StateShape that the matrix has when it is not empty.
  template <class Module, class F>
  void for_each(const Module& module, std::string_view what, F&& f) {
    Index index = 0;
    walk_parameters(module, [&](const ParameterName& name, const auto&) {
      const Index i = index++;
      const std::string key = std::string(what) + '.' + name.string();
      if constexpr (std::invocable<F&, const std::string&, Matrix<Scalar>&, StateShape>) {
        f(key, (*this)[i], shape_of(i));
      } else {
        f(key, (*this)[i]);
      }
    });
  }

  std::span<const KnownParameter> known() const { return known_; }
  Index size() const { return static_cast<Index>(matrices_.size()); }
  Matrix<Scalar>& operator[](Index parameter) { return matrices_[to_size(parameter)]; }
  const Matrix<Scalar>& operator[](Index parameter) const { return matrices_[to_size(parameter)]; }

 private:
  template <class Module>
  ParameterState zeros_for(const Module& module) const {
    ParameterState state(part_);
    walk_parameters(module, [&](const ParameterName&, const Parameter<Scalar>& p) {
      state.known_.push_back({p.value.rows(), p.value.cols(), p.structure});
      state.matrices_.emplace_back();
      if (p.trained) state.set_remembered(state.size() - 1, true);
    });
    return state;
  }

  StateShape shape_of(Index parameter) const {
    const KnownParameter& known = known_[to_size(parameter)];
    return {part_ == StatePart::one_by_columns ? 1 : known.rows,
            part_ == StatePart::rows_by_one ? 1 : known.columns};
  }

  StatePart part_;
  std::vector<KnownParameter> known_;
  std::vector<Matrix<Scalar>> matrices_;
};

/// match() of an optimizer with two states, which counts its updates.
template <class Module, class Scalar>
void match_states(const Module& module, std::string_view optimizer, ParameterState<Scalar>& first,
                  ParameterState<Scalar>& second, UpdateCounts& updates) {
  first.match(module, optimizer);
  second.match(module, optimizer);
  updates.match(first.size());
}

}  // namespace detail
}  // namespace moe
