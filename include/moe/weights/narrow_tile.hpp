#pragma once

#include <cstddef>
#include <utility>

#include "moe/kernels/micro_kernel.hpp"
#include "moe/weights/narrow_matrix.hpp"

/// \file
/// The tiles of products with narrow weights: some rows of C times some packets of columns, with codes that are
/// widened in registers, or that an earlier tile left behind as floats.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The codes of a scaled format as floats, in the layout of a format whose codes are floats; their scales are
/// floats too, divided by `unit`.
template <class Format>
struct WideCodes {
  static constexpr Index group = Format::group;
  static constexpr Index block = Format::block;
  static constexpr bool scaled = true;
  template <Index step>
  EIGEN_ALWAYS_INLINE static Packet<float> widen(const std::byte* lane) {
    return load(reinterpret_cast<const float*>(lane) + step * lane_count);
  }
};
template <class Format>
struct NarrowLayout<WideCodes<Format>> {
  static constexpr Index scale_bytes = lane_count * static_cast<Index>(sizeof(float));
  static constexpr Index group_bytes = Format::group * scale_bytes;
  static constexpr Index block_bytes = scale_bytes * (1 + Format::block);
};
/// Floats of a packet of columns in a block of WideCodes, their scales included.
template <class Format>
inline constexpr Index wide_block_floats = lane_count*(1 + Format::block);
template <class Format>
inline constexpr bool is_wide = false;
template <class Format>
inline constexpr bool is_wide<WideCodes<Format>> = true;

/// The highest tile. Registers hold its sums and what is widened of a step. Of wide codes 5 rows are faster
/// than 6, see docs/experiments.md.
template <class Format>
inline constexpr Index narrow_tile_rows = is_wide<Format>                    ? 5
                                          : l2_feeds_tiles || Format::scaled ? 6
                                                                             : 2;
/// Packets of a tile of some rows: a panel's, or as many as fit if the format has scales, there are
/// only 16 registers, and more than `whole` rows.
template <class Format>
constexpr Index narrow_tile_packets(Index rows, Index whole) {
  return l2_feeds_tiles || rows <= whole || !Format::scaled ? panel_packets : 2;
}

/// Calls f(std::integral_constant<Index, i>) for i from 0 to count - 1.
template <Index count, class F>
EIGEN_ALWAYS_INLINE void for_each_constant(F&& f) {
  [&]<std::size_t... i>(std::index_sequence<i...>) MOE_INLINED {
    (f(std::integral_constant<Index, static_cast<Index>(i)>{}), ...);
  }
  (std::make_index_sequence<to_size(count)>{});
}

/// The scales of a packet of columns over the unit: what widened codes are multiplied by.
template <class Format>
EIGEN_ALWAYS_INLINE Packet<float> load_scale(const std::byte* scales) {
  if constexpr (is_wide<Format>) {
    return load(reinterpret_cast<const float*>(scales));
  } else {
    return Eigen::internal::pmul(load_halves(scales), broadcast(1 / Format::unit));
  }
}

/// A packet of columns of widened numbers as weights; `scale` is that of its block, if there is one.
template <class Format>
EIGEN_ALWAYS_INLINE Packet<float> decoded(const Packet<float>& widened,
                                          [[maybe_unused]] const Packet<float>& scale) {
  if constexpr (!Format::scaled) return widened;
  return Eigen::internal::pmul(widened, scale);
}

/// Adds to R rows of C, from a column on: R rows of A times V packets of a panel, from packet `first` on,
/// over `blocks` whole blocks. The panel is `packets` packets wide. The hardware prefetcher follows
/// the panel.
template <class Format, Index R, Index V>
requires(!Format::scaled) MOE_NOINLINE
    void narrow_tile(const float* const* a, const std::byte* panel, Index packets, Index first,
                     Index blocks, float* const* c, Index column) {
  using namespace Eigen::internal;
  using Layout = NarrowLayout<Format>;
  constexpr Index size = lane_count;
  const Index stride = packets * Layout::group_bytes;
  const float* row[to_size(R)];
  Packet<float> sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index r = 0; r < R; ++r) row[r] = a[r];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) sum[i / V][i % V] = load(c[i / V] + column + i % V * size);
  for (Index block = 0; block < blocks; ++block) {
    const std::byte* lanes = panel + first * Layout::group_bytes;
    for_each_constant<Format::group>([&](auto step) MOE_INLINED {
      MOE_UNROLL
      for (Index v = 0; v < V; ++v) {
        const Packet<float> weight = Format::template widen<step>(lanes + v * Layout::group_bytes);
        MOE_UNROLL
        for (Index r = 0; r < R; ++r) {
          sum[r][v] = pmadd(pset1<Packet<float>>(row[r][step]), weight, sum[r][v]);
        }
      }
    });
    panel += stride;
    MOE_UNROLL
    for (Index r = 0; r < R; ++r) row[r] += Format::group;
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) store(c[i / V] + column + i % V * size, sum[i / V][i % V]);
}

