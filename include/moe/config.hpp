#pragma once

#include <Eigen/Core>
#include <cassert>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

/// \file
/// What the library asks of its surroundings, and how it complains.

#if !(__cplusplus >= 202002L || (defined(_MSVC_LANG) && _MSVC_LANG >= 202002L))
#error "moe needs C++20: compile with -std=c++20 or link the CMake target moe::moe"
#endif

#if !EIGEN_VERSION_AT_LEAST(3, 4, 0)
#error "moe needs Eigen 3.4 or newer"
#endif

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error \
    "moe relies on IEEE arithmetic (NaN, fixed order of sums): compile without -ffast-math and -ffinite-math-only"
#endif

/// Checks an internal invariant; what a caller can get wrong is an exception instead.
/// Define it before the first include to replace it.
#ifndef MOE_ASSERT
#define MOE_ASSERT(condition) assert(condition)
#endif

namespace moe::detail {

static_assert(sizeof(Eigen::Index) >= 8, "moe counts in 64 bits");

template <class Part>
void append(std::string& text, const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(part));
    text += digits;
  } else if constexpr (std::is_integral_v<Part>) {
    text += std::to_string(part);
  } else {
    text += std::string_view(part);
  }
}

/// Throws std::invalid_argument with the concatenated parts unless the condition holds. Every
/// message names the field and the numbers, since it may be all that reaches a log.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string text = "moe: ";
  (append(text, parts), ...);
  throw std::invalid_argument(text);
}

}  // namespace moe::detail
