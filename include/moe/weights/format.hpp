#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "moe/kernels/lanes.hpp"

/// \file
/// What a narrow format says, and how a matrix of it lies in memory.
///
/// A matrix of K x N weights is cut into panels of panel_packets packets of columns. A panel is read
/// from its first byte to its last by the product, k running inside:
///
///     panel   ⌈K / block⌉ blocks
///     block   the scales of its columns, if the format has any, in float16; then block / group groups
///     group   for each column of the panel the codes of `group` steps of k, the lowest in the lowest
///             bits: 32 bits, or 16 where group is 1
///
/// K is filled up with zero weights to whole blocks. The last panel is as many packets wide as its
/// columns need.

MOE_PACKETS_BEGIN

namespace moe {

/// What the product rounds the rows of x to: nothing, or 8-bit integers, a block of 32 with a float
/// scale each, of which it makes exact integer sums. `int8` is faster, most of all for Int4, and
/// rounds: results then differ from those of `float32` in the third digit or so.
enum class Activations { float32, int8 };

namespace detail {

/// Columns of a panel in packets.
inline constexpr Index panel_packets = 4;

/// Weights of a column that share a scale, and activations of a row too.
inline constexpr Index scaled_steps = 32;

// clang-format off
/// A format of narrow weights.
///
///     name                  as it is said in files and messages
///     Code                  an integer type that holds the code of one weight
///     group, group_bytes    steps of k beside each other in a lane, and the bytes of a lane
///     block                 steps of k that share a scale, or `group` where there are none
///     scaled                whether there are scales
///     encode(value, scale)  the code of a weight, its scale being 1 where there are none
///     decode(code, scale)   the weight that a code stands for, exactly
///     get(lane, step), set(lane, step, code)    a code in its lane
///     widen<step>(lane)     a packet of columns of a step of k: the weights, or where there are scales
///                           what makes them by widened·scale - offset·scale, exactly
///
/// and, where scaled, that offset and scale(values, count): the scale of a block, a float that float16
/// holds exactly.
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
/// A number as float16 holds it.
inline float round_to_half(float value) {
  return static_cast<float>(static_cast<Eigen::half>(value));
}

/// The code of a weight that stands for code·scale, in whole numbers from `least` to `most`; a tie is
/// rounded away from 0.
inline std::int8_t scaled_code(float value, float scale, float least, float most) {
  if (scale == 0) return 0;
  return static_cast<std::int8_t>(std::clamp(std::round(value / scale), least, most));
}

}  // namespace detail
}  // namespace moe

MOE_PACKETS_END
