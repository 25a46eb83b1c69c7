#pragma once

#include <cmath>

#include "moe/weights/format.hpp"

MOE_PACKETS_BEGIN

namespace moe {

/// Weights of 4 bits, in blocks of 32 along K of each column. A weight is q·scale, with a whole number q
/// from -8 to 7. The scale of a block, in float16, is its value of largest magnitude over -8, as in
/// ggml's q4_0. 0.5625 bytes per weight. For its members see NarrowFormat in format.hpp.
struct Int4 {
  static constexpr const char* name = "int4";           ///< in messages and files
  using Code = std::int8_t;                             ///< of one weight, from -8 to 7
  static constexpr Index group = 8;                     ///< steps of k in a lane
  static constexpr Index group_bytes = 4;               ///< bytes of a lane
  static constexpr Index block = detail::scaled_steps;  ///< steps of k that share a scale
  static constexpr bool scaled = true;                  ///< whether blocks have scales

  /// The scale of a block of `count` weights.
  static float scale(const float* values, Index count) {
    float largest = 0;
    for (Index i = 0; i < count; ++i) {
      if (std::abs(values[i]) > std::abs(largest)) largest = values[i];
    }
    return detail::round_to_half(largest / -8);
  }
  /// The code of a weight.
  static Code encode(float value, float scale) { return detail::scaled_code(value, scale, -8, 7); }
  /// Exact: 4 bits times the 11 of a scale fit into a float.
  static float decode(Code code, float scale) { return static_cast<float>(code) * scale; }

  /// A code is stored as q + zero. Steps 0 to 3 are the low halves of a lane's bytes, steps 4 to 7 the
  /// high ones, so that a mask gives four consecutive steps as bytes.
  static constexpr std::int32_t zero = 8;
  static constexpr std::int32_t most_stored = 15;  ///< the largest byte of bytes()

  /// The code of step `step` in a lane.
  static Code get(const std::byte* lane, Index step) {
    return static_cast<Code>((std::to_integer<Index>(lane[step % 4]) >> (4 * (step / 4)) & 15) -
                             zero);
  }
  /// Writes the code of step `step` of a lane.
  static void set(std::byte* lane, Index step, Code code) {
    const int shift = static_cast<int>(4 * (step / 4));
    lane[step % 4] = (lane[step % 4] & static_cast<std::byte>(0xF0 >> shift)) |
                     static_cast<std::byte>((code + zero) << shift);
  }
  /// Four steps of k as unsigned bytes, which are the codes + `zero`: part 0 has steps 0 to 3, part 1
  /// steps 4 to 7.
  template <Index part>
  EIGEN_ALWAYS_INLINE static detail::Lanes bytes(const std::byte* lane) {
    return Eigen::internal::pand(detail::shift_right<4 * part>(detail::load_lanes(lane)),
                                 detail::broadcast_lanes(0x0F0F0F0F));
  }

#if defined(EIGEN_VECTORIZE_AVX512)
  // An instruction looks up a table by the lowest 4 bits of a lane.
  static constexpr float unit = 1;  ///< what widen() multiplies a code by
  /// A packet of columns of step `step`: the codes times `unit`.
  template <Index step>
  EIGEN_ALWAYS_INLINE static detail::Packet<float> widen(const std::byte* lane) {
    const detail::Lanes bits =
        detail::shift_right<8 * (step % 4) + 4 * (step / 4)>(detail::load_lanes(lane));
    return _mm512_permutexvar_ps(
        bits, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
  }
#else
  static constexpr float unit = 0x1p28f;  ///< what widen() multiplies a code by
  /// A packet of columns of step `step`: the codes times `unit`.
  template <Index step>
  EIGEN_ALWAYS_INLINE static detail::Packet<float> widen(const std::byte* lane) {
    using namespace Eigen::internal;
    // 16 times the codes are signed bytes: code + 8 in the high half, its highest bit inverted.
    const detail::Lanes halves =
        pand(detail::shift_left<4 - 4 * (step / 4)>(detail::load_lanes(lane)),
             detail::broadcast_lanes(~0x0F0F0F0F));
    return detail::byte_to_float<step % 4>(pxor(halves, detail::broadcast_lanes(~0x7F7F7F7F)));
  }
#endif
};

}  // namespace moe

MOE_PACKETS_END
