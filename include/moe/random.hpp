#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "moe/function_ref.hpp"
#include "moe/matrix.hpp"

/// \file
/// Randomness without state: every random number is a function of a key and a counter, so noise
/// can be replayed, does not depend on the number of threads, and is the same on every platform.

namespace moe {

namespace detail {

/// Philox 4x32-10 of N counters, word by word, in the form that compilers turn into vector code. If
/// a Word has 64 bits, only the lower 32 count.
template <class Word, std::size_t N>
constexpr void philox_lanes(std::array<std::array<Word, N>, 4>& counters, std::uint64_t key) {
  auto key_low = static_cast<std::uint32_t>(key);
  auto key_high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (std::size_t i = 0; i < N; ++i) {
      const auto a = std::uint64_t{0xD2511F53} * static_cast<std::uint32_t>(counters[0][i]);
      const auto b = std::uint64_t{0xCD9E8D57} * static_cast<std::uint32_t>(counters[2][i]);
      counters[0][i] = static_cast<Word>(b >> 32) ^ counters[1][i] ^ key_low;
      counters[1][i] = static_cast<Word>(b);
      counters[2][i] = static_cast<Word>(a >> 32) ^ counters[3][i] ^ key_high;
      counters[3][i] = static_cast<Word>(a);
    }
    key_low += 0x9E3779B9;
    key_high += 0xBB67AE85;
  }
}

}  // namespace detail

/// Philox 4x32-10: four random words from a counter and a key.
/// J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
constexpr std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                              std::uint64_t key) {
  std::array<std::array<std::uint32_t, 1>, 4> one{};
  for (std::size_t word = 0; word < 4; ++word) one[word][0] = counter[word];
  detail::philox_lanes(one, key);
  return {one[0][0], one[1][0], one[2][0], one[3][0]};
}

namespace detail {

/// A number without a default, for which any default would be a trap. `Meaning` makes seeds and steps
/// different types.
template <class Meaning>
class Given {
 public:
  constexpr Given(std::uint64_t number) : number_(number) {}  // NOLINT(google-explicit-constructor)
  constexpr operator std::uint64_t() const {                  // NOLINT(google-explicit-constructor)
    return number_;
  }

 private:
  std::uint64_t number_;
};

}  // namespace detail

/// A seed: it has no default. Equal seeds give equal initial numbers and equal noise, so with a default
/// any two layers whose configurations leave it out would be equal. (A global counter as the default
/// would make a layer's numbers depend on what the program made before it.)
using Seed = detail::Given<struct SeedMeaning>;

/// The number of an update: it has no default, which would draw the same noise at every update.
using Step = detail::Given<struct StepMeaning>;

/// A seed for part `stream` of something that has the seed `seed`; different streams are independent.
/// A model derives a seed for each of its modules from its own seed.
constexpr std::uint64_t derive_seed(std::uint64_t seed, std::uint64_t stream) {
  const auto words = philox({static_cast<std::uint32_t>(stream),
                             static_cast<std::uint32_t>(stream >> 32), 0x6D6F65u, 0xFFFFFFFFu},
                            seed);
  return words[0] | (std::uint64_t{words[1]} << 32);
}

/// Which random numbers a training pass draws: those of update `step`, the rows of the batch being
/// tokens first_token, first_token + 1, ... of a larger whole. The same key replays the same noise.
struct NoiseKey {
  Step step;                      ///< the number of the update
  std::uint32_t first_token = 0;  ///< the number of the token in row 0 of the batch
};

