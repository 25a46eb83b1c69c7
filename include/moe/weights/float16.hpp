#pragma once

#include <cstring>

#include "moe/weights/format.hpp"

MOE_PACKETS_BEGIN

namespace moe {

/// Weights of 16 bits, IEEE binary16 rounded to nearest even: 11 bits of precision, and nothing beyond
/// ±65504.
struct Float16 {
  static constexpr const char* name = "float16";
  using Code = std::uint16_t;
  static constexpr Index group = 1;  // instructions widen neighbouring halves
  static constexpr Index group_bytes = 2;
  static constexpr Index block = group;
  static constexpr bool scaled = false;

  static Code encode(float value, float = 1) { return static_cast<Eigen::half>(value).x; }
  static float decode(Code code, float = 1) {
    return Eigen::half_impl::half_to_float(Eigen::half_impl::raw_uint16_to_half(code));
  }
  static Code get(const std::byte* lane, Index) {
    Code code = 0;
    std::memcpy(&code, lane, sizeof(code));
    return code;
  }
  static void set(std::byte* lane, Index, Code code) { std::memcpy(lane, &code, sizeof(code)); }
  template <Index>
  EIGEN_ALWAYS_INLINE static detail::Packet<float> widen(const std::byte* lane) {
    return detail::load_halves(lane);
  }
};

}  // namespace moe

MOE_PACKETS_END
