#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/matrix.hpp"

/// \file
/// Parameters, and for_each_parameter(), by which optimizers, checkpoints, gradient checks and
/// clipping reach them.

namespace moe {

/// Which parameters zeroing, clipping and an optimizer's update apply to. Where a gradient of zero has no
/// effect (zeroing, clipping) both give the same bits; each optimizer says what a lazy update does
/// to its decay and momentum.
///
/// A layer tracks the gradients of its experts, so a user's network need not, and a
/// HierarchicalGate tracks those of its secondary gates. Lazy functions do not see a gradient that
/// was written by hand into an expert or a secondary gate without tokens. The gradients of all
/// other modules, other gates included, are not tracked and always count as added to. Lazy zeroing
/// does not touch the memory of tracked gradients: backward writes over it, as after PyTorch's
/// zero_grad(set_to_none=True). (A network that can only add finds zeros there.)
enum class Updates {
  dense,  ///< all parameters
  lazy  ///< leaves out those of experts and secondary gates that got no token since zero_gradients()
};

namespace detail {

/// What is known of a gradient without reading its numbers.
enum class GradientState : unsigned char {
  untracked,  ///< nothing is known
  zero,       ///< nothing was added since it was zero
  stale,  ///< the gradient is zero; its memory holds old numbers, which the next pass overwrites
  added_to,
};

/// Takes the two factors of a matrix's gradient, xᵀ·dy, in the place of their product.
template <class Scalar>
class GradientFactors {
 public:
  /// x is n x rows, dy n x columns of the matrix. Called any number of times in a pass.
  virtual void add(const GatheredRows<Scalar>& x, const GatheredRows<Scalar>& dy) = 0;

 protected:
  ~GradientFactors() = default;
};

/// A gradient as it is stored. Without memory the gradient is zero.
template <class Scalar>
struct StoredGradient {
  Matrix<Scalar> memory;  ///< rows x columns, or empty
  Index rows = 0;         ///< of the value, as constructed
  Index columns = 0;
  GradientState state = GradientState::untracked;
  GradientFactors<Scalar>* factors = nullptr;  ///< gets what linear_scores_backward() would add

  bool is_stale() const { return memory.size() == 0 || state == GradientState::stale; }
};

}  // namespace detail

/// A gradient that is only read. Where a gradient is zero and its memory is missing or stale, the
/// strides are 0 and every element is the same zero.
template <class Scalar>
using GradientView = Eigen::Map<const Matrix<Scalar>, Eigen::Unaligned,
                                Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;

/// Where a backward pass adds to a gradient, and what the memory there holds.
template <class Scalar>
struct Accumulation {
  /// What the memory of a gradient holds.
  enum class Holds {
    zero,   ///< zeros: add
    stale,  ///< old numbers: overwrite all of them
    sum,    ///< what other passes added: add
  };
  Matrix<Scalar>& memory;  ///< of the shape of the value
  Holds holds;             ///< what is in `memory` now
};

/// A trained matrix and the gradient of the loss with respect to it, of the same shape. A bias is
/// 1 x N. Backward passes add to the gradient; zero_gradients() sets it to zero. New values may be
/// assigned to both, but their shape must not change.
///
/// The memory of a gradient is allocated in the first backward pass, so a module that is only
/// evaluated takes none for gradients.
///
/// A parameter that is not `trained` belongs to the module's state without being a weight: it is
/// named, saved and loaded like the others, but no gradient is computed for it, and clipping, the
/// optimizers and their weight decay leave it alone. Optimizers take no memory for a parameter that
/// was never trained. Only the module itself changes it. To freeze a part of a model, set `trained`
/// to false in its parameters: backward then leaves out the products for their gradients, and
/// zero_gradients() releases the memory of these gradients.
template <class Scalar>
struct Parameter {
  Matrix<Scalar> value;                   ///< rows x columns
  bool trained = true;                    ///< whether it is a weight, see above
  detail::StoredGradient<Scalar> stored;  ///< the library's own: see gradient()
  /// The library's own: a number that a layer gives to its parameters whenever experts are added,
  /// copied or removed. An optimizer compares it to the number at its last update or follow().
  std::uint64_t structure = 0;

