#pragma once

#include <cstdint>

#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace moe {

namespace detail {

/// The settings in the calling thread's floating-point control register (x86: MXCSR without its exception
/// flags; 64-bit ARM: FPCR): the rounding mode, and the treatment of denormal numbers. 0 on other
/// processors.
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

/// Sets the calling thread's control register, and restores it in the destructor.
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

/// As long as it exists, denormal numbers (for float those below 1.2e-38) count as 0 on the calling
/// thread, and on the library's workers while they work for that thread:
///
///     const moe::FlushDenormals flush;
///     for (...) { ... }  // the training
///
/// Processors compute with denormal numbers many times slower than with others, and they occur in
/// training: if a gate gives an expert a weight of 1e-38, the gradients through it and the moments of an
/// optimizer are as small. A sign of them is that training becomes slower with time. PyTorch has
/// torch.set_flush_denormal for this. Other threads of the program are not changed.
class FlushDenormals {
 public:
  /// Whether the library can do this on the processor: x86 with SSE, 64-bit ARM. On others the class has no
  /// effect.
  static constexpr bool supported = detail::denormals_are_flushed != 0;

  /// Changes the calling thread's control register.
  FlushDenormals() : control_(detail::float_control() | detail::denormals_are_flushed) {}

 private:
  detail::FloatControl control_;
};

}  // namespace moe
