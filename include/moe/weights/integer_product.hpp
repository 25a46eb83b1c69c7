#pragma once

#include <algorithm>
#include <memory>

#include "moe/weights/narrow_product.hpp"
#include "moe/weights/rounded_rows.hpp"

/// \file
/// Products with narrow weights and activations rounded to 8 bits:
///
///     C[r, j] = start + Σ over blocks of (scale of weights · scale of activations) · Σ_k q[k, j]·a[r, k]
///
/// The inner sums are whole numbers, exact on every processor; the outer one adds block after block in
/// ascending order, so a row has the same bits whatever rows are multiplied with it.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The highest tile, and the rows up to which a tile is as wide as a panel: with 16 registers the sums of more
/// do not fit, see docs/experiments.md.
inline constexpr Index integer_tile_rows = l2_feeds_tiles ? 6 : 4;
inline constexpr Index integer_whole_rows = 3;

/// Adds to R rows of C: the rounded rows from `first` on times V packets of a panel, from packet `v0` on,
/// over `blocks` blocks. The panel is `packets` packets wide.
template <class Format, class Dot, Index R, Index V>
MOE_NOINLINE void integer_tile(const RoundedRows<Dot>& rows, Index first, const std::byte* panel,
                               Index packets, Index v0, Index blocks, float* const* c,
                               Index column) {
  using namespace Eigen::internal;
  using Layout = NarrowLayout<Format>;
  constexpr Index size = lane_count;
  const std::byte* a[to_size(R)];
  float* to[to_size(R)];
  for (Index r = 0; r < R; ++r) {
    a[r] = rows.row(first + r);
    to[r] = c[r] + column;
  }
  for (Index block = 0; block < blocks; ++block) {
    const std::byte* scales = panel + v0 * Layout::scale_bytes;
    const std::byte* lanes = panel + packets * Layout::scale_bytes + v0 * Layout::group_bytes;
    Lanes sum[to_size(R)][to_size(V)];
    MOE_UNROLL
    for (Index r = 0; r < R; ++r) {
      // Codes are stored as code + zero: zero·(sum of the row's codes) is subtracted once.
      const auto shift = static_cast<std::int32_t>(-Format::zero * rows.sum[first + r][block]);
      MOE_UNROLL
      for (Index v = 0; v < V; ++v) sum[r][v] = broadcast_lanes(shift);
    }
    for (Index group = 0; group < Format::block / Format::group; ++group) {
      for_each_constant<Format::group / 4>([&](auto part) {
        MOE_UNROLL
        for (Index v = 0; v < V; ++v) {
          const Lanes weights = Format::template bytes<part>(lanes + v * Layout::group_bytes);
          MOE_UNROLL
          for (Index r = 0; r < R; ++r) {
            sum[r][v] = Dot::add(sum[r][v], weights, a[r] + part * Dot::bytes);
          }
        }
      });
      lanes += packets * Layout::group_bytes;
      MOE_UNROLL
      for (Index r = 0; r < R; ++r) a[r] += Format::group / 4 * Dot::bytes;
    }
    MOE_UNROLL
    for (Index v = 0; v < V; ++v) {
      const Packet<float> scale = load_halves(scales + v * Layout::scale_bytes);
      MOE_UNROLL
      for (Index r = 0; r < R; ++r) {
        const Packet<float> both = pmul(scale, broadcast(rows.scale[first + r][block]));
        store(to[r] + v * size, pmadd(to_float(sum[r][v]), both, load(to[r] + v * size)));
      }
    }
    panel += packets * Layout::block_bytes;
  }
}

/// C = A·B on the calling thread, with the rows of A rounded to 8 bits: some rows at a time, for these all
/// panels of B.
template <class Format>
requires Format::scaled void gemm_integer(const GemmNN<float, NarrowOperand<Format>>& product) {
  using Dot = IntegerDot<Format::zero <= 8>;
  using Rows = RoundedRows<Dot>;
  const NarrowOperand<Format>& b = product.b;
  Rows rounded;
  for_each_tile(product.a.count(), Rows::most_rows, [&](Index top, Index height) {
    for (Index k = 0; k == 0 || k < b.rows; k += Rows::most_steps) {
      const Index depth = std::min(Rows::most_steps, b.rows - k);
      rounded.round(product.a.slice(top, height).columns(k, depth));
      for_each_panel(b, product.column_range(), [&](const PanelPart& part, Index begin) {
        const std::byte* panel = b.panel(begin, k / Format::block);
        for_each_tile(height, integer_tile_rows, [&](Index first, Index count) {
          with_panel_of_c(product, {top + first, count}, part, k == 0, [&](float* const* to) {
            for_each_narrow_tile<Format, integer_tile_rows, integer_whole_rows>(
                count, part, [&](auto R, auto V, Index v) {
                  integer_tile<Format, Dot, R, V>(rounded, first, panel, part.packets, v,
                                                  narrow_blocks<Format>(depth), to,
                                                  (v - part.first) * lane_count);
                });
          });
        });
      });
    }
  });
  call_epilogue<float>(product.epilogue, product.a.count(), product.column_range());
}

}  // namespace moe::detail

MOE_PACKETS_END