  Parameter() = default;
  /// Zeros of this shape.
  Parameter(Index rows, Index columns)
      : value(detail::zeros<Scalar>(rows, columns)), stored{{}, rows, columns} {}

  /// Numbers in the value: rows · columns.
  Index size() const { return value.size(); }

  /// The gradient, to read and to write. A gradient that has no memory yet, or stale numbers, is
  /// set to zeros first, so this may allocate and throw std::bad_alloc.
  Matrix<Scalar>& gradient() {
    if (stored.is_stale()) {
      detail::resize_to_zero(stored.memory, stored.rows, stored.columns);
      if (stored.state == detail::GradientState::stale) stored.state = detail::GradientState::zero;
    }
    return stored.memory;
  }

  /// The gradient for a backward pass that can write over stale numbers. A pass that can only add
  /// uses gradient(); for the network of an expert, the layer has called accumulate() already. Call
  /// it right before adding, since from then on the memory counts as the gradient, and only if the
  /// parameter is trained. May take memory and throw std::bad_alloc; the gradient then still has
  /// its old value.
  ///
  ///     const auto [memory, holds] = weight.accumulate();
  ///     if (holds == moe::Accumulation<Scalar>::Holds::stale) memory = dweight;
  ///     else memory += dweight;
  [[nodiscard]] Accumulation<Scalar> accumulate() {
    using Holds = typename Accumulation<Scalar>::Holds;
    using detail::GradientState;
    Holds holds = stored.state == GradientState::zero ? Holds::zero : Holds::sum;
    if (stored.is_stale()) {
      detail::resize(stored.memory, stored.rows, stored.columns);
      holds = Holds::stale;
    }
    if (stored.state != GradientState::untracked) stored.state = GradientState::added_to;
    return {stored.memory, holds};
  }

  /// Sets the gradient to zero in other memory: `memory`, of the shape of the value, or empty for memory to be
  /// taken by the next backward pass. Its numbers do not matter. For a program that has moved the last
  /// gradient out of gradient(), and gives the memory back. Throws std::invalid_argument for another shape.
  void zero_gradient_in(Matrix<Scalar> memory) {
    detail::require(
        memory.size() == 0 || (memory.rows() == stored.rows && memory.cols() == stored.columns),
        "Parameter::zero_gradient_in: memory is ", memory.rows(), " x ", memory.cols(),
        ", must be ", stored.rows, " x ", stored.columns, " or empty");
    stored.memory.swap(memory);
    if (stored.state == detail::GradientState::untracked) {
      stored.memory.setZero();
    } else {
      stored.state = detail::GradientState::stale;
    }
  }

  /// The gradient, to read. Takes no memory: a stale gradient is seen as zeros.
  GradientView<Scalar> gradient() const {
    static constexpr Scalar zero{0};
    using Stride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
    if (stored.is_stale()) return {&zero, stored.rows, stored.columns, Stride(0, 0)};
    const Matrix<Scalar>& memory = stored.memory;
    return {memory.data(), memory.rows(), memory.cols(), Stride(memory.cols(), 1)};
  }
};

/// A parameter's name in the dotted form of a PyTorch state dict, "experts.3.up.weight". The string
/// is made only when the name is converted, so walking over the parameters does not allocate. Valid
/// only inside the call that received it.
class ParameterName {
 public:
  ParameterName() = default;
  /// The name of a part, "up", of something that has a name.
  ParameterName(const ParameterName& parent, std::string_view part)
      : parent_(&parent), part_(part) {}
  /// The name of element `index` of a list that has a name.
  ParameterName(const ParameterName& parent, Index index) : parent_(&parent), index_(index) {}

  /// The whole name, parts separated by dots.
  std::string string() const {
    if (parent_ == nullptr) return {};
    std::string text = parent_->string();
    if (!text.empty()) text += '.';
    (part_.empty() ? detail::MessagePart(index_) : detail::MessagePart(part_)).append_to(text);
    return text;
  }
  /// The same, implicitly.
  operator std::string() const { return string(); }  // NOLINT(google-explicit-constructor)

