#pragma once

#include <cmath>
#include <vector>

#include "../support.hpp"
#include "moe/weights/bfloat16.hpp"
#include "moe/weights/float16.hpp"
#include "moe/weights/int4.hpp"
#include "moe/weights/int8.hpp"
#include "moe/weights/narrow_matrix.hpp"

/// \file
/// All narrow formats, and what each must make of a matrix, computed in double.

#define MOE_TEST_FORMATS moe::BFloat16, moe::Float16, moe::Int8, moe::Int4
#define MOE_TEST_SCALED_FORMATS moe::Int8, moe::Int4

namespace moe::test {

/// A number rounded to `bits` bits of precision, ties to even, above the smallest exponent.
inline double round_to_bits(double value, int bits, int smallest_exponent) {
  if (value == 0) return 0;
  int exponent = 0;
  std::frexp(value, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent, smallest_exponent) - bits);
  return std::nearbyint(value / unit) * unit;
}
inline double as_half(double value) { return round_to_bits(value, 11, -13); }

/// Whether y of narrow weights is what it must be beside y of the decoded ones: of formats with scales, which
/// are applied to sums of blocks, the same up to rounding, and of others the same bits.
template <class Format>
bool is_served(const Matrix<float>& y, const Matrix<float>& decoded) {
  return Format::scaled ? relative_error(y, decoded) < 1e-6 : same_bits(y, decoded);
}

/// What the weights of a column of a matrix become.
template <class Format>
std::vector<double> rounded_column(const Matrix<float>& matrix, Index column) {
  std::vector<double> out;
  for (Index first = 0; first < matrix.rows(); first += 32) {
    const Index count = std::min<Index>(32, matrix.rows() - first);
    double largest = 0;
    for (Index i = 0; i < count; ++i) {
      const double value = matrix(first + i, column);
      if (std::abs(value) > std::abs(largest)) largest = value;
    }
    for (Index i = 0; i < count; ++i) {
      const double value = matrix(first + i, column);
      if constexpr (std::is_same_v<Format, BFloat16>) {
        out.push_back(round_to_bits(value, 8, -125));
      } else if constexpr (std::is_same_v<Format, Float16>) {
        out.push_back(as_half(value));
      } else if constexpr (std::is_same_v<Format, Int8>) {
        const double scale = as_half(static_cast<float>(std::abs(largest)) / 127.0f);
        out.push_back(
            scale == 0 ? 0 : scale * std::min(127.0, std::max(-127.0, std::round(value / scale))));
      } else {
        const double scale = as_half(static_cast<float>(largest) / -8.0f);
        out.push_back(
            scale == 0 ? 0 : scale * std::min(7.0, std::max(-8.0, std::round(value / scale))));
      }
    }
  }
  return out;
}

}  // namespace moe::test
