#pragma once

#include <Eigen/Core>
#include <cassert>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

/// \file
/// What the library needs of the compiler and of Eigen, its macros, and its error messages.

#if !(__cplusplus >= 202002L || (defined(_MSVC_LANG) && _MSVC_LANG >= 202002L))
#error "moe needs C++20: compile with -std=c++20 or link the CMake target moe::moe"
#endif

#if !EIGEN_VERSION_AT_LEAST(3, 4, 0)
#error "moe needs Eigen 3.4 or newer"
#endif

#ifndef __cpp_exceptions
#error "moe reports errors by exceptions: compile without -fno-exceptions"
#endif

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error \
    "moe relies on IEEE arithmetic (NaN, fixed order of sums): compile without -ffast-math and -ffinite-math-only"
#endif

/// Checks an internal invariant; for what a caller can get wrong there are exceptions. Define it before
/// the first include of the library to replace it; by default it is assert().
#ifndef MOE_ASSERT
#define MOE_ASSERT(condition) assert(condition)
#endif

/// Before a loop with a small constant number of steps: unrolls it, so that the arrays it indexes
/// become registers.
#if defined(__clang__)
#define MOE_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define MOE_UNROLL _Pragma("GCC unroll 32")
#else
#define MOE_UNROLL
#endif

/// After the parameter list of a lambda that must be inlined, so that its captures stay in registers.
#if defined(__GNUC__)
#define MOE_INLINED __attribute__((always_inline))
#else
#define MOE_INLINED
#endif

/// Before a function that must not be inlined.
#if defined(__GNUC__)
#define MOE_NOINLINE [[gnu::noinline]]
#else
#define MOE_NOINLINE
#endif

/// MOE_PACKETS_BEGIN and MOE_PACKETS_END enclose templates that have SIMD vectors (packets) as
/// template arguments: they turn off GCC's warning that it ignores the attributes of such types.
#if defined(__GNUC__)
// clang-format off
#define MOE_PACKETS_BEGIN        \
  _Pragma("GCC diagnostic push") \
  _Pragma("GCC diagnostic ignored \"-Wignored-attributes\"")
// clang-format on
/// See MOE_PACKETS_BEGIN.
#define MOE_PACKETS_END _Pragma("GCC diagnostic pop")
#else
#define MOE_PACKETS_BEGIN
#define MOE_PACKETS_END
#endif

namespace moe::detail {

static_assert(sizeof(Eigen::Index) >= 8, "moe needs a 64-bit Eigen::Index");

/// A piece of a message: a text, a whole number, or a floating-point number.
class MessagePart {
 public:
  template <class T>
  requires std::is_signed_v<T> && std::is_integral_v<T>
  explicit MessagePart(T value) : kind_(Kind::whole), whole_(value) {}
  template <class T>
  requires std::is_unsigned_v<T> && std::is_integral_v<T>
  explicit MessagePart(T value) : kind_(Kind::count), count_(value) {}
  template <class T>
  requires std::is_floating_point_v<T>
  explicit MessagePart(T value) : kind_(Kind::number), number_(static_cast<double>(value)) {}
  explicit MessagePart(std::string_view value) : kind_(Kind::text), text_(value) {}

  void append_to(std::string& text) const {
    char digits[32] = "";
    switch (kind_) {
      case Kind::text:
        text += text_;
        return;
      case Kind::whole:
        std::snprintf(digits, sizeof(digits), "%lld", whole_);
        break;
      case Kind::count:
        std::snprintf(digits, sizeof(digits), "%llu", count_);
        break;
      case Kind::number:
        std::snprintf(digits, sizeof(digits), "%g", number_);
        break;
    }
    text += digits;
  }

 private:
  enum class Kind { text, whole, count, number } kind_;
  union {
    std::string_view text_;
    long long whole_;
    unsigned long long count_;
    double number_;
  };
};

inline std::string join_parts(std::initializer_list<MessagePart> parts) {
  std::string text;
  for (const MessagePart& part : parts) part.append_to(text);
  return text;
}

/// The parts one after the other, floating-point numbers as "%g" prints them.
template <class... Parts>
std::string join(const Parts&... parts) {
  return join_parts({MessagePart(parts)...});
}

/// One function throws for all checks: inlined into each of them, the code that throws would be a
/// tenth of what a program compiles.
#if defined(__GNUC__)
[[gnu::noinline, gnu::cold]]
#endif
// clang-format off
[[noreturn]] inline void throw_invalid_argument(std::initializer_list<MessagePart> parts) {
  throw std::invalid_argument("moe: " + join_parts(parts));
}
// clang-format on

/// Throws std::invalid_argument with the concatenated parts. Every message names the field and the numbers,
/// since it may be all that reaches a log.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw_invalid_argument({MessagePart(parts)...});
}

/// fail(parts...) unless the condition holds. (A call of it would be one more function to compile for each
/// message.)
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw_invalid_argument({MessagePart(parts)...});
}

}  // namespace moe::detail
