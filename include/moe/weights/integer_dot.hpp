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

/// Adds to each lane of a sum the four products of its bytes in `unsigned_bytes` with four signed bytes,
/// which are the same for all lanes and which store() has prepared in `bytes` bytes. `small`: the
/// unsigned bytes are at most 15.
template <bool small>
struct IntegerDot {
#if defined(MOE_INTEGER_DOT_VNNI)
  static constexpr Index bytes = 4;

  static void store(const std::int8_t* four, std::byte* to) { std::memcpy(to, four, 4); }

  EIGEN_ALWAYS_INLINE static Lanes add(const Lanes& sum, const Lanes& unsigned_bytes,
                                       const std::byte* four) {
    std::int32_t shared = 0;
    std::memcpy(&shared, four, 4);
#if defined(EIGEN_VECTORIZE_AVX512)
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, _mm512_set1_epi32(shared));
#else
    return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, _mm256_set1_epi32(shared));
#endif
  }
#elif defined(MOE_INTEGER_DOT_PAIRS)
  // A sum of two products of bytes can overflow 16 bits, so bytes are widened to 16 bits first, those at
  // even places and those at odd places separately.
  static constexpr Index bytes = 8;

  static void store(const std::int8_t* four, std::byte* to) {
    const std::int16_t wide[4] = {four[0], four[2], four[1], four[3]};
    std::memcpy(to, wide, sizeof(wide));
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
  EIGEN_ALWAYS_INLINE static Lanes add(const Lanes& sum, const Lanes& unsigned_bytes,
                                       const std::byte* four) {
    using namespace Eigen::internal;
    std::int32_t shared[2];
    std::memcpy(shared, four, 8);
    const Lanes even = pand(unsigned_bytes, broadcast_lanes(0x00FF00FF));
    return padd(padd(sum, multiply_pairs(even, broadcast_lanes(shared[0]))),
                multiply_pairs(odd_bytes(unsigned_bytes), broadcast_lanes(shared[1])));
  }
#else
  static constexpr Index bytes = 16;

  static void store(const std::int8_t* four, std::byte* to) {
    const std::int32_t wide[4] = {four[0], four[1], four[2], four[3]};
    std::memcpy(to, wide, sizeof(wide));
  }

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

}  // namespace moe::detail

MOE_PACKETS_END