 private:
  const ParameterName* parent_ = nullptr;
  std::string_view part_;
  Index index_ = 0;
};

namespace detail {

template <class Module, class F>
void visit_parameters(Module& module, const ParameterName& name, F& f);

/// The visitor that a module's visit_parameters gets. Called with a name and a member, it calls f for a
/// parameter, and visits the parameters of a module or a vector of modules.
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

/// A visitor that takes any member, for concepts that require visit_parameters.
struct AnyVisitor {
  template <class Member>
  void operator()(std::string_view, Member&) const {}
};

// The types that networks, gates and policies must have, one by one, for messages about a missing one.
// clang-format off
template <class T>
concept HasScalar = requires { typename T::Scalar; };
template <class T>
concept HasConfig = requires { typename T::Config; };
template <class T>
concept HasTape = requires { typename T::Tape; };
// clang-format on

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

/// Calls f(name, part) for the outermost parts of a module, itself included, for which
/// IsWanted<Part>::value.
template <template <class> class IsWanted, class Module, class F>
void walk_parts(Module& module, const ParameterName& name, F& f) {
  using Type = std::remove_const_t<Module>;
  if constexpr (IsWanted<Type>::value) {
    f(name, module);
  } else if constexpr (is_vector<Type>) {
    Index index = 0;
    for (auto& element : module) walk_parts<IsWanted>(element, ParameterName(name, index++), f);
  } else if constexpr (!is_parameter<Type>) {
    Type::visit_parameters(module, [&](std::string_view part, auto& member) {
      walk_parts<IsWanted>(member, ParameterName(name, part), f);
    });
  }
}

/// Calls f(name, parameter) for every parameter, whatever state its gradient is in.
template <class Module, class F>
void walk_parameters(Module& module, F&& f) {
  visit_parameters(module, ParameterName(), f);
}

/// Throws std::invalid_argument if the value of a parameter no longer has its original shape, such
/// as a weight of PyTorch that was not transposed. `of` names the module.
template <class Module>
void check_shapes(const Module& module, std::string_view of) {
  walk_parameters(module, [&](const ParameterName& name, const auto& p) {
    if (p.value.rows() == p.stored.rows && p.value.cols() == p.stored.columns) return;
    fail(of, ": ", name.string(), " is ", p.value.rows(), " x ", p.value.cols(), ", must be ",
         p.stored.rows, " x ", p.stored.columns);
  });
}

/// Calls f(p, q) for the parameters of two modules with the same number of parameters, in their
/// order. `of_second` is scratch.
template <class First, class Second, class P, class F>
void walk_together(First& first, Second& second, std::vector<P*>& of_second, F&& f) {
  of_second.clear();
  walk_parameters(second, [&](const ParameterName&, P& q) { of_second.push_back(&q); });
  auto next = of_second.begin();
  walk_parameters(first, [&](const ParameterName&, auto& p) { f(p, **next++); });
}

/// Throws std::invalid_argument unless two modules of a type have parameters of the same shapes.
/// The message begins with `of`, followed by the name of the parameter in the module.
template <class Module>
void check_same_shapes(const Module& there, const Module& here, std::string_view of) {
  std::vector<std::pair<Index, Index>> shapes;
  walk_parameters(here, [&](const ParameterName&, const auto& p) {
    shapes.emplace_back(p.value.rows(), p.value.cols());
  });
  std::size_t next = 0;
  walk_parameters(there, [&](const ParameterName& name, const auto& p) {
    const auto [rows, columns] =
        next < shapes.size() ? shapes[next++] : std::pair<Index, Index>{0, 0};
    if (rows == p.value.rows() && columns == p.value.cols()) return;
    fail(of, name.string(), " would become ", rows, " x ", columns, ", must be ", p.value.rows(),
         " x ", p.value.cols());
  });
  require(next == shapes.size(), of, ": the numbers of parameters differ");
}

/// Whether an update leaves a parameter out.
template <class Scalar>
bool is_idle(const Parameter<Scalar>& parameter, Updates updates) {
  if (!parameter.trained) return true;
  return updates == Updates::lazy && (parameter.stored.state == GradientState::zero ||
                                      parameter.stored.state == GradientState::stale);
}

template <class Module>
Index count_parameters(const Module& module) {
  Index count = 0;
  walk_parameters(module, [&](const ParameterName&, const auto&) { ++count; });
  return count;
}

/// Whether a module has a parameter that is trained.
template <class Module>
bool is_trained(const Module& module) {
  bool trained = false;
  walk_parameters(module, [&](const ParameterName&, const auto& p) {
    trained = trained || (p.trained && p.size() > 0);
  });
  return trained;
}

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
/// nothing else. This function may be called from several threads too, on a const module.
template <class Module, class F>
void for_each_parameter(Module& module, F&& f) {
  detail::walk_parameters(module,
                          [&](const ParameterName& name, auto& parameter) { f(name, parameter); });
}

/// The number of trained scalars of a module.
template <class Module>
Index parameter_count(const Module& module) {
  Index count = 0;
  for_each_parameter(module, [&](const ParameterName&, const auto& p) {
    if (p.trained) count += p.size();
  });
  return count;
}

/// Sets every gradient to zero; call it before the first backward pass of an update. With
/// Updates::lazy, tracked gradients (see Updates) are only marked as stale, and backward writes over
/// them. The gradients of parameters that are not trained are released.
template <class Module>
void zero_gradients(Module& module, Updates updates = Updates::dense) {
  using detail::GradientState;
  detail::walk_parameters(module, [&](const ParameterName&, auto& p) {
    const bool tracked = p.stored.state != GradientState::untracked;
    if (!p.trained) {
      p.stored.memory.resize(0, 0);
      if (tracked) p.stored.state = GradientState::zero;
      return;
    }
    if (p.stored.is_stale() || detail::is_idle(p, updates)) return;
    if (tracked && updates == Updates::lazy) {
      p.stored.state = GradientState::stale;
      return;
    }
    std::fill_n(p.stored.memory.data(), p.stored.memory.size(), 0);
    if (tracked) p.stored.state = GradientState::zero;
  });
}

namespace detail {

/// Begins to track the gradients of a module, which are zero afterwards. From then on everything
/// that adds to a gradient must call accumulate().
template <class Module>
void track_gradients(Module& module) {
  walk_parameters(module, [](const ParameterName&, auto& p) {
    p.stored.memory.resize(0, 0);
    p.stored.state = GradientState::zero;
  });
}

/// Takes memory for the tracked gradients of trained parameters, so that an expert that gets its first
/// tokens in a later pass need not allocate. The memory is not written to: those gradients are stale.
template <class Module>
void reserve_gradients(Module& module) {
  walk_parameters(module, [](const ParameterName&, auto& p) {
    const bool tracked = p.stored.state != GradientState::untracked;
    if (!tracked || !p.trained || p.stored.memory.size() == p.size()) return;
    resize(p.stored.memory, p.stored.rows, p.stored.columns);
    p.stored.state = GradientState::stale;
  });
}

/// Parameter::accumulate() for all trained parameters of a module; the gradients of the others become
/// stale. If the pass `can_replace` gradients and all are stale, returns true: the pass must then write
/// over all of them. Otherwise sets stale ones to zeros and returns false.
template <class Module>
bool accumulate(Module& module, bool can_replace = false) {
  bool replace = can_replace;
  walk_parameters(module, [&](const ParameterName&, const auto& p) {
    replace = replace && (!p.trained || p.stored.is_stale());
  });
  walk_parameters(module, [&](const ParameterName&, auto& p) {
    if (!p.trained) {
      const bool tracked = p.stored.state != GradientState::untracked;
      if (tracked) p.stored.state = GradientState::stale;
      return;
    }
    const auto [memory, holds] = p.accumulate();
    using Holds = decltype(holds);
    if (!replace && holds == Holds::stale) std::fill_n(memory.data(), memory.size(), 0);
  });
  return replace;
}

}  // namespace detail

}  // namespace moe
