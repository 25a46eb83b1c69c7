#pragma once

#include <algorithm>
#include <cmath>

#include "moe/weights/format.hpp"

MOE_PACKETS_BEGIN

namespace moe {

/// Weights of 8 bits, in blocks of 32 along K of each column. A weight is q·scale, with a whole number q
/// from -127 to 127. The scale of a block, in float16, is its largest magnitude over 127. 1.0625
/// bytes per weight. For its members see NarrowFormat in format.hpp.
struct Int8 {
  static constexpr const char* name = "int8";           ///< in messages and files
  using Code = std::int8_t;                             ///< of one weight, from -127 to 127
  static constexpr Index group = 4;                     ///< steps of k in a lane
  static constexpr Index group_bytes = 4;               ///< bytes of a lane
  static constexpr Index block = detail::scaled_steps;  ///< steps of k that share a scale
  static constexpr bool scaled = true;                  ///< whether blocks have scales

  /// The scale of a block of `count` weights.
  static float scale(const float* values, Index count) {
    float largest = 0;
    for (Index i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
    return detail::round_to_half(largest / 127);
  }
  /// The code of a weight.
  static Code encode(float value, float scale) {
    return detail::scaled_code(value, scale, -127, 127);
  }
  /// Exact: 8 bits times the 11 of a scale fit into a float.
  static float decode(Code code, float scale) { return static_cast<float>(code) * scale; }

  /// A code is stored as q + zero: products of bytes take one unsigned operand.
  static constexpr std::int32_t zero = 128;
  static constexpr std::int32_t most_stored = 255;  ///< the largest byte of bytes()

  /// The code of step `step` in a lane.
  static Code get(const std::byte* lane, Index step) {
    return static_cast<Code>(std::to_integer<Index>(lane[step]) - zero);
  }
  /// Writes the code of step `step` of a lane.
  static void set(std::byte* lane, Index step, Code code) {
    lane[step] = static_cast<std::byte>(code + zero);
  }
  static constexpr float unit = 0x1p24f;  ///< what widen() multiplies a code by

  /// A packet of columns of step `step`: the codes times `unit`.
  template <Index step>
  EIGEN_ALWAYS_INLINE static detail::Packet<float> widen(const std::byte* lane) {
    // code + 128 with its highest bit inverted is the code.
    return detail::byte_to_float<step>(
        Eigen::internal::pxor(detail::load_lanes(lane), detail::broadcast_lanes(~0x7F7F7F7F)));
  }
  /// Four steps of k as unsigned bytes, which are the codes + `zero`.
  template <Index>
  EIGEN_ALWAYS_INLINE static detail::Lanes bytes(const std::byte* lane) {
    return detail::load_lanes(lane);
  }
};

}  // namespace moe

MOE_PACKETS_END