namespace detail {

/// The counter of four columns of one row of noise: (step, token, column / 4).
inline std::array<std::uint32_t, 4> noise_counter(const NoiseKey& key, Index row,
                                                  Index column_block) {
  return {static_cast<std::uint32_t>(column_block),
          key.first_token + static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(key.step),
          static_cast<std::uint32_t>(key.step >> 32)};
}

/// The words of four columns of one row of noise.
inline std::array<std::uint32_t, 4> noise_words(std::uint64_t seed, const NoiseKey& key, Index row,
                                                Index column_block) {
  return philox(noise_counter(key, row, column_block), seed);
}

/// a·b + c of finite numbers, rounded once, for processors that have no instruction for it. The
/// product of two floats is exact in double. The sum is rounded to odd, which makes the second
/// rounding, to float, give what one rounding of the exact sum gives (S. Boldo, G. Melquiond,
/// "Emulation of FMA and Correctly Rounded Sums", 2008).
EIGEN_ALWAYS_INLINE float multiply_add_in_double(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const auto addend = static_cast<double>(c);
  const double sum = product + addend;
  const double rest = sum - product;
  const double error = (product - (sum - rest)) + (addend - rest);
  // Without a branch, and with operations that even the oldest vector instructions have.
  const auto bits = std::bit_cast<std::uint64_t>(sum);
  const auto error_bits = std::bit_cast<std::uint64_t>(error);
  const std::uint64_t magnitude = error_bits << 1;
  const std::uint64_t inexact = (magnitude | (0 - magnitude)) >> 63;
  const std::uint64_t moves = inexact & ~bits & 1;
  const std::uint64_t toward_zero = moves & ((bits ^ error_bits) >> 63);
  return static_cast<float>(std::bit_cast<double>(bits + moves - 2 * toward_zero));
}

/// a·b + c rounded once. The logarithm and the polynomials below use it, and so have the same bits
/// on every platform.
EIGEN_ALWAYS_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF)
  return std::fma(a, b, c);
#else
  return multiply_add_in_double(a, b, c);
#endif
}

/// Natural logarithm of a normal positive float, to about 1e-7, the same bits on every platform:
/// log(m·2^e) = e·log 2 + 2·atanh((m - 1) / (m + 1)) with m in [2/3, 4/3).
EIGEN_ALWAYS_INLINE float portable_log(float x) {
  const auto bits = std::bit_cast<std::int32_t>(x);
  const std::int32_t two_thirds = 0x3F2AAAAB;
  const std::int32_t exponent = (bits - two_thirds) >> 23;
  const auto mantissa = std::bit_cast<float>(bits - (exponent << 23));
  const float s = (mantissa - 1.0f) / (mantissa + 1.0f);
  const float s2 = s * s;
  float series = 1.0f / 11.0f;
  series = multiply_add(series, s2, 1.0f / 9.0f);
  series = multiply_add(series, s2, 1.0f / 7.0f);
  series = multiply_add(series, s2, 1.0f / 5.0f);
  series = multiply_add(series, s2, 1.0f / 3.0f);
  series = multiply_add(series, s2, 1.0f);
  return multiply_add(static_cast<float>(exponent), 0.693147180559945f, 2.0f * s * series);
}

template <class... Coefficients>
EIGEN_ALWAYS_INLINE float polynomial(float x, Coefficients... coefficients) {
  float sum = 0.0f;
  ((sum = multiply_add(sum, x, coefficients)), ...);
  return sum;
}

/// erfinv(y)/y as a function of w = -log(1 - y²), in the middle (w < 5): M. Giles'
/// single-precision approximation ("Approximating the erfinv function", GPU Computing Gems 2,
/// 2011).
EIGEN_ALWAYS_INLINE float erfinv_middle(float w) {
  return polynomial(w - 2.5f, 2.81022636e-08f, 3.43273939e-07f, -3.5233877e-06f, -4.39150654e-06f,
                    2.1858087e-04f, -1.25372503e-03f, -4.17768164e-03f, 0.246640727f, 1.50140941f);
}
/// The same in the tail (w >= 5). The published approximation ends at w = 16 and 32 random bits reach
/// 21.5, so this one was fitted anew, to 7e-6 in the tail's probability.
EIGEN_ALWAYS_INLINE float erfinv_tail(float w) {
  return polynomial(std::sqrt(w) - 3.0f, 3.64533917e-05f, -1.47937535e-04f, -3.40692932e-05f,
                    1.28576276e-03f, -3.55479051e-03f, 5.76756196e-03f, -7.65693327e-03f,
                    9.43400245e-03f, 1.00167668f, 2.83297706f);
}

}  // namespace detail

