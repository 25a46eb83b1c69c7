#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/parameter.hpp"

namespace moe {

/// How the update of a parameter differs from that of others.
struct ParameterGroup {
  double rate_factor = 1;  ///< a factor of the learning rate, finite and at least 0
  std::optional<double> weight_decay =
      std::nullopt;  ///< finite and at least 0; without one, the optimizer's
};

/// The group of a parameter by its name, that of for_each_parameter(): "gate.weight",
/// "experts.0.up.weight". A function, which an optimizer takes by set_groups():
///
///     adam.set_groups([](std::string_view name) -> moe::ParameterGroup {
///       if (name.ends_with("bias")) return {.weight_decay = 0};
///       if (name.starts_with("gate.")) return {.rate_factor = 0.1};
///       return {};
///     });
///
/// The optimizer calls it once for each parameter, in the next update, and again in an update of other
/// parameters or of a module that was moved in memory. Groups belong to the configuration: they are not
/// saved with an optimizer's state, and loading a state does not change them.
///
/// For a rate_factor of 0 the value of the parameter, its state in the optimizer and the number of its
/// updates do not change. Backward still computes its gradient, and clipping counts it; to have no
/// gradient either, set Parameter::trained to false.
using ParameterGroups = std::function<ParameterGroup(std::string_view name)>;

namespace detail {

/// The groups of all parameters of a module, for all optimizers.
class ResolvedGroups {
 public:
  /// Of one parameter.
  struct Group {
    double rate_factor = 1;
    double weight_decay = 0;
  };

  void set(ParameterGroups groups) {
    groups_ = std::move(groups);
    resolved_.clear();
    module_type_ = nullptr;
  }

  /// Called first in an update of a module; `weight_decay` is the optimizer's. Throws
  /// std::invalid_argument if a group or a learning rate is out of range.
  template <class Module>
  void match(const Module& module, std::string_view optimizer, double weight_decay,
             double learning_rate) {
    resolve(module, optimizer, weight_decay);
    check_learning_rate(optimizer, learning_rate);
  }

  const Group& operator[](Index parameter) const {
    return used() ? resolved_[to_size(parameter)].group : common_;
  }

  /// Whether a parameter's rate_factor is 0.
  bool is_fixed(Index parameter) const { return (*this)[parameter].rate_factor == 0; }

 private:
  struct Resolved {
    Group group;
    const void* parameter;  ///< only compared
    std::uint64_t structure;
  };

  bool used() const { return groups_ != nullptr; }

  /// Finds the groups of the parameters. If that was done before for the same parameters, it makes no
  /// names and does not allocate. Throws std::invalid_argument, with nothing changed, if a group is out
  /// of range.
  template <class Module>
  void resolve(const Module& module, std::string_view optimizer, double weight_decay) {
    common_.weight_decay = weight_decay;
    if (!used() || is_resolved(module)) return;
    std::vector<Resolved> resolved;
    double largest_factor = 0;
    walk_parameters(module, [&](const ParameterName& parameter_name, const auto& parameter) {
      const std::string name = parameter_name.string();
      const ParameterGroup group = groups_(name);
      const auto check = [&](const char* field, double value) {
        require(value >= 0 && std::isfinite(value), optimizer, "::update: the group of ", name,
                ": ", field, " = ", value, ", must be finite and at least 0");
      };
      check("rate_factor", group.rate_factor);
      if (group.weight_decay) check("weight_decay", *group.weight_decay);
      resolved.push_back({{group.rate_factor, group.weight_decay.value_or(weight_decay)},
                          &parameter,
                          parameter.structure});
      largest_factor = std::max(largest_factor, group.rate_factor);
    });
    resolved_ = std::move(resolved);
    largest_factor_ = largest_factor;
    module_type_ = &type_tag<Module>;
  }

  /// Throws std::invalid_argument unless the learning rates of all parameters are finite and at
  /// least 0.
  void check_learning_rate(std::string_view optimizer, double learning_rate) const {
    require(learning_rate >= 0 && std::isfinite(learning_rate), optimizer,
            "::update: learning_rate = ", learning_rate, ", must be finite and at least 0");
    require(!used() || std::isfinite(learning_rate * largest_factor_), optimizer,
            "::update: learning_rate = ", learning_rate, " times rate_factor = ", largest_factor_,
            ", must be finite");
  }

  template <class Module>
  static constexpr char type_tag = 0;

  /// Compares the type of the module, and the addresses and structure numbers of its parameters:
  /// the names depend on nothing else.
  template <class Module>
  bool is_resolved(const Module& module) const {
    if (module_type_ != &type_tag<Module>) return false;
    std::size_t index = 0;
    bool same = true;
    walk_parameters(module, [&](const ParameterName&, const auto& parameter) {
      same = same && index < resolved_.size() && resolved_[index].parameter == &parameter &&
             resolved_[index].structure == parameter.structure;
      ++index;
    });
    return same && index == resolved_.size();
  }

  ParameterGroups groups_;
  Group common_;  ///< of all parameters where no groups are set
  std::vector<Resolved> resolved_;
  const char* module_type_ = nullptr;
  double largest_factor_ = 1;
};

}  // namespace detail
}  // namespace moe
