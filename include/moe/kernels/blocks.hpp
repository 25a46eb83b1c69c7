#pragma once

#include <algorithm>

#include "moe/kernels/tile.hpp"

/// \file
/// How products are cut into what the caches hold: strips of columns, tiles of rows, and copies of
/// operands that tiles read from end to end.

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace moe::detail {

/// Columns of C in one task, at most.
template <class Scalar>
inline constexpr Index panel_columns = 4 * tile_columns<Scalar>;

/// Elements of C that stay in the second-level cache beside A: 128 KiB.
template <class Scalar>
inline constexpr Index cached_elements = (Index{128} << 10) / static_cast<Index>(sizeof(Scalar));

/// Rows of C in one task, at most: their part of A stays in the second-level cache.
inline constexpr Index task_rows = 256;

/// Cuts [0, count) into `parts` as even as can be, the longer ones first, and calls f(first, size).
template <class F>
void for_each_part(Index count, Index parts, F&& f) {
  Index first = 0;
  for (Index part = 0; part < parts; ++part) {
    const Index size = (count - first + parts - part - 1) / (parts - part);
    f(first, size);
    first += size;
  }
}

/// Calls f(column, packets, width) for strips of one to three packets that cover the columns. The
/// strips start anew every panel_columns and are as even as possible there (4 packets are 2 + 2,
/// since a tile of one packet wastes the broadcasts), so where a strip begins does not depend on
/// how the columns are split over tasks, as long as tasks begin at multiples of panel_columns.
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

/// Splits rows into as few tiles as possible, of even height, and calls f(row, count) for each.
template <class F>
void for_each_tile(Index rows, Index highest, F&& f) {
  for_each_part(rows, (rows + highest - 1) / highest, f);
}

/// Calls the epilogue for all tiles of some columns.
template <class Scalar>
void call_epilogue(Epilogue epilogue, Index rows, Range columns) {
  if (!epilogue) return;
  for_each_tile(rows, tile_rows, [&](Index row, Index count) {
    for_each_strip<Scalar>(columns.first, columns.count, [&](Index column, Index, Index width) {
      epilogue(row, count, column, width);
    });
  });
}

/// Copies rows next to each other, the last packet of each filled up with zeros.
template <class Scalar>
Panel<Scalar> copy_panel(const GatheredRows<Scalar>& rows, Scalar* buffer) {
  constexpr Index size = packet_size<Scalar>;
  const Index depth = rows.count();
  const Index width = rows.width();
  const Index stride = (width + size - 1) / size * size;
  if (width == tile_columns<Scalar>) {  // nearly always, and then without loops inside
    for (Index k = 0; k < depth; ++k) {
      const Scalar* from = rows.row(k);
      Scalar* to = buffer + k * stride;
      MOE_UNROLL
      for (Index v = 0; v < tile_packets; ++v) store(to + v * size, load(from + v * size));
    }
    return {buffer, stride};
  }
  for (Index k = 0; k < depth; ++k) {
    const Scalar* from = rows.row(k);
    Scalar* to = buffer + k * stride;
    Index j = 0;
    for (; j + size <= width; j += size) store(to + j, load(from + j));
    if (j < width) store(to + j, load_first(from + j, width - j));
  }
  return {buffer, stride};
}

/// Copies rows as columns next to each other, `stride` of them, the last of which are zeros.
template <class Scalar>
void copy_transposed(const GatheredRows<Scalar>& rows, Index stride, Scalar* buffer) {
  constexpr Index size = packet_size<Scalar>;
  using Block = Eigen::internal::PacketBlock<Packet<Scalar>, static_cast<int>(size)>;
  const Index depth = rows.width();
  const Index width = rows.count();
  Index column = 0;
  for (; column + size <= width; column += size) {
    const Scalar* row[to_size(size)];
    for (Index i = 0; i < size; ++i) row[i] = rows.row(column + i);
    Index k = 0;
    for (; k + size <= depth; k += size) {
      Block block;
      for (Index i = 0; i < size; ++i) block.packet[i] = load(row[i] + k);
      if constexpr (size > 1) Eigen::internal::ptranspose(block);
      for (Index i = 0; i < size; ++i) store(buffer + (k + i) * stride + column, block.packet[i]);
    }
    for (; k < depth; ++k) {
      for (Index i = 0; i < size; ++i) buffer[k * stride + column + i] = row[i][k];
    }
  }
  for (Index j = column; j < stride; ++j) {
    const Scalar* row = j < width ? rows.row(j) : nullptr;
    for (Index k = 0; k < depth; ++k) buffer[k * stride + j] = row != nullptr ? row[k] : Scalar{0};
  }
}

/// The same, the last packet of columns filled up with zeros.
template <class Scalar>
Panel<Scalar> transpose_panel(const GatheredRows<Scalar>& rows, Scalar* buffer) {
  constexpr Index size = packet_size<Scalar>;
  const Index stride = (rows.count() + size - 1) / size * size;
  copy_transposed(rows, stride, buffer);
  return {buffer, stride};
}

}  // namespace moe::detail

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
