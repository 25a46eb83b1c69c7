#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/matrix.hpp"

/// \file
/// Parameters, and the one door through which optimizers, checkpoints, gradient checks and
/// clipping reach them.

namespace moe {

/// Which parameters zeroing, clipping and an optimizer's update go to. `dense`: all of them.
/// `lazy`: not to those of experts that got no token since zero_gradients(); these then cost
/// nothing but being walked over. Where a gradient of zero has no effect (zeroing, clipping) the
/// results have the same bits; the optimizers say what becomes of decay and momentum.
///
/// An expert in a layer keeps track of its own gradients, so a user's network need not, and so does
/// a HierarchicalGate of those of its secondary gates. Gradients written by hand into either
/// without a token are not seen by what is lazy; those of all other modules, other gates included,
/// always are. Lazy zeroing does not touch such memory: backward writes over what is there, as
/// after PyTorch's zero_grad(set_to_none=True) (a plain network, which can only add, gets zeros
/// first), and for_each_parameter() puts zeros there before it shows the gradient of what got no
/// token. So after lazy zeroing, and before backward, gradients are to be read and written through
/// for_each_parameter() on a module that is not const.
enum class Updates { dense, lazy };

namespace detail {

/// What is known of a gradient without looking at it.
enum class GradientState : unsigned char {
  untracked,  ///< nothing, nobody keeps track
  zero,       ///< nothing was added since it was zero
  cleared,  ///< it stands for zero, but its memory holds old numbers, for whoever adds to write over
  added_to,
};

}  // namespace detail

/// A trained matrix and the gradient of the loss by it, of the same shape. A bias is 1 x N.
/// Backward passes add to the gradient; zero_gradients() clears it. New values may be assigned to
/// both, but the shape must stay what the module made it.
///
/// A parameter that is not `trained` belongs to the module's state without being a weight: it is
/// named, saved and loaded like the others, but no gradient is added to it, and zeroing, clipping
/// and the optimizers pass it by, weight decay included. Only the module moves it.
template <class Scalar>
struct Parameter {
  Matrix<Scalar> value;
  Matrix<Scalar> gradient;
  bool trained = true;
  detail::GradientState gradient_state = detail::GradientState::untracked;  ///< set by who keeps track

  Parameter() = default;
  Parameter(Index rows, Index columns)
      : value(detail::zeros<Scalar>(rows, columns)),
        gradient(detail::zeros<Scalar>(rows, columns)) {}

  Index size() const { return value.size(); }
};

/// A parameter's name in the dotted form of a PyTorch state dict, "experts.3.up.weight". It is put
/// together only when asked for, so walking over the parameters takes no memory. Valid only inside
/// the call that received it.
class ParameterName {
 public:
  ParameterName() = default;
  ParameterName(const ParameterName& parent, std::string_view part)
      : parent_(&parent), part_(part) {}
  ParameterName(const ParameterName& parent, Index index) : parent_(&parent), index_(index) {}

  std::string string() const {
    if (parent_ == nullptr) return {};
    std::string text = parent_->string();
    if (!text.empty()) text += '.';
    (part_.empty() ? detail::Part(index_) : detail::Part(part_)).append_to(text);
    return text;
  }
  operator std::string() const { return string(); }  // NOLINT(google-explicit-constructor)

 private:
  const ParameterName* parent_ = nullptr;
  std::string_view part_;
  Index index_ = 0;
};

namespace detail {

template <class Module, class F>
void visit_parameters(Module& module, const ParameterName& name, F& f);

/// What a module's visit_parameters receives: called with a name and a member, it hands a parameter
/// to the user's function and walks into a module or a vector of modules.
template <class F>
class ParameterVisitor {
 public:
  ParameterVisitor(const ParameterName& prefix, F& f) : prefix_(prefix), f_(f) {}

  template <class Member>
  void operator()(std::string_view part, Member& member) const {
    visit_parameters(member, ParameterName(prefix_, part), f_);
  }

