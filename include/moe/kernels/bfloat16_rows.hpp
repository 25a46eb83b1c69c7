#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>

#include "moe/kernels/lanes.hpp"

/// \file
/// Rows of numbers stored in bfloat16, the upper half of a float: 8 bits of precision and the range of a
/// float.

MOE_PACKETS_BEGIN

namespace moe {

/// The precision to which numbers are rounded, to be stored or to be multiplied.
enum class Precision {
  full,     ///< that of the Scalar
  bfloat16  ///< the upper half of a float: 8 bits of precision; two bytes per number if stored
};
constexpr std::array<std::string_view, 2> enumerator_names(Precision) {
  return {"full", "bfloat16"};
}

namespace detail {

inline constexpr Index bfloat16_bytes = 2;

/// Floats rounded to nearest even, in the upper halves of the lanes. NaN stays NaN.
EIGEN_ALWAYS_INLINE Lanes round_lanes(const Packet<float>& value) {
  using namespace Eigen::internal;
  // The bits that make a NaN could all be in the lower half, which is lost, and the sum could
  // overflow.
  const Packet<float> quiet = as_float(broadcast_lanes(0x7FC00000));
  const Lanes bits = as_lanes(pselect(pcmp_eq(value, value), value, quiet));
  return padd(bits, padd(broadcast_lanes(0x7FFF), field<16, 1>(bits)));
}

/// Stores numbers rounded to nearest even, a double to float first.
template <class Scalar>
void round_to_bfloat16(Index count, const Scalar* from, std::byte* to) {
  for_each_packet<float>(count, [&](const PacketSpan& at) {
    const auto round = [&](const Packet<float>& value) {
      std::byte* place = to + at.first * bfloat16_bytes;
      if (at.count == lane_count) return store_upper_halves(place, round_lanes(value));
      std::byte codes[to_size(lane_count * bfloat16_bytes)];
      store_upper_halves(codes, round_lanes(value));
      std::memcpy(place, codes, to_size(at.count * bfloat16_bytes));
    };
    if constexpr (std::is_same_v<Scalar, float>) {
      round(at.load(from));
    } else {
      float values[to_size(lane_count)] = {};
      for (Index i = 0; i < at.count; ++i) values[i] = static_cast<float>(from[at.first + i]);
      round(load(values));
    }
  });
}

/// The numbers that round_to_bfloat16() stored.
template <class Scalar>
void widen_bfloat16(Index count, const std::byte* from, Scalar* to) {
  for_each_packet<float>(count, [&](const PacketSpan& at) {
    const std::byte* place = from + at.first * bfloat16_bytes;
    std::byte codes[to_size(lane_count * bfloat16_bytes)] = {};
    if (at.count < lane_count) {
      std::memcpy(codes, place, to_size(at.count * bfloat16_bytes));
      place = codes;
    }
    const Packet<float> value = as_float(shift_left<16>(load_lower_halves(place)));
    if constexpr (std::is_same_v<Scalar, float>) {
      at.store(to, value);
    } else {
      float values[to_size(lane_count)];
      store(values, value);
      for (Index i = 0; i < at.count; ++i) to[at.first + i] = static_cast<Scalar>(values[i]);
    }
  });
}

}  // namespace detail
}  // namespace moe

MOE_PACKETS_END
