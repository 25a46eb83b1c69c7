#pragma once

#include <type_traits>

/// \file
/// A callable as an argument, without a template.

namespace moe::detail {

template <class Signature>
class FunctionRef;

/// A reference to a callable, which must outlive it. A function that takes one is compiled once, and
/// not once for every lambda. Neither making nor calling one allocates.
template <class Result, class... Arguments>
class FunctionRef<Result(Arguments...)> {
 public:
  /// Refers to nothing and must not be called.
  FunctionRef() = default;

  template <class F>
  requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef> &&
           std::is_invocable_r_v<Result, F&, Arguments...>)
      FunctionRef(F&& f)  // NOLINT: implicit, so that a lambda can be passed where one is taken
      : call_([](void* object, Arguments... arguments) -> Result {
          auto& callable = *reinterpret_cast<std::remove_reference_t<F>*>(object);
          if constexpr (std::is_void_v<Result>) {
            callable(arguments...);  // and drop its result
          } else {
            return callable(arguments...);
          }
        }) {
    if constexpr (std::is_function_v<std::remove_reference_t<F>>) {
      object_ = reinterpret_cast<void*>(&f);
    } else {
      object_ = const_cast<void*>(static_cast<const void*>(&f));
    }
  }

  explicit operator bool() const { return call_ != nullptr; }
  Result operator()(Arguments... arguments) const { return call_(object_, arguments...); }

 private:
  void* object_ = nullptr;
  Result (*call_)(void*, Arguments...) = nullptr;
};

}  // namespace moe::detail