/// The same with scales, which are applied to the sums of blocks. If it `keeps`, it stores the wide codes and
/// their scales in `wide`, for the tiles that come after it.
template <class Format, Index R, Index V, bool keeps = false>
requires Format::scaled MOE_NOINLINE void narrow_tile(const float* const* a, const std::byte* panel,
                                                      Index packets, Index first, Index blocks,
                                                      float* const* c, Index column,
                                                      [[maybe_unused]] float* wide = nullptr) {
  using namespace Eigen::internal;
  using Layout = NarrowLayout<Format>;
  constexpr Index size = lane_count;
  // Registers hold C too if there are enough.
  constexpr bool holds_c = R * V <= (l2_feeds_tiles ? 12 : 4);
  // Where a tile reads a part of the panel only, the hardware prefetcher fetches too little.
  constexpr bool prefetches = !l2_feeds_tiles && !is_wide<Format> && V < panel_packets;
  const Index stride = packets * Layout::group_bytes;
  const float* row[to_size(R)];
  float* to[to_size(R)];
  [[maybe_unused]] Packet<float> total[to_size(R)][to_size(V)];
  if constexpr (keeps) wide += first * size;
  MOE_UNROLL
  for (Index r = 0; r < R; ++r) {
    row[r] = a[r];
    to[r] = c[r] + column;
  }
  if constexpr (holds_c) {
    MOE_UNROLL
    for (Index i = 0; i < R * V; ++i) total[i / V][i % V] = load(to[i / V] + i % V * size);
  }
  for (Index block = 0; block < blocks; ++block) {
    Packet<float> sum[to_size(R)][to_size(V)];
    MOE_UNROLL
    for (Index i = 0; i < R * V; ++i) sum[i / V][i % V] = broadcast(0.0f);
    if constexpr (prefetches) {
      const Index bytes = packets * Layout::block_bytes;
      for (Index line = 0; line < bytes; line += 64) prefetch(panel, 2 * bytes + line);
    }
    const std::byte* lanes = panel + packets * Layout::scale_bytes + first * Layout::group_bytes;
    [[maybe_unused]] float* codes = nullptr;
    if constexpr (keeps) codes = wide + packets * size + first * (Format::group - 1) * size;
    for (Index group = 0; group < Format::block / Format::group; ++group) {
      for_each_constant<Format::group>([&](auto step) MOE_INLINED {
        const auto code = [&](Index v) MOE_INLINED {
          return to_register(Format::template widen<step>(lanes + v * Layout::group_bytes));
        };
        const Packet<float> w0 = code(0);
        const Packet<float> w1 = V > 1 ? code(1) : w0;
        const Packet<float> w2 = V > 2 ? code(2) : w0;
        const Packet<float> w3 = V > 3 ? code(3) : w0;
        if constexpr (keeps) {
          constexpr Index distance = Format::group * size;
          store(codes + step * size, w0);
          if constexpr (V > 1) store(codes + step * size + distance, w1);
          if constexpr (V > 2) store(codes + step * size + 2 * distance, w2);
          if constexpr (V > 3) store(codes + step * size + 3 * distance, w3);
        }
        MOE_UNROLL
        for (Index r = 0; r < R; ++r) {
          const auto x = pset1<Packet<float>>(row[r][step]);
          sum[r][0] = pmadd(x, w0, sum[r][0]);
          if constexpr (V > 1) sum[r][1] = pmadd(x, w1, sum[r][1]);
          if constexpr (V > 2) sum[r][2] = pmadd(x, w2, sum[r][2]);
          if constexpr (V > 3) sum[r][3] = pmadd(x, w3, sum[r][3]);
        }
      });
      lanes += stride;
      if constexpr (keeps) codes += packets * Format::group * size;
      MOE_UNROLL
      for (Index r = 0; r < R; ++r) row[r] += Format::group;
    }
    MOE_UNROLL
    for (Index v = 0; v < V; ++v) {
      const Packet<float> scale = load_scale<Format>(panel + (first + v) * Layout::scale_bytes);
      if constexpr (keeps) store(wide + v * size, scale);
      MOE_UNROLL
      for (Index r = 0; r < R; ++r) {
        if constexpr (holds_c) {
          total[r][v] = pmadd(sum[r][v], scale, total[r][v]);
        } else {
          sum[r][v] = pmadd(sum[r][v], scale, load(to[r] + v * size));
        }
      }
    }
    if constexpr (!holds_c) {
      // Not next to the loads: a load waits for an earlier store whose address differs from its own by a
      // multiple of 4 KiB.
      MOE_UNROLL
      for (Index i = 0; i < R * V; ++i) store(to[i / V] + i % V * size, sum[i / V][i % V]);
    }
    panel += packets * Layout::block_bytes;
    if constexpr (keeps) wide += packets * wide_block_floats<Format>;
  }
  if constexpr (holds_c) {
    MOE_UNROLL
    for (Index i = 0; i < R * V; ++i) store(to[i / V] + i % V * size, total[i / V][i % V]);
  }
}

}  // namespace moe::detail

MOE_PACKETS_END
