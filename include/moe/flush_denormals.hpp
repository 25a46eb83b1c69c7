#pragma once

#include <cstdint>

#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace moe {

namespace detail {

/// The settings in the calling thread's floating-point control register (x86: MXCSR without the
/// exceptions that have happened; 64-bit ARM: FPCR): its rounding, and what it does with denormal
/// numbers. 0 where there is no access to it.
inline std::uint64_t float_control() {
#if defined(__SSE__) || defined(_M_X64)
  return _mm_getcsr() & ~unsigned{_MM_EXCEPT_MASK};
#elif defined(__aarch64__)
  std::uint64_t control = 0;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  return control;
#else
  return 0;
#endif
}

inline void set_float_control([[maybe_unused]] std::uint64_t control) {
#if defined(__SSE__) || defined(_M_X64)
  _mm_setcsr(static_cast<unsigned>(control) | (_mm_getcsr() & unsigned{_MM_EXCEPT_MASK}));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(control));
#endif
}

#if defined(__SSE__) || defined(_M_X64)
inline constexpr std::uint64_t denormals_are_flushed = 0x8040;  // FTZ for results, DAZ for operands
#elif defined(__aarch64__)
inline constexpr std::uint64_t denormals_are_flushed = std::uint64_t{1} << 24;  // FZ
#else
inline constexpr std::uint64_t denormals_are_flushed = 0;
#endif

/// For as long as it lives the calling thread computes with this control register.
class FloatControl {
 public:
  explicit FloatControl(std::uint64_t control) : before_(float_control()) {
    if (control != before_) set_float_control(control);
  }
  ~FloatControl() {
    if (float_control() != before_) set_float_control(before_);
  }
  FloatControl(const FloatControl&) = delete;
  FloatControl& operator=(const FloatControl&) = delete;

 private:
  std::uint64_t before_;
};

}  // namespace detail

/// For as long as it lives, denormal numbers (in float those below 1.2e-38) count as 0 on the calling
/// thread, and in all that the library's workers do for it:
///
///     const moe::FlushDenormals flush;
///     for (...) { ... }  // the training
///
/// Processors calculate with denormal numbers many times slower than with others, and training
/// makes them in passing: a gate that is sure of its choice gives its second expert a weight of
/// 1e-38, and what goes back through it, and the moments of an optimizer, is as small. A training
/// that slows down while it goes on is a sign of them. PyTorch's name for this is
/// torch.set_flush_denormal. The program's other threads are left as they are.
class FlushDenormals {
 public:
  /// Whether this processor can do it, and the library knows how: x86 with SSE, 64-bit ARM. Elsewhere
  /// the class has no effect.
  static constexpr bool supported = detail::denormals_are_flushed != 0;

  FlushDenormals() : control_(detail::float_control() | detail::denormals_are_flushed) {}

 private:
  detail::FloatControl control_;
};

}  // namespace moe
