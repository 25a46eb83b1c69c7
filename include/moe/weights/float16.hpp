#pragma once

#include <cstring>

#include "moe/weights/format.hpp"

MOE_PACKETS_BEGIN

namespace moe {

/// Weights of 16 bits, IEEE binary16 rounded to nearest even: 11 bits of precision, and nothing beyond
/// ±65504. For its members see NarrowFormat in format.hpp.
struct Float16 {
  static constexpr const char* name = "float16";  ///< in messages and files
  using Code = std::uint16_t;                     ///< of one weight
  /// Steps of k in a lane.
  static constexpr Index group = 1;        // instructions widen neighbouring halves
  static constexpr Index group_bytes = 2;  ///< bytes of a lane
  static constexpr Index block = group;    ///< steps of k in a block
  static constexpr bool scaled = false;    ///< whether blocks have scales

  /// The code of a weight.
  static Code encode(float value, float = 1) { return static_cast<Eigen::half>(value).x; }
  /// The weight that a code stands for.
  static float decode(Code code, float = 1) {
    return Eigen::half_impl::half_to_float(Eigen::half_impl::raw_uint16_to_half(code));
  }
  /// The code in a lane.
  static Code get(const std::byte* lane, Index) {
    Code code = 0;
    std::memcpy(&code, lane, sizeof(code));
    return code;
  }
  /// Writes the code of a lane.
  static void set(std::byte* lane, Index, Code code) { std::memcpy(lane, &code, sizeof(code)); }
  /// A packet of columns as floats.
  template <Index>
  EIGEN_ALWAYS_INLINE static detail::Packet<float> widen(const std::byte* lane) {
    return detail::load_halves(lane);
  }
};

}  // namespace moe

MOE_PACKETS_END
