#pragma once

#include <algorithm>

#include "moe/kernels/bfloat16_rows.hpp"
#include "moe/kernels/pack.hpp"

/// \file
/// Floats rounded to bfloat16 while they are packed for a product, in words of 32 bits as the processor
/// multiplies them: two numbers that follow each other along K, or, where no instruction multiplies
/// those, one float.
///
/// Both kinds have
///
///     steps                       numbers of a word, along K
///     Operation                   what a step of the micro-kernel does with words
///     round_row(count, from, to)  the words of a row that runs along K
///     interleave(rows, stride, to)  the words of rows that follow each other along K: `steps`
///                                 rows become one row of words, the last packet padded with
///                                 zeros
///
/// and round to nearest even; NaN stays NaN, and magnitudes below 2^-126 become 0, as in vdpbf16ps.
/// Words are padded with zeros beyond the end of K.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The number of words that hold this number of numbers along K.
template <class Words>
constexpr Index word_count(Index numbers) {
  return (numbers + Words::steps - 1) / Words::steps;
}

/// A word is one float, rounded: any processor.
struct FloatWords {
  static constexpr Index steps = 1;
  struct Operation : MultiplyAdd {
    static constexpr bool prefetches_far = true;
  };

  static Packet<float> rounded(const Packet<float>& value) {
    using namespace Eigen::internal;
    const Lanes upper = shift_left<16>(field<16, 16>(round_lanes(value)));
    return pselect(pcmp_lt(pabs(value), broadcast(0x1p-126f)), broadcast(0.0f), as_float(upper));
  }
  static void round_row(Index count, const float* from, float* to) {
    map(count, to, rounded, from);
  }
  static void interleave(const GatheredRows<float>& rows, Index stride, float* to) {
    for (Index k = 0; k < rows.count(); ++k, to += stride) {
      for_each_packet<float>(rows.width(), [&](const PacketSpan& at) {
        detail::store(to + at.first, rounded(at.load(rows.row(k))));
      });
    }
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(EIGEN_VECTORIZE_AVX512)
/// A word is two numbers of bfloat16, the first in the lower half, which vdpbf16ps multiplies and adds.
struct PairWords {
  static constexpr Index steps = 2;
  struct Operation {
    static constexpr bool prefetches_far = true;
    EIGEN_ALWAYS_INLINE static Packet<float> apply(const Packet<float>& a, const Packet<float>& b,
                                                   const Packet<float>& sum) {
      return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
  };

  static void round_row(Index count, const float* from, float* to) {
    Index i = 0;
    for (; i + 32 <= count; i += 32) {
      _mm512_storeu_ps(to + i / 2, rounded(load(from + i), load(from + i + 16)));
    }
    if (i == count) return;
    const Packet<float> low = _mm512_maskz_loadu_ps(first_lanes(count - i), from + i);
    const Packet<float> high = _mm512_maskz_loadu_ps(first_lanes(count - i - 16), from + i + 16);
    _mm512_mask_storeu_ps(to + i / 2, first_lanes((count - i + 1) / 2), rounded(low, high));
  }
  static void interleave(const GatheredRows<float>& rows, Index stride, float* to) {
    const Index depth = rows.count();
    const Index whole = rows.width() / 16 * 16;
    const __mmask16 rest = first_lanes(rows.width() - whole);
    for (Index k = 0; k < depth; k += 2, to += stride) {
      const float* first = rows.row(k);
      const float* second = k + 1 < depth ? rows.row(k + 1) : nullptr;
      for (Index j = 0; j < whole; j += 16) {
        const Packet<float> high = second != nullptr ? load(second + j) : _mm512_setzero_ps();
        _mm512_storeu_ps(to + j, interleaved(load(first + j), high));
      }
      if (rest == 0) continue;
      const Packet<float> high =
          second != nullptr ? _mm512_maskz_loadu_ps(rest, second + whole) : _mm512_setzero_ps();
      _mm512_storeu_ps(to + whole, interleaved(_mm512_maskz_loadu_ps(rest, first + whole), high));
    }
  }

 private:
  static __mmask16 first_lanes(Index count) {
    return static_cast<__mmask16>((1U << std::clamp<Index>(count, 0, 16)) - 1U);
  }
  /// 32 numbers in their order.
  EIGEN_ALWAYS_INLINE static Packet<float> rounded(const Packet<float>& low,
                                                   const Packet<float>& high) {
    return reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high, low));
  }
  /// The numbers of each lane of two rows as one word.
  EIGEN_ALWAYS_INLINE static Packet<float> interleaved(const Packet<float>& first,
                                                       const Packet<float>& second) {
    alignas(64) static constexpr std::array<std::uint16_t, 32> index = [] {
      std::array<std::uint16_t, 32> lanes{};
      for (std::size_t i = 0; i < 32; ++i) {
        lanes[i] = static_cast<std::uint16_t>(i / 2 + (i % 2) * 16);
      }
      return lanes;
    }();
    const __m512i order = _mm512_load_si512(index.data());
    return _mm512_castsi512_ps(
        _mm512_permutexvar_epi16(order, _mm512_castps_si512(rounded(first, second))));
  }
};
using BFloat16Words = PairWords;
#else
using BFloat16Words = FloatWords;
#endif

}  // namespace moe::detail

MOE_PACKETS_END
