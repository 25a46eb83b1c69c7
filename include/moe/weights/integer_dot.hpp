#pragma once

#include <cstdint>
#include <cstring>

#include "moe/weights/format.hpp"

/// \file
/// Products of unsigned and signed bytes, four of them summed in each lane of 32 bits, exactly.

MOE_PACKETS_BEGIN

namespace moe::detail {

#if defined(EIGEN_VECTORIZE_AVX512) ? defined(__AVX512VNNI__) : defined(__AVXVNNI__)
#define MOE_INTEGER_DOT_VNNI
#elif defined(EIGEN_VECTORIZE_AVX512)  \
    ? defined(__AVX512BW__)            \
    : defined(EIGEN_VECTORIZE_AVX2) || \
          (defined(EIGEN_VECTORIZE_SSE) && !defined(EIGEN_VECTORIZE_AVX))
#define MOE_INTEGER_DOT_PAIRS
#endif
#if defined(MOE_INTEGER_DOT_PAIRS) && defined(EIGEN_VECTORIZE_AVX2)
#define MOE_INTEGER_DOT_BYTES
#endif

/// Stores the lowest bytes of four numbers.
inline void store_bytes(const std::int32_t* four, std::byte* to) {
  std::uint32_t bytes = 0;
  for (int i = 3; i >= 0; --i) bytes = bytes << 8 | (static_cast<std::uint32_t>(four[i]) & 0xFF);
  std::memcpy(to, &bytes, sizeof(bytes));
}

/// Four bytes in each lane.
EIGEN_ALWAYS_INLINE Lanes broadcast_bytes(const std::byte* four) {
  std::int32_t shared = 0;
  std::memcpy(&shared, four, sizeof(shared));
  return broadcast_lanes(shared);
}

/// Sums over a block of scaled_steps steps. Each lane starts from a number, which start() and finish() both
/// get. add(sum, a, b) adds the four products of a lane's unsigned bytes and four signed bytes from -127 to
/// 127, the same in all lanes. unpack() makes a from the unsigned bytes; store() packs the signed ones into
/// `bytes` bytes, from which share() makes b. finish() returns the sum. `small`: the unsigned bytes are at
/// most 15.
template <bool small>
struct IntegerDot {
  static Lanes start(std::int32_t number) { return broadcast_lanes(number); }
  static Lanes finish(const Lanes& sum, std::int32_t) { return sum; }

#if defined(MOE_INTEGER_DOT_VNNI)
  static constexpr Index bytes = 4;

  static void store(const std::int32_t* four, std::byte* to) { store_bytes(four, to); }

  static Lanes unpack(const Lanes& unsigned_bytes) { return unsigned_bytes; }
  static Lanes share(const std::byte* four) { return broadcast_bytes(four); }
  EIGEN_ALWAYS_INLINE static Lanes add(const Lanes& sum, const Lanes& a, const Lanes& b) {
#if defined(EIGEN_VECTORIZE_AVX512)
    return _mm512_dpbusd_epi32(sum, a, b);
#else
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#endif
  }
#elif defined(MOE_INTEGER_DOT_PAIRS)
  // A sum of two products of bytes can overflow 16 bits, so bytes are widened to 16 bits first, those at
  // even places and those at odd places separately.
  static constexpr Index bytes = 8;

  static void store(const std::int32_t* four, std::byte* to) {
    const auto pair = [](std::int32_t low, std::int32_t high) {
      return (static_cast<std::uint32_t>(low) & 0xFFFF) | static_cast<std::uint32_t>(high) << 16;
    };
    const std::uint32_t pairs[2] = {pair(four[0], four[2]), pair(four[1], four[3])};
    std::memcpy(to, pairs, sizeof(pairs));
  }

  static Lanes multiply_pairs(const Lanes& a, const Lanes& b) {
#if defined(EIGEN_VECTORIZE_AVX512)
    return _mm512_madd_epi16(a, b);
#elif defined(EIGEN_VECTORIZE_AVX2)
    return _mm256_madd_epi16(a, b);
#else
    return _mm_madd_epi16(a, b);
#endif
  }
  static Lanes odd_bytes(const Lanes& lanes) {
#if defined(EIGEN_VECTORIZE_AVX512)
    return _mm512_srli_epi16(lanes, 8);
#elif defined(EIGEN_VECTORIZE_AVX2)
    return _mm256_srli_epi16(lanes, 8);
#else
    return _mm_srli_epi16(lanes, 8);
#endif
  }
  struct Bytes {
    Lanes even;
    Lanes odd;
  };
  EIGEN_ALWAYS_INLINE static Bytes unpack(const Lanes& unsigned_bytes) {
    return {Eigen::internal::pand(unsigned_bytes, broadcast_lanes(0x00FF00FF)),
            odd_bytes(unsigned_bytes)};
  }
  EIGEN_ALWAYS_INLINE static Bytes share(const std::byte* four) {
    std::int32_t shared[2];
    std::memcpy(shared, four, 8);
    return {broadcast_lanes(shared[0]), broadcast_lanes(shared[1])};
  }
  EIGEN_ALWAYS_INLINE static Lanes add(const Lanes& sum, const Bytes& a, const Bytes& b) {
    using namespace Eigen::internal;
    return padd(padd(sum, multiply_pairs(a.even, b.even)), multiply_pairs(a.odd, b.odd));
  }
#else
  static constexpr Index bytes = 16;

  static void store(const std::int32_t* four, std::byte* to) { std::memcpy(to, four, 16); }

  static Lanes unpack(const Lanes& unsigned_bytes) { return unsigned_bytes; }
  static const std::byte* share(const std::byte* four) { return four; }
  EIGEN_ALWAYS_INLINE static Lanes add(const Lanes& sum, const Lanes& unsigned_bytes,
                                       const std::byte* four) {
    using namespace Eigen::internal;
    std::int32_t shared[4];
    std::memcpy(shared, four, 16);
    const Lanes first = padd(pmul(field<0, 8>(unsigned_bytes), broadcast_lanes(shared[0])),
                             pmul(field<8, 8>(unsigned_bytes), broadcast_lanes(shared[1])));
    const Lanes second = padd(pmul(field<16, 8>(unsigned_bytes), broadcast_lanes(shared[2])),
                              pmul(field<24, 8>(unsigned_bytes), broadcast_lanes(shared[3])));
    return padd(sum, padd(first, second));
  }
#endif
};

#if defined(MOE_INTEGER_DOT_BYTES)
/// Products of small bytes are summed in pairs, each in 16 bits, and widened once a block.
template <>
struct IntegerDot<true> {
  static constexpr Index bytes = 4;
  static_assert(15 * 127 * scaled_steps / 2 <= 0x7FFF);

  static Lanes start(std::int32_t) { return broadcast_lanes(0); }
  EIGEN_ALWAYS_INLINE static Lanes finish(const Lanes& sum, std::int32_t number) {
    const Lanes ones = broadcast_lanes(0x00010001);
    return Eigen::internal::padd(IntegerDot<false>::multiply_pairs(sum, ones),
                                 broadcast_lanes(number));
  }

  static void store(const std::int32_t* four, std::byte* to) { store_bytes(four, to); }

  static Lanes unpack(const Lanes& unsigned_bytes) { return unsigned_bytes; }
  static Lanes share(const std::byte* four) { return broadcast_bytes(four); }
  EIGEN_ALWAYS_INLINE static Lanes add(const Lanes& sum, const Lanes& a, const Lanes& b) {
#if defined(EIGEN_VECTORIZE_AVX512)
    return _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, b));
#else
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
#endif
  }
};
#endif

}  // namespace moe::detail

MOE_PACKETS_END