/// Standard normal deviates, each from 32 random bits: the magnitude of the normal quantile of
/// ((bits >> 1) + 1/2) / 2^32, negated if the lowest bit is 1, so |n| < 6.4. The result has the same bits
/// on every platform.
template <std::size_t N>
std::array<float, N> standard_normals(const std::array<std::uint32_t, N>& bits) {
  std::array<float, N> w;
  std::array<float, N> y;
  std::array<float, N> normal;
  // Separate loops, so that the compiler can vectorize the first, which has no branch. Only one deviate in
  // three hundred needs the last.
  for (std::size_t i = 0; i < N; ++i) {
    const float tail = (static_cast<float>(static_cast<std::int32_t>(bits[i] >> 1)) + 0.5f) *
                       0x1p-32f;  // in (0, 1/2]
    const auto sign = static_cast<float>(1 - 2 * static_cast<std::int32_t>(bits[i] & 1u));
    w[i] = -detail::portable_log(4.0f * tail * (1.0f - tail));
    y[i] = sign * (1.0f - 2.0f * tail) * 1.41421356f;
    normal[i] = detail::erfinv_middle(w[i]) * y[i];
  }
  // Positive floats have the same order as integers, and compilers vectorize a maximum of integers.
  std::int32_t largest = 0;
  for (const float each : w) largest = std::max(largest, std::bit_cast<std::int32_t>(each));
  const bool tails = largest >= std::bit_cast<std::int32_t>(5.0f);
  for (std::size_t i = 0; i < N && tails; ++i) {
    if (w[i] >= 5.0f) normal[i] = detail::erfinv_tail(w[i]) * y[i];
  }
  return normal;
}

/// One standard normal deviate: the one that standard_normals() makes of these bits.
inline float standard_normal(std::uint32_t bits) { return standard_normals(std::array{bits})[0]; }

namespace detail {

/// Counters that are hashed together in vector registers, stored word by word. The four deviates of a
/// counter are next to each other in the result.
struct NoiseLanes {
  static constexpr std::size_t count = 16;
#if defined(EIGEN_VECTORIZE_AVX512)
  using Word = std::uint64_t;  // products stay in their lanes; narrowing them would cost shuffles
#else
  using Word = std::uint32_t;
#endif
  std::array<std::array<Word, count>, 4> counters{};

  void set(std::size_t lane, const std::array<std::uint32_t, 4>& counter) {
    for (std::size_t word = 0; word < 4; ++word) counters[word][lane] = counter[word];
  }
  /// Lane i is `counter` with i added to its column block.
  void set_row(const std::array<std::uint32_t, 4>& counter) {
    for (std::size_t word = 0; word < 4; ++word) counters[word].fill(counter[word]);
    for (std::size_t i = 0; i < count; ++i) counters[0][i] += static_cast<std::uint32_t>(i);
  }
  // Not inline: otherwise GCC keeps counters that are set one by one in scalar registers. The words of a
  // lane are written out, so that they become vector code.
  MOE_NOINLINE std::array<float, 4 * count> normals(std::uint64_t seed) const {
    auto words = counters;
    philox_lanes(words, seed);
    std::array<std::uint32_t, 4 * count> bits;
    for (std::size_t lane = 0; lane < count; ++lane) {
      bits[4 * lane] = lower_half(words[0][lane]);
      bits[4 * lane + 1] = lower_half(words[1][lane]);
      bits[4 * lane + 2] = lower_half(words[2][lane]);
      bits[4 * lane + 3] = lower_half(words[3][lane]);
    }
    return standard_normals(bits);
  }

