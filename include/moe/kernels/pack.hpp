#pragma once

#include <algorithm>
#include <concepts>
#include <type_traits>

#include "moe/kernels/blocking.hpp"

/// \file
/// Packing: contiguous copies of operands, plain and transposed, and the sources of packets that B is
/// packed from.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// Packs rows `stride` apart, the last packet of each padded with zeros.
template <class Scalar>
void copy_rows(const GatheredRows<Scalar>& rows, Index stride, Scalar* buffer) {
  constexpr Index size = packet_size<Scalar>;
  const Index depth = rows.count();
  const Index width = rows.width();
  for (Index k = 0; k < depth; ++k) {
    const Scalar* from = rows.row(k);
    Scalar* to = buffer + k * stride;
    Index j = 0;
    for (; j + size <= width; j += size) store(to + j, load(from + j));
    if (j < width) store(to + j, load_first(from + j, width - j));
  }
}

/// Packs rows as strips of tile_columns, one after the other, so that what a tile reads is contiguous.
/// The last strip takes as much memory as the others.
template <class Scalar>
void copy_strips(const GatheredRows<Scalar>& rows, Scalar* buffer) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index strip = tile_columns<Scalar>;
  const Index depth = rows.count();
  const Index width = rows.width();
  Index column = 0;
  for (; column + strip <= width; column += strip, buffer += depth * strip) {
    for (Index k = 0; k < depth; ++k) {
      const Scalar* from = rows.row(k) + column;
      MOE_UNROLL
      for (Index v = 0; v < tile_packets; ++v) {
        store(buffer + k * strip + v * size, load(from + v * size));
      }
    }
  }
  if (column < width) copy_rows(rows.columns(column, width - column), strip, buffer);
}

/// Packs rows as columns, `stride` of them, those beyond the last row filled with zeros.
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

/// to[j][i] = from[i][j] of a packet of rows and columns.
template <class Scalar>
void transpose_square(const Scalar* from, Index from_stride, Scalar* to, Index to_stride) {
  constexpr Index size = packet_size<Scalar>;
  Eigen::internal::PacketBlock<Packet<Scalar>, static_cast<int>(size)> block;
  for (Index i = 0; i < size; ++i) block.packet[i] = load(from + i * from_stride);
  if constexpr (size > 1) Eigen::internal::ptranspose(block);
  for (Index j = 0; j < size; ++j) store(to + j * to_stride, block.packet[j]);
}

/// to[j][i] = from[i][j], in square blocks of a packet that is no wider than a tile is high.
template <class Scalar>
void transpose_rows(ScatteredRows<Scalar> from, ScatteredRows<Scalar> to) {
  using Whole = Packet<Scalar>;
  using Half = HalfPacket<Scalar>;
  using Fitting = std::conditional_t<(packet_size<Scalar> > tile_rows), Half, Whole>;
  constexpr Index size = Eigen::internal::unpacket_traits<Fitting>::size;
  using Block = Eigen::internal::PacketBlock<Fitting, static_cast<int>(size)>;
  const Index rows = from.count();
  const Index columns = from.width();
  const Index whole_rows = rows / size * size;
  const Index whole_columns = columns / size * size;
  for (Index i = 0; i < whole_rows; i += size) {
    for (Index j = 0; j < whole_columns; j += size) {
      Block block;
      for (Index x = 0; x < size; ++x) {
        block.packet[x] = Eigen::internal::ploadu<Fitting>(from.row(i + x) + j);
      }
      if constexpr (size > 1) Eigen::internal::ptranspose(block);
      for (Index x = 0; x < size; ++x) Eigen::internal::pstoreu(to.row(j + x) + i, block.packet[x]);
    }
  }
  for (Index i = 0; i < rows; ++i) {
    const Index first = i < whole_rows ? whole_columns : 0;
    for (Index j = first; j < columns; ++j) to.row(j)[i] = from.row(i)[j];
  }
}

/// The depth of a panel, at most: a panel of tile_packets packets is then 24 KiB, which leaves room in L1.
/// Deeper ones would read and write C less often.
inline constexpr Index panel_depth =
    (Index{24} << 10) / static_cast<Index>(tile_packets * sizeof(Packet<float>));

/// A part of B: steps [k, k + depth) of `width` columns from a first column on, in whole `packets`.
struct Strip {
  Index k;
  Index depth;
  Index column;
  Index packets;
  Index width;
};

/// The source from which gemm_packed() reads B, a strip at a time. gemm_packed() uses nothing else
/// of B, so a source whose numbers are stored in another type converts them in pack() and nowhere
/// else.
///
///     pack(strip, buffer)            the strip as packets, in the buffer (panel_depth rows of
///                                    tile_columns), the last packet of a row padded with zeros
///     prefetch(strip, first, count)  what pack() will read for steps [first, first + count)
template <class Source, class Scalar>
concept PacketSource = requires(const Source& source, const Strip& strip, Scalar* buffer,
                                Index step) {
  { source.pack(strip, buffer) } -> std::same_as<Panel<Scalar>>;
  { source.prefetch(strip, step, step) } -> std::same_as<Prefetch<Scalar>>;
};

/// What a step does with the packets of a source: a multiply-add, if the source does not name an
/// Operation.
template <class Source>
struct OperationOfSource {
  using type = MultiplyAdd;
};
template <class Source>
requires requires { typename Source::Operation; }
struct OperationOfSource<Source> {
  using type = typename Source::Operation;
};
template <class Source>
using OperationOf = typename OperationOfSource<Source>::type;

/// A tile prefetches a multiple of this number of steps. If the source does not give the number, it
/// is what strip_lines cache lines hold of a row of a transposed B.
template <class Scalar, class Source>
inline constexpr Index prefetched_steps = [] {
  if constexpr (requires { Source::prefetched_steps; }) {
    return Source::prefetched_steps;
  } else {
    return strip_lines * cache_line<Scalar>;
  }
}();

}  // namespace moe::detail

MOE_PACKETS_END
