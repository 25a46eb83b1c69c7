#pragma once

#include <algorithm>

#include "moe/kernels/pack.hpp"

/// \file
/// Products whose large operand is not a matrix of Scalar: it is converted into L1, a panel at a
/// time.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// C = A·B of a depth of at least 1: columns in groups whose part of C stays in L2, for each group the depth in blocks, and
/// in each block one strip of columns after the other.
///
/// A strip of B is packed into a panel, which stays in L1 while the tiles of the strip are computed.
/// Meanwhile they prefetch the next strip, so memory and arithmetic are busy at the same time without
/// help from the hardware prefetcher. A second panel, filled between the tiles, would evict the first
/// one from L1.
template <class Scalar, PacketSource<Scalar> Source>
void gemm_packed(const GemmNN<Scalar, Source>& product) {
  alignas(64) Scalar buffer[to_size(panel_depth * tile_columns<Scalar>)];
  const GatheredRows<Scalar>& a = product.a;
  const ScatteredRows<Scalar>& c = product.c;
  const Epilogue epilogue = product.epilogue;
  const Index depth = a.width();
  const Index tiles = (a.count() + tile_rows - 1) / tile_rows;

  const auto run = [&](const Strip& strip, const Strip* next) {
    const Start from = strip.k == 0 ? product.start : Start::accumulate;
    const Panel<Scalar> panel = product.b.pack(strip, buffer);
    constexpr Index piece = prefetched_steps<Scalar, Source>;
    const Index pieces = next != nullptr ? (next->depth + piece - 1) / piece : 0;
    const Index each = (pieces + tiles - 1) / tiles * piece;
    Index prefetched = 0;
    for_each_tile(a.count(), tile_rows, [&](Index first, Index rows) {
      Left<Scalar> left;
      Scalar* to[to_size(tile_rows)];
      for (Index r = 0; r < rows; ++r) {
        left.row[r] = a.row(first + r) + strip.k;
        to[r] = c.row(first + r) + strip.column;
      }
      for (Index r = first + rows; r < std::min(first + 2 * rows, a.count()); ++r) {
        prefetch_strip(c.row(r) + strip.column);
      }
      Prefetch<Scalar> ahead;
      if (next != nullptr && prefetched < next->depth) {
        ahead = product.b.prefetch(*next, prefetched, std::min(each, next->depth - prefetched));
        prefetched += each;
      }
      const Bias<Scalar> initial =
          strip.k == 0 ? product.bias.at(first, strip.column) : Bias<Scalar>{};
      multiply_tile<OperationOf<Source>>(rows, strip.packets, strip.width, left, panel, strip.depth,
                                         from, initial, to, ahead);
      if (epilogue && strip.k + strip.depth >= depth) {
        epilogue(first, rows, strip.column, strip.width);
      }
    });
  };

  const Index panels =
      std::max<Index>(1, cached_elements<Scalar> / (a.count() * panel_columns<Scalar>));
  const Index group = panels * panel_columns<Scalar>;
  Strip strip{};
  bool pending = false;
  const Range columns = product.column_range();
  const Index end = columns.first + columns.count;
  for (Index column = columns.first; column < end; column += group) {
    const Index width = std::min(group, end - column);
    for (Index k = 0; k < depth; k += panel_depth) {
      for_each_strip<Scalar>(column, width, [&](Index at, Index packets, Index strip_width) {
        const Strip next{k, std::min(panel_depth, depth - k), at, packets, strip_width};
        if (pending) run(strip, &next);
        strip = next;
        pending = true;
      });
    }
  }
  if (pending) run(strip, nullptr);
}

}  // namespace moe::detail

MOE_PACKETS_END
