#pragma once

#include <cstring>

#include "moe/weights/format.hpp"

MOE_PACKETS_BEGIN

namespace moe {

/// Weights of 16 bits, the upper half of a float rounded to nearest even: 8 bits of precision and the
/// range of a float. For its members see NarrowFormat in format.hpp.
struct BFloat16 {
  static constexpr const char* name = "bfloat16";  ///< in messages and files
  using Code = std::uint16_t;                      ///< of one weight
  static constexpr Index group = 2;                ///< steps of k in a lane
  static constexpr Index group_bytes = 4;          ///< bytes of a lane
  static constexpr Index block = group;            ///< steps of k in a block
  static constexpr bool scaled = false;            ///< whether blocks have scales

  /// The code of a weight.
  static Code encode(float value, float = 1) { return Eigen::bfloat16(value).value; }
  /// The weight that a code stands for.
  static float decode(Code code, float = 1) {
    return static_cast<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(code));
  }
  /// The code of step `step` in a lane.
  static Code get(const std::byte* lane, Index step) {
    Code code = 0;
    std::memcpy(&code, lane + 2 * step, sizeof(code));
    return code;
  }
  /// Writes the code of step `step` of a lane.
  static void set(std::byte* lane, Index step, Code code) {
    std::memcpy(lane + 2 * step, &code, sizeof(code));
  }
  /// A packet of columns of step `step` as floats.
  template <Index step>
  EIGEN_ALWAYS_INLINE static detail::Packet<float> widen(const std::byte* lane) {
    const detail::Lanes lanes = detail::load_lanes(lane);
    if constexpr (step == 0) return detail::as_float(detail::shift_left<16>(lanes));
    return detail::as_float(Eigen::internal::pand(lanes, detail::broadcast_lanes(~0xFFFF)));
  }
};

}  // namespace moe

MOE_PACKETS_END
