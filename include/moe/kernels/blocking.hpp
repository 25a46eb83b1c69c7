#pragma once

#include <algorithm>

#include "moe/kernels/micro_kernel.hpp"

/// \file
/// Cache blocking: how a product is cut into blocks for a task, strips of columns and tiles of rows.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The number of columns of a panel, the unit in which columns are cut into tasks and strips: a
/// whole number of tiles, whether the rows of a tile or its packets run along the columns.
template <class Scalar>
inline constexpr Index panel_columns = (l2_feeds_tiles ? 4 : 6) * tile_columns<Scalar>;

/// Elements of C that stay in L2 together with A: 128 KiB.
template <class Scalar>
inline constexpr Index cached_elements = (Index{128} << 10) / static_cast<Index>(sizeof(Scalar));

/// The largest number of rows of C in a task of gemm() or of an expert's first half: the part of A
/// for these rows stays in L2.
inline constexpr Index task_rows = 256;

/// Cuts [0, count) into `parts` as evenly as possible, the longer ones first, and calls
/// f(first, size) for each.
template <class F>
void for_each_part(Index count, Index parts, F&& f) {
  Index first = 0;
  for (Index part = 0; part < parts; ++part) {
    const Index size = (count - first + parts - part - 1) / (parts - part);
    f(first, size);
    first += size;
  }
}

/// Calls f(column, packets, width) for strips of at most tile_packets that cover the columns. Each
/// panel of panel_columns is cut by itself, as evenly as possible (4 packets in strips of at most 3
/// become 2 + 2, since a tile of one packet wastes the broadcasts). So where a strip begins does
/// not depend on how the columns are split over tasks, as long as tasks begin at multiples of
/// panel_columns.
template <class Scalar, class F>
void for_each_strip(Index first_column, Index columns, F&& f) {
  constexpr Index size = packet_size<Scalar>;
  const Index end = first_column + columns;
  for (Index panel = first_column; panel < end; panel += panel_columns<Scalar>) {
    const Index width = std::min(panel_columns<Scalar>, end - panel);
    const Index packets = (width + size - 1) / size;
    const Index strips = (packets + tile_packets - 1) / tile_packets;
    for_each_part(packets, strips, [&](Index packet, Index count) {
      const Index column = packet * size;
      f(panel + column, count, std::min(count * size, width - column));
    });
  }
}

/// Cuts rows into as few tiles of at most `highest` rows as possible, of even height, and calls
/// f(row, count) for each.
template <class F>
void for_each_tile(Index rows, Index highest, F&& f) {
  for_each_part(rows, (rows + highest - 1) / highest, f);
}

/// Calls the epilogue, if there is one, for all tiles of some columns.
template <class Scalar>
void call_epilogue(Epilogue epilogue, Index rows, Range columns) {
  if (!epilogue) return;
  for_each_tile(rows, tile_rows, [&](Index row, Index count) {
    for_each_strip<Scalar>(columns.first, columns.count, [&](Index column, Index, Index width) {
      epilogue(row, count, column, width);
    });
  });
}

}  // namespace moe::detail

MOE_PACKETS_END
