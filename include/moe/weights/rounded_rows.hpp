#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "moe/weights/integer_dot.hpp"

/// \file
/// Activations rounded to 8 bits for products with integers.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// Some steps of some rows as codes from -127 to 127. Each block of 32 steps has a scale, which is its
/// largest magnitude over 127; it is 0 for a block of zeros and NaN for a block with a number that is not
/// finite. The last block is padded with 0.
template <class Dot>
struct RoundedRows {
  static constexpr Index most_rows = 32;
  static constexpr Index most_steps = 4096;
  static constexpr Index most_blocks = most_steps / scaled_steps;
  static constexpr Index block_bytes = scaled_steps / 4 * Dot::bytes;

  alignas(64) std::byte codes[to_size(most_rows * most_blocks * block_bytes)];
  float scale[to_size(most_rows)][to_size(most_blocks)];
  std::int32_t shift[to_size(most_rows)]
                    [to_size(most_blocks)];  ///< -zero times the sum of a block's codes

  const std::byte* row(Index r) const { return codes + r * most_blocks * block_bytes; }

  void round(const GatheredRows<float>& rows, std::int32_t zero) {
    for (Index r = 0; r < rows.count(); ++r) {
      std::byte* to = codes + r * most_blocks * block_bytes;
      for (Index k = 0; k < rows.width(); k += scaled_steps, to += block_bytes) {
        const Index count = std::min(scaled_steps, rows.width() - k);
        const Index block = k / scaled_steps;
        shift[r][block] = -zero * round_block(rows.row(r) + k, count, scale[r][block], to);
      }
    }
  }

 private:
  /// Returns the sum of the codes.
  static std::int32_t round_block(const float* x, Index count, float& scale, std::byte* to) {
    using namespace Eigen::internal;
    float padded[to_size(scaled_steps)];
    if (count < scaled_steps) {
      std::fill(std::copy_n(x, count, padded), padded + scaled_steps, 0.0f);
      x = padded;
    }
    // x - x is 0, or NaN if x is not finite: a maximum may lose a NaN.
    Packet<float> largest = broadcast(0.0f);
    Packet<float> nothing = broadcast(0.0f);
    for (Index i = 0; i < scaled_steps; i += lane_count) {
      const Packet<float> v = load(x + i);
      largest = pmax(largest, pabs(v));
      nothing = padd(nothing, psub(v, v));
    }
    const float bound = predux_max(largest);
    scale = bound / 127 + predux(nothing);
    std::int32_t code[to_size(scaled_steps)] = {};
    if (bound > 0 && std::isfinite(scale)) {
      // For numbers near the smallest floats 127 / bound may be infinite, so such numbers are first
      // multiplied by a power of 2, which is exact.
      const float up = bound < 0x1p-100f ? 0x1p100f : 1.0f;
      const Packet<float> inverse = broadcast(127 / (bound * up));
      // Adding 1.5·2^23 rounds to the nearest whole number, ties to even, and leaves it in the lowest bits.
      const Packet<float> whole = broadcast(0x1.8p23f);
      for (Index i = 0; i < scaled_steps; i += lane_count) {
        const Packet<float> rounded = pmadd(pmul(load(x + i), broadcast(up)), inverse, whole);
        pstoreu(code + i, padd(as_lanes(rounded), broadcast_lanes(-0x4B400000)));
      }
    }
    std::int32_t sum = 0;
    for (const std::int32_t c : code) sum += c;
    for (Index i = 0; i < scaled_steps; i += 4) Dot::store(code + i, to + i / 4 * Dot::bytes);
    return sum;
  }
};

}  // namespace moe::detail

MOE_PACKETS_END
