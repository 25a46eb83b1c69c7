#pragma once

#include <algorithm>
#include <cmath>

#include "moe/weights/format.hpp"

MOE_PACKETS_BEGIN

namespace moe {

/// Weights of 8 bits: each column in blocks of 32 along K, a weight being q·scale with q a whole number
/// from -127 to 127 and the scale, in float16, the largest magnitude of the block over 127. 1.0625
/// bytes a weight.
struct Int8 {
  static constexpr const char* name = "int8";
  using Code = std::int8_t;
  static constexpr Index group = 4;
  static constexpr Index group_bytes = 4;
  static constexpr Index block = detail::scaled_steps;
  static constexpr bool scaled = true;

  static float scale(const float* values, Index count) {
    float largest = 0;
    for (Index i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
    return detail::round_to_half(largest / 127);
  }
  static Code encode(float value, float scale) {
    return detail::scaled_code(value, scale, -127, 127);
  }
  /// Exact: 8 bits times the 11 of a scale fit into a float.
  static float decode(Code code, float scale) { return static_cast<float>(code) * scale; }

  // Stored as q + 128, which is what products of unsigned bytes want.
  static constexpr Index zero = 128;
  static constexpr float offset = detail::byte_base + zero;

  static Code get(const std::byte* lane, Index step) {
    return static_cast<Code>(std::to_integer<Index>(lane[step]) - zero);
  }
  static void set(std::byte* lane, Index step, Code code) {
    lane[step] = static_cast<std::byte>(code + zero);
  }
  template <Index step>
  EIGEN_ALWAYS_INLINE static detail::Packet<float> widen(const std::byte* lane) {
    return detail::byte_to_float<step>(detail::load_lanes(lane));
  }
  /// Four steps of k as unsigned bytes, `zero` more than the codes.
  template <Index>
  EIGEN_ALWAYS_INLINE static detail::Lanes bytes(const std::byte* lane) {
    return detail::load_lanes(lane);
  }
};

}  // namespace moe

MOE_PACKETS_END
