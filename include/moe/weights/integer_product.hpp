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

/// The largest height of a tile. All tiles are as wide as a panel, which they read sequentially, as the
/// hardware prefetcher expects.
inline constexpr Index integer_tile_rows = l2_feeds_tiles ? 6 : 4;
/// The largest height of the tiles for a number of rows. 16 registers hold the sums of three rows, but with
/// four it is faster to read a panel once and leave some of the sums in memory.
constexpr Index integer_tile_height(Index rows) {
  return l2_feeds_tiles || rows == integer_tile_rows ? integer_tile_rows : 3;
}

/// Adds to R rows of C: the rounded rows from `first` on times V packets of a panel, from packet `v0` on,
/// over `blocks` blocks. The panel is `packets` packets wide.
template <class Format, class Dot, Index R, Index V>
MOE_NOINLINE void integer_tile(const RoundedRows<Dot>& rows, Index first, const std::byte* panel,
                               Index packets, Index v0, Index blocks, float* const* c,
                               Index column) {
  using namespace Eigen::internal;
  using Layout = NarrowLayout<Format>;
  constexpr Index size = lane_count;
  // Packets of weights that share the broadcasts of A, where registers hold them.
  constexpr Index together = !l2_feeds_tiles && R <= 2 ? 2 : 1;
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
    std::int32_t shift[to_size(R)];
    MOE_UNROLL
    for (Index r = 0; r < R; ++r) {
      // Codes are stored as code + zero: zero·(sum of the row's codes) is subtracted once.
      shift[r] = rows.shift[first + r][block];
      MOE_UNROLL
      for (Index v = 0; v < V; ++v) sum[r][v] = Dot::start(shift[r]);
    }
    for (Index group = 0; group < Format::block / Format::group; ++group) {
      for_each_constant<Format::group / 4>([&](auto part) MOE_INLINED {
        MOE_UNROLL
        for (Index v = 0; v < V; v += together) {
          const auto weights = [&](Index i) MOE_INLINED {
            return Dot::unpack(
                Format::template bytes<part>(lanes + std::min(v + i, V - 1) * Layout::group_bytes));
          };
          const auto w0 = weights(0);
          const auto w1 = together > 1 ? weights(1) : w0;
          MOE_UNROLL
          for (Index r = 0; r < R; ++r) {
            const auto shared = Dot::share(a[r] + part * Dot::bytes);
            sum[r][v] = to_register(Dot::add(sum[r][v], w0, shared));
            if (together > 1 && v + 1 < V) {
              sum[r][v + 1] = to_register(Dot::add(sum[r][v + 1], w1, shared));
            }
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
        const Packet<float> products = to_float(Dot::finish(sum[r][v], shift[r]));
        store(to[r] + v * size, pmadd(products, both, load(to[r] + v * size)));
      }
    }
    panel += packets * Layout::block_bytes;
  }
}

/// C = A·B on the calling thread, with the rows of A rounded to 8 bits: some rows at a time are
/// rounded and multiplied by all panels of B.
template <class Format>
requires Format::scaled void gemm_integer(const GemmNN<float, NarrowOperand<Format>>& product) {
  using Dot = IntegerDot<Format::most_stored <= 15>;
  using Rows = RoundedRows<Dot>;
  const NarrowOperand<Format>& b = product.b;
  Rows rounded;
  for_each_tile(product.a.count(), Rows::most_rows, [&](Index top, Index height) {
    for (Index k = 0; k == 0 || k < b.rows; k += Rows::most_steps) {
      const Index depth = std::min(Rows::most_steps, b.rows - k);
      rounded.round(product.a.slice(top, height).columns(k, depth), Format::zero);
      for_each_panel(b, product.column_range(), [&](const PanelPart& part, Index begin) {
        const std::byte* panel = b.panel(begin, k / Format::block);
        const Index blocks = narrow_blocks<Format>(depth);
        for_each_tile(height, integer_tile_height(height), [&](Index first, Index count) {
          with_panel_of_c(product, {top + first, count}, part, k == 0, [&](float* const* to) {
            for_each_narrow_tile<Format, integer_tile_rows, integer_tile_rows>(
                count, part, [&](auto R, auto V, Index v) {
                  integer_tile<Format, Dot, R, V>(rounded, first, panel, part.packets, v, blocks,
                                                  to, (v - part.first) * lane_count);
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
