#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "moe/kernels/simd.hpp"

/// \file
/// Registers of 32-bit lanes, one for each float of a packet, for widening narrow numbers and for
/// rounding to them.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The packet of integers with as many lanes as a packet of floats; one integer where Eigen's
/// packets are switched off.
template <class P>
struct LanesOf {
  using type = typename Eigen::internal::unpacket_traits<P>::integer_packet;
};
template <>
struct LanesOf<float> {
  using type = std::int32_t;
};
using Lanes = typename LanesOf<Packet<float>>::type;

/// The number of floats in a packet, and of 32-bit integers.
inline constexpr Index lane_count = packet_size<float>;

// Templates over the type of the lanes, since only the branch for that type must compile.

template <class L = Lanes>
EIGEN_ALWAYS_INLINE L load_lanes(const std::byte* from) {
  if constexpr (std::is_integral_v<L>) {
    L lane = 0;
    std::memcpy(&lane, from, sizeof(lane));
    return lane;
  } else {
    return Eigen::internal::ploadu<L>(reinterpret_cast<const std::int32_t*>(from));
  }
}

EIGEN_ALWAYS_INLINE Lanes broadcast_lanes(std::int32_t value) {
  return Eigen::internal::pset1<Lanes>(value);
}

template <int bits, class L>
EIGEN_ALWAYS_INLINE L shift_left(const L& lanes) {
  if constexpr (bits == 0) {
    return lanes;
  } else if constexpr (std::is_integral_v<L>) {
    return static_cast<L>(static_cast<std::make_unsigned_t<L>>(lanes) << bits);
  } else {
    return Eigen::internal::plogical_shift_left<bits>(lanes);
  }
}
/// An arithmetic shift: the upper bits get the sign.
template <int bits, class L>
EIGEN_ALWAYS_INLINE L shift_right(const L& lanes) {
  if constexpr (bits == 0) {
    return lanes;
  } else if constexpr (std::is_integral_v<L>) {
    return lanes >> bits;
  } else {
    return Eigen::internal::parithmetic_shift_right<bits>(lanes);
  }
}

template <class L>
EIGEN_ALWAYS_INLINE Packet<float> to_float(const L& lanes) {
  if constexpr (std::is_integral_v<L>) {
    return broadcast(static_cast<float>(lanes));
  } else {
    return Eigen::internal::pcast<L, Packet<float>>(lanes);
  }
}

/// The floats that have these bits.
template <class L>
EIGEN_ALWAYS_INLINE Packet<float> as_float(const L& lanes) {
  static_assert(sizeof(L) == sizeof(Packet<float>));
  if constexpr (std::is_integral_v<L>) {
    Packet<float> value = broadcast(0.0f);
    std::memcpy(&value, &lanes, sizeof(lanes));
    return value;
  } else {
    return Eigen::internal::preinterpret<Packet<float>>(lanes);
  }
}

/// The bits of floats.
template <class L = Lanes>
EIGEN_ALWAYS_INLINE L as_lanes(const Packet<float>& value) {
  static_assert(sizeof(L) == sizeof(Packet<float>));
  if constexpr (std::is_integral_v<L>) {
    L lanes = 0;
    std::memcpy(&lanes, &value, sizeof(lanes));
    return lanes;
  } else {
    return Eigen::internal::preinterpret<L>(value);
  }
}

/// Bits [first, first + bits) of each lane, as an unsigned integer.
template <int first, int bits, class L>
EIGEN_ALWAYS_INLINE L field(const L& lanes) {
  return Eigen::internal::pand(shift_right<first>(lanes), broadcast_lanes((1 << bits) - 1));
}

#if defined(EIGEN_VECTORIZE_AVX512) ? defined(__AVX512BW__) : defined(EIGEN_VECTORIZE_AVX2)
#define MOE_SHUFFLES_BYTES

/// Which byte goes into each byte of a lane: the byte `step` of the lane into the highest, none into the
/// others. The indices of a shuffle are relative to its 16 bytes, four lanes.
template <int step>
inline constexpr auto byte_index = [] {
  std::array<std::uint8_t, sizeof(Lanes)> bytes{};
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::uint8_t>(i % 4 == 3 ? i % 16 - 3 + step : 0x80);
  }
  return bytes;
}();
#endif

/// 2^24 times the signed byte `step` of each lane. In the highest byte of an integer the byte keeps its
/// sign. The caller's scale is divided by 2^24, which is exact.
template <int step>
EIGEN_ALWAYS_INLINE Packet<float> byte_to_float(const Lanes& lanes) {
#ifdef MOE_SHUFFLES_BYTES
  if constexpr (step == 3)
    return to_float(Eigen::internal::pand(lanes, broadcast_lanes(-0x01000000)));
  const Lanes index = load_lanes(reinterpret_cast<const std::byte*>(byte_index<step>.data()));
#if defined(EIGEN_VECTORIZE_AVX512)
  return to_float(_mm512_shuffle_epi8(lanes, index));
#else
  return to_float(_mm256_shuffle_epi8(lanes, index));
#endif
#else
  return to_float(
      Eigen::internal::pand(shift_left<24 - 8 * step>(lanes), broadcast_lanes(-0x01000000)));
#endif
}

/// lane_count numbers of 16 bits, each in the lower half of its lane.
template <class L = Lanes>
EIGEN_ALWAYS_INLINE L load_lower_halves(const std::byte* from) {
#if defined(EIGEN_VECTORIZE_AVX512)
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(EIGEN_VECTORIZE_AVX2)
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  alignas(64) std::int32_t lanes[to_size(lane_count)];
  for (Index i = 0; i < lane_count; ++i) {
    std::uint16_t half = 0;
    std::memcpy(&half, from + 2 * i, sizeof(half));
    lanes[i] = half;
  }
  return load_lanes(reinterpret_cast<const std::byte*>(lanes));
#endif
}
/// Stores the upper halves of the lanes.
template <class L>
EIGEN_ALWAYS_INLINE void store_upper_halves(std::byte* to, const L& lanes) {
  const L halves = field<16, 16>(lanes);
#if defined(EIGEN_VECTORIZE_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(halves));
#elif defined(EIGEN_VECTORIZE_AVX2)
  const __m256i twice = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(twice));
#else
  alignas(64) std::int32_t numbers[to_size(lane_count)];
  Eigen::internal::pstoreu(numbers, halves);
  for (Index i = 0; i < lane_count; ++i) {
    const auto half = static_cast<std::uint16_t>(numbers[i]);
    std::memcpy(to + 2 * i, &half, sizeof(half));
  }
#endif
}

/// lane_count numbers of IEEE binary16, widened.
EIGEN_ALWAYS_INLINE Packet<float> load_halves(const std::byte* from) {
#if defined(EIGEN_VECTORIZE_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(EIGEN_VECTORIZE_AVX) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__ARM_NEON) && EIGEN_ARCH_ARM64
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(from))));
#else
  // Not by one multiplication, which a processor that flushes denormals would get wrong.
  using namespace Eigen::internal;
  const Lanes lanes = load_lower_halves(from);
  const Packet<float> tiny = pmul(to_float(field<0, 10>(lanes)), broadcast(0x1p-24f));
  const Packet<float> other =
      as_float(padd(shift_left<13>(field<0, 15>(lanes)), broadcast_lanes(112 << 23)));
  const Packet<float> magnitude = pselect(pcmp_lt(other, broadcast(0x1p-14f)), tiny, other);
  return por(magnitude, as_float(shift_left<31>(shift_right<15>(lanes))));
#endif
}

}  // namespace moe::detail

MOE_PACKETS_END
