#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>

#include "moe/matrix.hpp"

/// \file
/// Converts the numbers of a file's types to float or double: exactly, except F64 to float.

namespace moe::detail {

constexpr float power_of_two(int exponent) {
  float power = 1;
  for (; exponent > 0; --exponent) power *= 2;
  for (; exponent < 0; ++exponent) power /= 2;
  return power;
}

/// F8_E4M3, "fn": a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, the largest is
/// 448, and the two codes whose exponent and mantissa have all bits set are NaN (Micikevicius et
/// al. 2022, arXiv 2209.05433).
inline constexpr auto e4m3_values = [] {
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15;
    const int mantissa = code & 7;
    const float size = exponent == 15 && mantissa == 7 ? std::numeric_limits<float>::quiet_NaN()
                       : exponent == 0
                           ? static_cast<float>(mantissa) * power_of_two(-9)
                           : static_cast<float>(8 + mantissa) * power_of_two(exponent - 10);
    values[static_cast<std::size_t>(code)] = code < 128 ? size : -size;
  }
  return values;
}();

/// F8_E8M0: 2^(code - 127), and 255 is NaN (OCP Microscaling Formats 1.0).
inline constexpr auto e8m0_values = [] {
  std::array<float, 256> values{};
  for (int code = 0; code < 255; ++code) {
    values[static_cast<std::size_t>(code)] = power_of_two(code - 127);
  }
  values[255] = std::numeric_limits<float>::quiet_NaN();
  return values;
}();

/// E2M1, the four bits of MXFP4 (OCP Microscaling Formats 1.0).
inline constexpr std::array<float, 16> e2m1_values = {0,    0.5f,  1,  1.5f,  2,  3,  4,  6,
                                                      -0.f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

inline constexpr std::string_view widened_types = "F64, F32, F16, BF16 or F8_E4M3";
inline bool is_widened(std::string_view type) {
  return type == "F64" || type == "F32" || type == "F16" || type == "BF16" || type == "F8_E4M3";
}

template <class Element, class Scalar, class Value>
void widen_each(const std::byte* from, std::size_t count, Scalar* to, Value&& value) {
  for (std::size_t i = 0; i < count; ++i) {
    Element element;
    std::memcpy(static_cast<void*>(&element), from + i * sizeof(Element), sizeof(Element));
    to[i] = static_cast<Scalar>(value(element));
  }
}

/// Converts `count` numbers of a type of the file, one of widened_types.
template <class Scalar>
void widen(std::string_view type, const std::byte* from, std::size_t count, Scalar* to) {
  const auto itself = [](auto number) { return number; };
  const auto as_float = [](auto number) { return static_cast<float>(number); };
  if (type == "F64") {
    widen_each<double>(from, count, to, itself);
  } else if (type == "F32") {
    widen_each<float>(from, count, to, itself);
  } else if (type == "F16") {
    widen_each<Eigen::half>(from, count, to, as_float);
  } else if (type == "BF16") {
    widen_each<Eigen::bfloat16>(from, count, to, as_float);
  } else {
    MOE_ASSERT(type == "F8_E4M3");
    widen_each<std::uint8_t>(from, count, to, [](std::uint8_t code) { return e4m3_values[code]; });
  }
}

}  // namespace moe::detail
