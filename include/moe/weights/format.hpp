#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "moe/kernels/lanes.hpp"

/// \file
/// The concept of a narrow format, and the memory layout of a matrix in one.
///
/// A matrix of K x N weights is divided into panels, each panel_packets SIMD packets of columns wide. A
/// product reads a panel sequentially, in the order of k:
///
///     panel   ⌈K / block⌉ blocks
///     block   the scales of its columns, if the format has any, in float16; then block / group groups
///     group   for each column of the panel a lane with the codes of `group` steps of k, where the
///             format's get() reads them: 32 bits, or 16 where group is 1
///
/// K is padded with zero weights to whole blocks. The last panel has only as many packets as its columns
/// need.

MOE_PACKETS_BEGIN

namespace moe {

/// How a product uses the rows of x.
enum class Activations {
  float32,  ///< as they are
  /// Rounded to 8-bit integers, with a float scale for each block of 32; sums of products in a block are
  /// exact integers. Faster, most of all for Int4, but results differ from those of float32 in about
  /// the third digit.
  int8
};

namespace detail {

/// The width of a panel, in packets of columns.
inline constexpr Index panel_packets = 4;

/// The number of weights of a column, and of activations of a row, that share a scale.
inline constexpr Index scaled_steps = 32;

// clang-format off
/// A format of narrow weights.
///
///     name                  its name in files and messages
///     Code                  an integer type for the code of one weight
///     group, group_bytes    the steps of k that are stored in one lane, and the bytes of a lane
///     block                 steps of k that share a scale, or `group` if there are no scales
///     scaled                whether there are scales
///     encode(value, scale)  the code of a weight; the scale is 1 if there are none
///     decode(code, scale)   the weight that a code stands for, exactly
///     get(lane, step), set(lane, step, code)    a code in its lane
///     widen<step>(lane)     a packet of columns of a step of k: the weights, or if there are scales the
///                           codes times `unit`, exactly
///
/// If scaled, also `unit`, a power of 2, and scale(values, count): the scale of a block, a float that float16
/// can represent exactly; and for rounded activations bytes<part>(lanes), four steps of k as unsigned bytes, which are the
/// codes + `zero` and at most `most_stored`.
template <class F>
concept NarrowFormat = requires(const std::byte* lane, std::byte* changed, float value,
                                typename F::Code code) {
  { F::encode(value, value) } -> std::same_as<typename F::Code>;
  { F::decode(code, value) } -> std::same_as<float>;
  { F::get(lane, Index{}) } -> std::same_as<typename F::Code>;
  F::set(changed, Index{}, code);
  { F::template widen<0>(lane) } -> std::same_as<Packet<float>>;
  F::name; F::group; F::group_bytes; F::block; F::scaled;
};
// clang-format on

/// A number in float16, as scales are stored.
inline float load_half(const std::byte* from) {
  Eigen::half half;
  std::memcpy(&half.x, from, sizeof(half.x));
  return static_cast<float>(half);
}
inline void store_half(float value, std::byte* to) {
  const auto half = static_cast<Eigen::half>(value);
  std::memcpy(to, &half.x, sizeof(half.x));
}
/// A number rounded to float16.
inline float round_to_half(float value) {
  return static_cast<float>(static_cast<Eigen::half>(value));
}

/// The code of a weight, for which the weight is about code·scale: a whole number from `least` to `most`;
/// ties are rounded away from 0.
inline std::int8_t scaled_code(float value, float scale, float least, float most) {
  if (scale == 0) return 0;
  return static_cast<std::int8_t>(std::clamp(std::round(value / scale), least, most));
}

}  // namespace detail
}  // namespace moe

MOE_PACKETS_END