 private:
  const ParameterName& prefix_;
  F& f_;
};

/// Stands for any visitor where a concept asks whether a type has visit_parameters.
struct AnyVisitor {
  template <class Member>
  void operator()(std::string_view, Member&) const {}
};

template <class T>
inline constexpr bool is_parameter = false;
template <class Scalar>
inline constexpr bool is_parameter<Parameter<Scalar>> = true;

template <class T>
inline constexpr bool is_vector = false;
template <class T>
inline constexpr bool is_vector<std::vector<T>> = true;

template <class Module, class F>
void visit_parameters(Module& module, const ParameterName& name, F& f) {
  using Type = std::remove_const_t<Module>;
  if constexpr (is_parameter<Type>) {
    f(name, module);
  } else if constexpr (is_vector<Type>) {
    Index index = 0;
    for (auto& element : module) visit_parameters(element, ParameterName(name, index++), f);
  } else {
    Type::visit_parameters(module, ParameterVisitor<F>(name, f));
  }
}

/// Calls f(name, parameter) for every parameter, whatever state its gradient is in.
template <class Module, class F>
void walk_parameters(Module& module, F&& f) {
  visit_parameters(module, ParameterName(), f);
}

/// Whether a parameter is to be passed by.
template <class Scalar>
bool is_idle(const Parameter<Scalar>& parameter, Updates updates) {
  if (!parameter.trained) return true;
  return updates == Updates::lazy && (parameter.gradient_state == GradientState::zero ||
                                      parameter.gradient_state == GradientState::cleared);
}

/// Makes the memory of a gradient say what the gradient is.
template <class Scalar>
void settle(Parameter<Scalar>& parameter) {
  if (parameter.gradient_state != GradientState::cleared) return;
  resize_to_zero(parameter.gradient, parameter.gradient.rows(), parameter.gradient.cols());
  parameter.gradient_state = GradientState::zero;
}
template <class Scalar>
void settle(const Parameter<Scalar>&) {}

}  // namespace detail

/// Calls f(name, parameter) for every parameter of a module, in an order that never changes.
/// `name` converts to std::string; `parameter` is const when the module is.
///
///     moe::for_each_parameter(layer, [](const std::string& name, auto& parameter) {
///       std::printf("%s: %td\n", name.c_str(), parameter.size());
///     });
///
/// A module takes part by naming its parameters and its parts:
///
///     template <class Self, class Visitor>
///     static void visit_parameters(Self& self, Visitor visit) {
///       visit("weight", self.weight);   // a Parameter, a module, or a std::vector of either
///       visit("bias", self.bias);
///     }
///
/// visit_parameters may be called from several threads at once (an optimizer does), so it should do
/// no more. So may this function on a const module. On one that is not const it may write: zeros,
/// where zero_gradients(module, Updates::lazy) left old numbers that nothing was added to. On a
/// const module such old numbers are what it shows.
template <class Module, class F>
void for_each_parameter(Module& module, F&& f) {
  detail::walk_parameters(module, [&](const ParameterName& name, auto& parameter) {
    detail::settle(parameter);
    f(name, parameter);
  });
}

/// Number of trained scalars.
template <class Module>
Index parameter_count(const Module& module) {
  Index count = 0;
  for_each_parameter(module, [&](const ParameterName&, const auto& p) {
    if (p.trained) count += p.size();
  });
  return count;
}

/// Sets every gradient to zero: before the first backward pass of an update. Lazy, it takes those
/// that nothing was added to for zero already, and leaves it to backward to write over the others.
template <class Module>
void zero_gradients(Module& module, Updates updates = Updates::dense) {
  using detail::GradientState;
  detail::walk_parameters(module, [&](const ParameterName&, auto& p) {
    if (detail::is_idle(p, updates)) return;
    const bool tracked = p.gradient_state != GradientState::untracked;
    if (tracked && updates == Updates::lazy) {
      p.gradient_state = GradientState::cleared;
      return;
    }
    detail::resize_to_zero(p.gradient, p.gradient.rows(), p.gradient.cols());
    if (tracked) p.gradient_state = GradientState::zero;
  });
}

namespace detail {

/// Starts to keep track of the gradients of a module, which must be zero, as constructors leave
/// them. From then on whatever adds to one calls mark_gradients().
template <class Module>
void track_gradients(Module& module) {
  walk_parameters(module, [](const ParameterName&, auto& p) {
    MOE_ASSERT(std::count(p.gradient.data(), p.gradient.data() + p.size(), 0) == p.size());
    p.gradient_state = GradientState::zero;
  });
}

/// Notes that a backward pass adds to the gradients of a module, if they are kept track of. Returns
/// whether it must write over them instead, all of them being cleared, which only happens if it
/// `can_replace` them.
template <class Module>
bool mark_gradients(Module& module, bool can_replace = false) {
  bool replace = can_replace;
  walk_parameters(module, [&](const ParameterName&, const auto& p) {
    replace = replace && (p.gradient_state == GradientState::cleared || p.size() == 0);
  });
  walk_parameters(module, [&](const ParameterName&, auto& p) {
    if (!replace) settle(p);
    if (p.gradient_state != GradientState::untracked) p.gradient_state = GradientState::added_to;
  });
  return replace;
}

}  // namespace detail

}  // namespace moe
