#pragma once

#include <cmath>

#include "moe/matrix.hpp"

namespace moe::test {

/// To the nearest multiple of an eighth bit's value, ties to even as std::nearbyint has them: what
/// bfloat16 does to numbers in the middle of its range.
inline double round_to_8_bits(double value) {
  int exponent = 0;
  const double fraction = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8);
}
template <class Scalar>
Matrix<Scalar> round_to_8_bits(const Matrix<Scalar>& matrix) {
  return matrix.unaryExpr(
      [](Scalar v) { return static_cast<Scalar>(round_to_8_bits(static_cast<double>(v))); });
}

}  // namespace moe::test
