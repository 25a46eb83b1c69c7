#pragma once

#include <cstring>

#include "moe/weights/format.hpp"

MOE_PACKETS_BEGIN

namespace moe {

/// Weights of 16 bits, the upper half of a float rounded to nearest even: 8 bits of precision and the
/// range of a float.
struct BFloat16 {
  static constexpr const char* name = "bfloat16";
  using Code = std::uint16_t;
  static constexpr Index group = 2;
  static constexpr Index group_bytes = 4;
  static constexpr Index block = group;
  static constexpr bool scaled = false;

  static Code encode(float value, float = 1) { return Eigen::bfloat16(value).value; }
  static float decode(Code code, float = 1) {
    return static_cast<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(code));
  }
  static Code get(const std::byte* lane, Index step) {
    Code code = 0;
    std::memcpy(&code, lane + 2 * step, sizeof(code));
    return code;
  }
  static void set(std::byte* lane, Index step, Code code) {
    std::memcpy(lane + 2 * step, &code, sizeof(code));
  }
  template <Index step>
  EIGEN_ALWAYS_INLINE static detail::Packet<float> widen(const std::byte* lane) {
    const detail::Lanes lanes = detail::load_lanes(lane);
    if constexpr (step == 0) return detail::as_float(detail::shift_left<16>(lanes));
    return detail::as_float(Eigen::internal::pand(lanes, detail::broadcast_lanes(~0xFFFF)));
  }
};

}  // namespace moe

MOE_PACKETS_END