 private:
  // A template: outside of one, GCC warns of a cast to the type that a 32-bit word has already.
  template <class AnyWord>
  static std::uint32_t lower_half(AnyWord word) {
    return static_cast<std::uint32_t>(word);
  }
};

/// Fills n (rows x columns) with normal noise keyed by (seed, step, first_token + token(row),
/// column). The ends of rows, where fewer counters are left than NoiseLanes has, are drawn
/// together.
template <class Scalar>
void fill_noise(std::uint64_t seed, const NoiseKey& key, Index rows, Index columns,
                FunctionRef<Index(Index)> token, Scalar* n) {
  constexpr auto lanes = static_cast<Index>(NoiseLanes::count);
  const auto copy = [](const float* from, Index count, Scalar* to) {
    for (Index i = 0; i < count; ++i) to[i] = static_cast<Scalar>(from[i]);
  };
  NoiseLanes whole;
  NoiseLanes rest;
  Index place[to_size(lanes)];  // in n, of a lane of the rest
  Index width[to_size(lanes)];
  Index used = 0;
  const auto draw_rest = [&] {
    const auto normals = rest.normals(seed);
    for (Index lane = 0; lane < used; ++lane) {
      const float* from = normals.data() + 4 * lane;
      Scalar* to = n + place[lane];
      if (width[lane] == 4) {  // nearly always, and the count is then a constant
        copy(from, 4, to);
      } else {
        copy(from, width[lane], to);
      }
    }
    used = 0;
  };
  for (Index row = 0; row < rows; ++row) {
    const Index token_row = token(row);
    Index column = 0;
    for (; columns - column > 4 * (lanes - 1); column += 4 * lanes) {
      whole.set_row(noise_counter(key, token_row, column / 4));
      copy(whole.normals(seed).data(), std::min(4 * lanes, columns - column),
           n + row * columns + column);
    }
    for (; column < columns; column += 4) {
      rest.set(to_size(used), noise_counter(key, token_row, column / 4));
      place[used] = row * columns + column;
      width[used] = std::min<Index>(4, columns - column);
      if (++used == lanes) draw_rest();
    }
  }
  if (used > 0) draw_rest();
}

}  // namespace detail

/// A uniform deviate in [0, 1) with 24 random bits, exact in float.
inline float uniform(std::uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

/// A standard Gumbel deviate −log(−log(u)) from 23 random bits: u is the middle of one of 2^23
/// equal parts of (0, 1), so the deviate is within (-2.9, 16.7). The result has the same bits on
/// every platform. With a deviate g_i of its own for each i, c_i + g_i is the largest with
/// probability softmax(c)_i.
inline float standard_gumbel(std::uint32_t bits) {
  const float u = (static_cast<float>(bits >> 9) + 0.5f) * 0x1p-23f;  // exact
  return -detail::portable_log(-detail::portable_log(u));
}

// Element i of a matrix is drawn as column i mod 2^32 of row i / 2^32 of noise.

/// Fills a matrix with uniform deviates in [-bound, bound), as weights are initialised.
template <class Scalar>
void fill_uniform(Matrix<Scalar>& matrix, Scalar bound, std::uint64_t seed) {
  for (Index first = 0; first < matrix.size(); first += 4) {
    const auto words =
        detail::noise_words(seed, {.step = 0}, first >> 32, (first & 0xFFFFFFFF) / 4);
    const Index count = std::min<Index>(4, matrix.size() - first);
    for (Index i = 0; i < count; ++i) {
      const float unit = uniform(words[detail::to_size(i)]);
      matrix.data()[first + i] = bound * (Scalar{2} * static_cast<Scalar>(unit) - Scalar{1});
    }
  }
}

/// Fills a matrix with normal deviates of the given standard deviation.
template <class Scalar>
void fill_normal(Matrix<Scalar>& matrix, Scalar stddev, std::uint64_t seed) {
  constexpr Index longest = Index{1} << 32;
  for (Index first = 0; first < matrix.size(); first += longest) {
    detail::fill_noise<Scalar>(
        seed, {.step = 0}, 1, std::min(longest, matrix.size() - first),
        [first](Index) { return first / longest; }, matrix.data() + first);
  }
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] *= stddev;
}

}  // namespace moe
