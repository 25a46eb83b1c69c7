#pragma once

#include <algorithm>
#include <utility>

#include "moe/kernels/tile.hpp"
#include "moe/parallel.hpp"

/// \file
/// Matrix products with gathered rows, in the three forms that a layer and its gradient need:
///
///     nn   C[M,N]  = A[M,K] · B[K,N]       forward
///     nt   C[M,N]  = A[M,K] · B[N,K]ᵀ      gradient of the input
///     tn   C[M,N]  = A[K,M]ᵀ · B[K,N]      gradient of the weights
///
/// A (and B in the last form) may be rows gathered through a list, and C in the first two forms rows
/// scattered through one, so tokens are never copied together. Every element of C is one chain of
/// multiply-adds over ascending k, from the value it starts at (zero, a bias, or what C held), fused
/// where the processor fuses. Blocks, tiles and threads only decide when a chain is continued; hence
/// a row of C has the same bits whatever other rows are multiplied with it, on any number of
/// threads. Nothing allocates and nothing throws.
///
/// multiply_nn, multiply_nt and multiply_tn compute a part of C on the calling thread; product_nn,
/// product_nt and product_tn split all of C over the workers.

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace moe::detail {

/// Columns of C in one task, at most.
template <class Scalar>
inline constexpr Index panel_columns = 4 * tile_columns<Scalar>;

/// How far the rows of a panel reach along the depth, at most: a panel of 3 packets is then 24 KiB,
/// which leaves room in the first-level cache. Deeper ones would read and write C less often.
inline constexpr Index panel_depth =
    (Index{24} << 10) / static_cast<Index>(tile_packets * sizeof(Packet<float>));

/// Elements of C that stay in the second-level cache beside A: 128 KiB.
template <class Scalar>
inline constexpr Index cached_elements = (Index{128} << 10) / static_cast<Index>(sizeof(Scalar));

/// Rows of C in one task, at most: their part of A stays in the second-level cache.
inline constexpr Index task_rows = 256;

/// Whether a tile is so large that the second-level cache can feed it: 8 x 3 packets of 64 bytes need
/// 8 to 16 bytes a cycle. Then every form streams its large operand where it lies, for any number of
/// rows. Smaller tiles need theirs in the first-level cache, as panels; with few rows, which wait for
/// memory, they stream as well.
inline constexpr bool streams = tile_rows == max_tile_rows;

/// How many pairs of rows multiply_stream_tn adds at once, at most.
inline constexpr Index stream_pairs = streams ? 128 : 8;

/// How many rows of B multiply_stream_nn reads side by side for so many rows of A. Eight are as many
/// streams as the processor follows well, if each is a page of memory of its own; twice as many where
/// rows are shorter. Where arithmetic limits, more, since C is read and written less often then.
inline constexpr Index most_steps = 128;
template <class Scalar>
constexpr Index stream_steps(Index rows, Index stride) {
  if (rows > 12) return most_steps;
  return rows > 4 || stride < 64 * cache_line<Scalar> ? 16 : 8;
}

/// Whether rows so far apart, read side by side, end before the processor has foreseen them: what
/// few rows of A are multiplied with is then asked for a tile ahead.
template <class Scalar>
constexpr bool rows_are_short(Index stride) {
  return stride <= 16 * cache_line<Scalar>;
}

/// What is to be done with a tile of C when its sums are complete, if anything: called with (row,
/// rows, column, width).
using Finish = FunctionRef<void(Index, Index, Index, Index)>;

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
    Index packet = 0;
    for (Index s = 0; s < strips; ++s) {
      const Index count = (packets - packet + strips - s - 1) / (strips - s);
      const Index column = packet * size;
      f(panel + column, count, std::min(count * size, width - column));
      packet += count;
    }
  }
}

/// finish() for all rows, strip by strip.
template <class Scalar>
void finish_rows(Index rows, Index first_column, Index columns, Finish finish) {
  if (!finish) return;
  for_each_strip<Scalar>(first_column, columns, [&](Index column, Index, Index width) {
    finish(0, rows, column, width);
  });
}

/// Splits rows into as few tiles as possible, of even height, and calls f(row, count) for each.
template <class F>
void for_each_tile(Index rows, Index highest, F&& f) {
  const Index tiles = (rows + highest - 1) / highest;
  Index row = 0;
  for (Index t = 0; t < tiles; ++t) {
    const Index count = (rows - row + tiles - t - 1) / (tiles - t);
    f(row, count);
    row += count;
  }
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

/// Where the right operand of a strip starts, and what part of it there is.
struct Strip {
  Index k;
  Index depth;
  Index column;
  Index packets;
  Index width;
};

/// B as the right operand of nn, its rows running along the columns of C, or of nt, its rows running
/// along the depth and being transposed on the way.
template <class Scalar>
struct Right {
  ConstMatrixView<Scalar> b;
  bool transposed;

  const Scalar* at(Index k, Index column) const {
    return transposed ? b.data() + column * b.outerStride() + k
                      : b.data() + k * b.outerStride() + column;
  }
  Panel<Scalar> copy(const Strip& strip, Scalar* buffer) const {
    const Scalar* first = at(strip.k, strip.column);
    if (transposed) {
      return transpose_panel(
          GatheredRows<Scalar>(first, b.outerStride(), strip.width, strip.depth), buffer);
    }
    return copy_panel(GatheredRows<Scalar>(first, b.outerStride(), strip.depth, strip.width), buffer);
  }
  /// Where it lies, if whole tiles can read it there.
  const Scalar* in_place(const Strip& strip) const {
    const bool whole = !transposed && strip.width == tile_columns<Scalar>;
    return whole ? at(strip.k, strip.column) : nullptr;
  }
  /// What will be read of steps [first, first + count): rows of strip_lines each. Transposed, and
  /// with few tiles and more lines for each, it is not all of it.
  Ahead<Scalar> ahead(const Strip& strip, Index first, Index count) const {
    return {at(strip.k + first, strip.column), b.outerStride(), transposed ? strip.width : count};
  }
};

/// C[:, columns] = A·right: columns in groups whose part of C stays in the second-level cache, for
/// each group the depth in blocks, and of each block the strips of columns one after the other.
/// finish(row, rows, column, width) is called for each tile right after its last sum, the tile being
/// in the nearest cache still.
///
/// A strip's part of B is copied to a panel, by the first tile on the way where it can, and stays in
/// the first-level cache while the tiles of the strip are calculated. Meanwhile they ask for the
/// memory of the next strip, so memory and arithmetic are busy at the same time without any foresight
/// of the processor's own. A second panel, filled between the tiles, would push the first one out of
/// its cache.
template <class Scalar>
void multiply_rows(const GatheredRows<Scalar>& a, const Right<Scalar>& right, Index first_column,
                   Index columns, Start start, const Scalar* bias, const ScatteredRows<Scalar>& c,
                   Finish finish) {
  alignas(64) Scalar buffer[to_size(panel_depth * tile_columns<Scalar>)];
  const Index depth = a.width();
  const Index tiles = (a.count() + tile_rows - 1) / tile_rows;
  const bool first_is_full = (a.count() + tiles - 1) / tiles == tile_rows;

  const auto run = [&](const Strip& strip, const Strip* next) {
    const Start from = strip.k == 0 ? start : Start::accumulate;
    const Scalar* initial = from == Start::bias ? bias + strip.column : nullptr;
    const Scalar* in_place = first_is_full ? right.in_place(strip) : nullptr;
    const Panel<Scalar> panel = in_place != nullptr ? Panel<Scalar>{buffer, tile_columns<Scalar>}
                                                    : right.copy(strip, buffer);
    constexpr Index piece = strip_lines * cache_line<Scalar>;  // of a row in nt
    const Index pieces = next != nullptr ? (next->depth + piece - 1) / piece : 0;
    const Index each = (pieces + tiles - 1) / tiles * piece;
    Index asked = 0;
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
      Ahead<Scalar> ahead;
      if (next != nullptr && asked < next->depth) {
        ahead = right.ahead(*next, asked, std::min(each, next->depth - asked));
        asked += each;
      }
      if (first == 0 && in_place != nullptr) {
        multiply_tile<tile_rows, tile_packets, true>(left, {in_place, right.b.outerStride()},
                                                     strip.depth, from, initial, to, ahead, buffer);
      } else {
        multiply_tile(rows, strip.packets, strip.width, left, panel, strip.depth, from, initial, to,
                      ahead);
      }
      if (finish && strip.k + strip.depth >= depth) {
        finish(first, rows, strip.column, strip.width);
      }
    });
  };

  const Index panels = std::max<Index>(1, cached_elements<Scalar> / (a.count() * panel_columns<Scalar>));
  const Index group = panels * panel_columns<Scalar>;
  Strip strip{};
  bool pending = false;
  for (Index column = first_column; column < first_column + columns; column += group) {
    const Index width = std::min(group, first_column + columns - column);
    for (Index k = 0; k == 0 || k < depth; k += panel_depth) {
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

/// What multiply_stream() asks for when it reads a column: what is `distance` columns after it, and
/// where that is beyond column `last`, what is `beyond` further away still.
struct StreamAhead {
  Index distance = 0;
  Index last = 0;
  Index beyond = 0;
  Index at(Index column) const { return column + distance < last ? distance : distance + beyond; }
};

/// What multiply_stream() multiplies: `steps` rows, `stride` apart.
template <class Scalar>
struct Stream {
  const Scalar* data;
  Index stride;
  Index steps;
  StreamAhead ahead{};
  StreamAhead ahead_in_c{};  ///< of the rows of C, where those come from memory
};

/// One tile of multiply_stream(): R rows of C, V packets of columns.
template <Index R, Index V, class Scalar>
EIGEN_ALWAYS_INLINE void multiply_stream_tile(const Scalar* const (&left)[to_size(R)], Index step,
                                              const Stream<Scalar>& right, Index column,
                                              Start start, const Scalar* bias,
                                              Scalar* const (&c)[to_size(R)]) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index lines = (V * size + cache_line<Scalar> - 1) / cache_line<Scalar>;
  Packet<Scalar> sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) {
    const Index at = column + i % V * size;
    sum[i / V][i % V] = start == Start::accumulate ? load(c[i / V] + at)
                        : start == Start::bias     ? load(bias + at)
                                                   : broadcast(Scalar{0});
  }
  if (right.ahead_in_c.distance != 0) {
    const Index ahead = right.ahead_in_c.at(column);
    MOE_UNROLL
    for (Index r = 0; r < R; ++r) prefetch_far<lines>(c[r] + column + ahead);
  }
  const Index ahead = right.ahead.at(column);
  const Index stride = right.stride;
  const Index end = right.steps * step;
  const Scalar* b = right.data + column;
  for (Index at = 0; at < end; at += step, b += stride) {
    prefetch_far<lines>(b + ahead);
    add_products(left, at, b, sum);
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) store(c[i / V] + column + i % V * size, sum[i / V][i % V]);
}

/// R rows of C, the whole packets of `columns` of them, += left[r][k]·right[k, :], the rows of `right`
/// being read side by side from one end to the other. Returns how many columns that were.
template <Index R, class Scalar>
#if defined(__GNUC__)
[[gnu::noinline]]
#endif
Index multiply_stream(const Left<Scalar>& left, const Stream<Scalar>& right, Index columns,
                      Start start, const Scalar* bias, Scalar* const* c) {
  constexpr Index size = packet_size<Scalar>;
  const Scalar* a[to_size(R)];
  Scalar* out[to_size(R)];
  std::copy_n(left.row, R, a);
  std::copy_n(c, R, out);
  Index column = 0;
  for (; column + 3 * size <= columns; column += 3 * size) {
    multiply_stream_tile<R, 3>(a, left.step, right, column, start, bias, out);
  }
  if (column + 2 * size <= columns) {
    multiply_stream_tile<R, 2>(a, left.step, right, column, start, bias, out);
    column += 2 * size;
  } else if (column + size <= columns) {
    multiply_stream_tile<R, 1>(a, left.step, right, column, start, bias, out);
    column += size;
  }
  return column;
}

/// The same for rows from 1 to tile_rows and all of the columns: `rest` holds those of `right` that
/// are less than a packet.
template <class Scalar>
void multiply_stream(Index rows, const Left<Scalar>& left, const Stream<Scalar>& right,
                     Index columns, Panel<Scalar> rest, Start start, const Scalar* bias,
                     Scalar* const* c) {
  Index done = 0;
  with_constant<tile_rows>(
      rows, [&](auto R) { done = multiply_stream<R>(left, right, columns, start, bias, c); });
  if (done == columns) return;
  Scalar* to[to_size(tile_rows)];
  for (Index r = 0; r < rows; ++r) to[r] = c[r] + done;
  multiply_tile(rows, 1, columns - done, left, rest, right.steps, start,
                start == Start::bias ? bias + done : nullptr, to);
}

/// The form nn with B where it lies, in the order in which memory gives it fastest: some rows of it
/// side by side, from one end to the other. So the depth goes in steps, at each of which C is read and
/// written, in slices of columns that stay in the caches while all rows of A pass. The processor
/// foresees nothing beyond a page of memory, so the rows are asked for 32 KiB ahead, and at their
/// ends those that are read in the next steps in their places.
template <class Scalar>
void multiply_stream_nn(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b,
                        Index first_column, Index columns, Start start, const Scalar* bias,
                        const ScatteredRows<Scalar>& c, Finish finish) {
  constexpr Index size = packet_size<Scalar>;
  alignas(64) Scalar buffer[to_size(size * most_steps)];
  const Index depth = a.width();
  const Index stride = b.outerStride();
  const Index steps = stream_steps<Scalar>(a.count(), stride);
  const Index distance = (Index{32} << 10) / (steps * static_cast<Index>(sizeof(Scalar)));
  const Index slice = a.count() > tile_rows ? 2 * panel_columns<Scalar> : columns;
  const Index slices = std::max<Index>(1, cached_elements<Scalar> / (a.count() * slice));
  const Index end = first_column + columns;
  for (Index group = first_column; group < end; group += slices * slice) {
    const Index last = std::min(end, group + slices * slice);
    for (Index k = 0; k == 0 || k < depth; k += steps) {
      const Index count = std::min(steps, depth - k);
      const Start from = k == 0 ? start : Start::accumulate;
      const Index next = k + steps < depth ? steps * stride - (last - group)
                         : last < end      ? -k * stride
                                           : -distance;
      for (Index column = group; column < last; column += slice) {
        const Index width = std::min(slice, last - column);
        const Scalar* place = b.data() + k * stride + column;
        const Stream<Scalar> right{place, stride, count, {distance, last - column, next}};
        Panel<Scalar> rest{};
        if (width % size != 0) {
          const Index whole = width / size * size;
          rest =
              copy_panel(GatheredRows<Scalar>(place + whole, stride, count, width - whole), buffer);
        }
        for_each_tile(a.count(), tile_rows, [&](Index first, Index rows) {
          Left<Scalar> left;
          Scalar* to[to_size(tile_rows)];
          for (Index r = 0; r < rows; ++r) {
            left.row[r] = a.row(first + r) + k;
            to[r] = c.row(first + r) + column;
          }
          multiply_stream(rows, left, right, width, rest, from,
                          from == Start::bias ? bias + column : nullptr, to);
          if (!finish || k + steps < depth) return;
          for_each_strip<Scalar>(column, width, [&](Index at, Index, Index strip_width) {
            finish(first, rows, at, strip_width);
          });
        });
      }
    }
  }
}

/// C[:, columns] = A·B, from zero, from a bias (N values), or added to what C holds.
template <class Scalar>
void multiply_nn(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, Index first_column,
                 Index columns, Start start, const Scalar* bias, const ScatteredRows<Scalar>& c,
                 Finish finish = {}) {
  if (a.count() == 0) return;
  if constexpr (!streams) {
    if (a.count() > 2 * tile_rows) {
      const Right<Scalar> right{b, false};
      return multiply_rows(a, right, first_column, columns, start, bias, c, finish);
    }
  }
  multiply_stream_nn(a, b, first_column, columns, start, bias, c, finish);
}

/// The form nt for few rows: what runs along the packets is rows of A instead of rows of B, so that
/// B, which is by far the larger, is neither transposed nor copied.
template <class Scalar>
void multiply_few_nt(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, Index first_column,
                     Index columns, Start start, const ScatteredRows<Scalar>& c,
                     Finish finish) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index capacity = (Index{1} << 16) / static_cast<Index>(sizeof(Scalar));
  alignas(64) Scalar buffer[to_size(capacity)];
  const Index packets = (a.count() + size - 1) / size;
  const Index block_depth = capacity / (packets * size);
  const Index highest = packets == 1 ? max_tile_rows : tile_rows;
  const Index depth = a.width();
  const bool in_one_piece = b.outerStride() == depth && rows_are_short<Scalar>(depth);
  for (Index k = 0; k == 0 || k < depth; k += block_depth) {
    const Index count = std::min(block_depth, depth - k);
    const Panel<Scalar> right = transpose_panel(a.columns(k, count), buffer);
    const bool from_zero = k == 0 && start == Start::zero;
    for_each_tile(columns, highest, [&](Index first, Index rows) {
      Scalar tile[to_size(max_tile_rows * tile_columns<Scalar>)];
      Left<Scalar> left;
      Scalar* to[to_size(max_tile_rows)];
      for (Index r = 0; r < rows; ++r) {
        left.row[r] = b.data() + (first_column + first + r) * b.outerStride() + k;
        to[r] = tile + r * right.stride;
      }
      for (Index i = 0; i < a.count() && !from_zero; ++i) {
        const Scalar* held = c.row(i) + first_column + first;
        for (Index r = 0; r < rows; ++r) to[r][i] = held[r];
      }
      Ahead<Scalar> ahead;
      if (in_one_piece) {
        constexpr Index strip = strip_lines * cache_line<Scalar>;
        const Index next = std::min(rows, columns - first - rows);
        ahead = {left.row[0] + rows * depth, strip, next * depth / strip, 4};
      }
      const Start from = from_zero ? Start::zero : Start::accumulate;
      multiply_tile(rows, packets, packets * size, left, right, count, from,
                    static_cast<const Scalar*>(nullptr), to, ahead);
      for (Index i = 0; i < a.count(); ++i) {
        Scalar* result = c.row(i) + first_column + first;
        for (Index r = 0; r < rows; ++r) result[r] = to[r][i];
      }
    });
  }
  finish_rows<Scalar>(a.count(), first_column, columns, finish);
}

/// to(j)[i] = from(i)[j], a block of as many rows as a packet that a tile's rows fill has at a time.
template <class Scalar, class From, class To>
void transpose_rows(Index rows, Index columns, From from, To to) {
  using Whole = Packet<Scalar>;
  using Half = typename Eigen::internal::unpacket_traits<Whole>::half;
  using Fitting = std::conditional_t<(packet_size<Scalar> > tile_rows), Half, Whole>;
  constexpr Index size = Eigen::internal::unpacket_traits<Fitting>::size;
  using Block = Eigen::internal::PacketBlock<Fitting, static_cast<int>(size)>;
  const Index whole_rows = rows / size * size;
  const Index whole_columns = columns / size * size;
  for (Index i = 0; i < whole_rows; i += size) {
    for (Index j = 0; j < whole_columns; j += size) {
      Block block;
      for (Index x = 0; x < size; ++x) {
        block.packet[x] = Eigen::internal::ploadu<Fitting>(from(i + x) + j);
      }
      if constexpr (size > 1) Eigen::internal::ptranspose(block);
      for (Index x = 0; x < size; ++x) Eigen::internal::pstoreu(to(j + x) + i, block.packet[x]);
    }
  }
  for (Index i = 0; i < rows; ++i) {
    for (Index j = i < whole_rows ? whole_columns : 0; j < columns; ++j) to(j)[i] = from(i)[j];
  }
}

/// R rows of B, `stride` apart, times V packets of the columns of a panel, from zero or what is in
/// `tile` (R x V packets, tile_columns apart). The rows are asked for when what is `ahead` places
/// before them is read.
template <class P, Index R, Index V, class Scalar>
#if defined(__GNUC__)
[[gnu::noinline]]
#endif
void multiply_rows_tile(const Scalar* b, Index stride, Panel<Scalar> panel, Index depth,
                        bool from_zero, Index ahead, Scalar* tile) {
  using namespace Eigen::internal;
  constexpr Index size = unpacket_traits<P>::size;
  const Scalar* row[to_size(R)];
  MOE_UNROLL
  for (Index r = 0; r < R; ++r) row[r] = b + r * stride;
  P sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) {
    const Scalar* held = tile + i / V * tile_columns<Scalar> + i % V * size;
    sum[i / V][i % V] = from_zero ? pset1<P>(Scalar{0}) : ploadu<P>(held);
  }
  const Scalar* right = panel.data;
  for (Index k = 0; k < depth;) {
    if (ahead != 0) {
      MOE_UNROLL
      for (Index r = 0; r < R; ++r) prefetch_far<1>(row[r] + k + ahead);
    }
    const Index pause = std::min(depth, k + cache_line<Scalar>);
    for (; k < pause; ++k, right += panel.stride) {
      const P p0 = to_register(ploadu<P>(right));
      const P p1 = V > 1 ? to_register(ploadu<P>(right + size)) : p0;
      const P p2 = V > 2 ? to_register(ploadu<P>(right + 2 * size)) : p0;
      MOE_UNROLL
      for (Index r = 0; r < R; ++r) {
        const P value = pset1<P>(row[r][k]);
        sum[r][0] = pmadd(value, p0, sum[r][0]);
        if constexpr (V > 1) sum[r][1] = pmadd(value, p1, sum[r][1]);
        if constexpr (V > 2) sum[r][2] = pmadd(value, p2, sum[r][2]);
      }
    }
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) {
    pstoreu(tile + i / V * tile_columns<Scalar> + i % V * size, sum[i / V][i % V]);
  }
}

/// The form nt with B where it lies, a tile's rows of it side by side. What runs along the packets is
/// rows of A, copied as columns; where half a packet or less of them is left, a packet half as wide,
/// of which the processor can do two at once.
template <class Scalar>
void multiply_stream_nt(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b,
                        Index first_column, Index columns, Start start,
                        const ScatteredRows<Scalar>& c, Finish finish) {
  using Whole = Packet<Scalar>;
  using Half = typename Eigen::internal::unpacket_traits<Whole>::half;
  constexpr Index size = packet_size<Scalar>;
  constexpr Index half = Eigen::internal::unpacket_traits<Half>::size;
  constexpr Index capacity = (Index{256} << 10) / static_cast<Index>(sizeof(Scalar));
  alignas(64) Scalar buffer[to_size(capacity)];
  alignas(64) Scalar tile[to_size(tile_rows * tile_columns<Scalar>)] = {};
  const Index rows = a.count();
  const Index left_over = rows % size;
  const bool ends_in_half = left_over > 0 && left_over <= half;
  const Index packets = rows / size + (left_over > half ? 1 : 0);
  const Index width = packets * size + (ends_in_half ? half : 0);
  const Index block = std::min<Index>(1024, capacity / width);
  const Index depth = a.width();
  const Index stride = b.outerStride();

  const auto multiply = [&](Index k, Index count, Index column, Index height) {
    const Scalar* place = b.data() + column * stride + k;
    const bool from_zero = k == 0 && start == Start::zero;
    // One tile of rows [first, first + reach), which are `parts` whole packets, or half a one.
    const auto run = [&](Index first, Index parts, Index reach) {
      const Panel<Scalar> panel{buffer + first, width};
      const auto in_tile = [&](Index r) { return tile + r * tile_columns<Scalar>; };
      const auto in_c = [&](Index i) { return c.row(first + i) + column; };
      if (!from_zero) transpose_rows<Scalar>(reach, height, in_c, in_tile);
      const Index ahead = first == 0 ? tile_rows * stride : 0;
      if (height < tile_rows) {
        Left<Scalar> left;
        Scalar* to[to_size(tile_rows)];
        for (Index r = 0; r < height; ++r) {
          left.row[r] = place + r * stride;
          to[r] = in_tile(r);
        }
        const Index used = parts > 0 ? parts * size : half;
        multiply_tile(height, std::max<Index>(1, parts), used, left, panel, count,
                      from_zero ? Start::zero : Start::accumulate,
                      static_cast<const Scalar*>(nullptr), to);
      } else if (parts == 0) {
        multiply_rows_tile<Half, tile_rows, 1>(place, stride, panel, count, from_zero, ahead, tile);
      } else {
        with_constant<tile_packets>(parts, [&](auto V) {
          multiply_rows_tile<Whole, tile_rows, V>(place, stride, panel, count, from_zero, ahead,
                                                  tile);
        });
      }
      transpose_rows<Scalar>(height, reach, in_tile, in_c);
    };
    for_each_tile(packets, tile_packets, [&](Index first, Index parts) {
      run(first * size, parts, std::min(parts * size, rows - first * size));
    });
    if (ends_in_half) run(packets * size, 0, left_over);
  };

  const Index end = first_column + columns;
  for (Index k = 0; k == 0 || k < depth; k += block) {
    const Index count = std::min(block, depth - k);
    copy_transposed(a.columns(k, count), width, buffer);
    for (Index group = first_column; group < end; group += panel_columns<Scalar>) {
      const Index last = std::min(end, group + panel_columns<Scalar>);
      for (Index column = group; column < last; column += tile_rows) {
        multiply(k, count, column, std::min(tile_rows, last - column));
      }
      if (!finish || k + block < depth) continue;
      for_each_tile(rows, tile_rows, [&](Index first, Index height) {
        for_each_strip<Scalar>(group, last - group, [&](Index column, Index, Index strip_width) {
          finish(first, height, column, strip_width);
        });
      });
    }
  }
}

/// C[:, columns] = A·Bᵀ, from zero or added to what C holds.
template <class Scalar>
void multiply_nt(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, Index first_column,
                 Index columns, Start start, const ScatteredRows<Scalar>& c,
                 Finish finish = {}) {
  if (a.count() == 0) return;
  if constexpr (streams) {
    // With more rows their columns would be copied in too many short pieces.
    for_each_tile(a.count(), 160, [&](Index first, Index rows) {
      const auto shifted = [&](Index row, Index height, Index column, Index width) {
        finish(first + row, height, column, width);
      };
      multiply_stream_nt(a.slice(first, rows), b, first_column, columns, start,
                         c.slice(first, rows), finish ? Finish(shifted) : Finish());
    });
  } else if (a.count() <= 2 * packet_size<Scalar>) {
    multiply_few_nt(a, b, first_column, columns, start, c, finish);
  } else {
    const Scalar* no_bias = nullptr;
    multiply_rows(a, Right<Scalar>{b, true}, first_column, columns, start, no_bias, c, finish);
  }
}

/// The form tn in the order in which memory gives and takes C fastest: some rows of it are read and
/// written from one end to the other, and asked for ahead as multiply_stream_nn does with B. What is
/// added to them, at most stream_pairs at once, stays in the second-level cache, with 16 registers in
/// the first.
template <class Scalar>
void multiply_stream_tn(const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b,
                        Index first_row, Index rows, Index first_column, Index columns, Start start,
                        MatrixView<Scalar> c) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index capacity = (Index{streams ? 256 : 16} << 10) / static_cast<Index>(sizeof(Scalar));
  constexpr Index distance = (Index{32} << 10) / static_cast<Index>(tile_rows * sizeof(Scalar));
  alignas(64) Scalar buffer[to_size(capacity)];
  alignas(64) Scalar values[to_size(stream_pairs * tile_rows)];  // a step's are neighbours
  const Index end = first_column + columns;
  for (Index row = first_row; row < first_row + rows && a.count() == 0; ++row) {
    if (start == Start::zero) std::fill_n(row_data(c, row) + first_column, columns, Scalar{0});
  }
  for_each_tile(a.count(), stream_pairs, [&](Index k, Index pairs) {
    const Start from = k == 0 ? start : Start::accumulate;
    const Index slice = capacity / pairs / size * size;
    for (Index column = first_column; column < end; column += slice) {
      const Index width = std::min(slice, end - column);
      const Index whole = width / size * size;
      const Index stride = (width + size - 1) / size * size;
      copy_panel(b.slice(k, pairs).columns(column, width), buffer);
      Stream<Scalar> right{buffer, stride, pairs};
      right.ahead_in_c = {distance, width, tile_rows * c.outerStride() - width};
      for_each_tile(rows, tile_rows, [&](Index first, Index count) {
        Left<Scalar> left;
        Scalar* to[to_size(tile_rows)];
        const Index row = first_row + first;
        left.step = tile_rows;
        for (Index r = 0; r < count; ++r) {
          left.row[r] = values + r;
          to[r] = row_data(c, row + r) + column;
        }
        for (Index i = 0; i < pairs; ++i) {
          const Scalar* held = a.row(k + i) + row;
          Scalar* value = values + i * tile_rows;
          if (count == tile_rows) {  // nearly always, and then a constant
            std::copy_n(held, tile_rows, value);
          } else {
            std::copy_n(held, count, value);
          }
        }
        const Scalar* no_bias = nullptr;
        multiply_stream(count, left, right, width, {buffer + whole, stride}, from, no_bias, to);
      });
    }
  });
}

/// The form tn adds at most so many pairs of rows at once, to so many rows of C.
inline constexpr Index pairs_depth = 128;
inline constexpr Index pairs_rows = 128;
/// A strip goes through so many rows of C before the next one: more would not stay in the caches
/// where rows are a power of two apart.
inline constexpr Index pairs_group = 16;

/// The form tn for many pairs of rows: columns of A and strips of B are copied together, and stay in
/// the second-level cache with the part of C that they add to.
template <class Scalar>
void multiply_panels_tn(const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b,
                        Index first_row, Index rows, Index first_column, Index columns, Start start,
                        MatrixView<Scalar> c) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index wide = 2 * panel_columns<Scalar>;
  static_assert(pairs_rows % tile_rows == 0);
  alignas(64) Scalar left_columns[to_size(pairs_depth * pairs_rows)];
  alignas(64) Scalar panels[to_size(pairs_depth * wide)];

  // The values that a tile takes from a row of A are neighbours.
  const auto copy_left = [&](Index k, Index depth, Index row, Index height) {
    for (Index i = 0; i < depth; ++i) {
      const Scalar* from = a.row(k + i) + row;
      Scalar* to = left_columns + i * tile_rows;
      Index r = 0;
      for (; r + tile_rows <= height; r += tile_rows) {
        std::copy_n(from + r, tile_rows, to + r * depth);
      }
      if (r < height) std::copy_n(from + r, height - r, to + r * depth);
    }
  };
  const auto copy_right = [&](Index k, Index depth, Index column, Index width) {
    for_each_strip<Scalar>(0, width, [&](Index at, Index, Index strip_width) {
      copy_panel(b.slice(k, depth).columns(column + at, strip_width), panels + at * depth);
    });
  };

  const Index last = first_row + rows;
  for_each_tile(a.count(), pairs_depth, [&](Index k, Index depth) {
    const Start from = k == 0 ? start : Start::accumulate;
    for (Index row = first_row; row < last; row += pairs_rows) {
      const Index height = std::min(pairs_rows, last - row);
      copy_left(k, depth, row, height);
      for (Index column = first_column; column < first_column + columns; column += wide) {
        const Index width = std::min(wide, first_column + columns - column);
        copy_right(k, depth, column, width);
        for (Index group = 0; group < height; group += pairs_group) {
          for_each_strip<Scalar>(0, width, [&](Index at, Index packets, Index strip_width) {
            const Panel<Scalar> panel{panels + at * depth, packets * size};
            const Index end = std::min(height, group + pairs_group);
            for (Index top = group; top < end; top += tile_rows) {
              const Index count = std::min(tile_rows, end - top);
              Left<Scalar> left;
              Scalar* to[to_size(tile_rows)];
              left.step = tile_rows;
              for (Index r = 0; r < count; ++r) {
                left.row[r] = left_columns + top * depth + r;
                to[r] = row_data(c, row + top + r) + column + at;
              }
              // The same columns of the next group, which are far away in memory.
              const Index below = std::clamp<Index>(last - row - top - pairs_group, 0, tile_rows);
              const Ahead<Scalar> ahead{to[0] + pairs_group * c.outerStride(), c.outerStride(),
                                        below};
              multiply_tile(count, packets, strip_width, left, panel, depth, from,
                            static_cast<const Scalar*>(nullptr), to, ahead);
            }
          });
        }
      }
    }
  });
}

/// Rows [first_row, first_row + rows) and some columns of C = Aᵀ·B, from zero or added to what C
/// holds, the rows of A and B going in pairs.
template <class Scalar>
void multiply_tn(const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b, Index first_row,
                 Index rows, Index first_column, Index columns, Start start, MatrixView<Scalar> c) {
  if constexpr (!streams) {
    if (a.count() > stream_pairs) {
      return multiply_panels_tn(a, b, first_row, rows, first_column, columns, start, c);
    }
  }
  multiply_stream_tn(a, b, first_row, rows, first_column, columns, start, c);
}

/// Splits C into blocks and calls f(first_row, rows, first_column, columns) for each, over the
/// workers. Small products stay on one worker, since waking another takes some microseconds.
inline void for_each_block(Index rows, Index columns, Index depth, Index block_columns,
                           FunctionRef<void(Index, Index, Index, Index)> f) {
  constexpr Index worth_waking = Index{1} << 18;  // multiply-adds
  const Index wanted = rows * columns * depth >= worth_waking ? 4 * worker_count() : 1;
  const Index column_blocks = (columns + block_columns - 1) / block_columns;
  // High blocks copy panels less often, but there should be some for every worker.
  Index block_rows = task_rows;
  while (block_rows > 64 && (rows + block_rows - 1) / block_rows * column_blocks < wanted) {
    block_rows /= 2;
  }
  const Index row_blocks = (rows + block_rows - 1) / block_rows;
  const auto run = [&](Index task, Index) {
    const Index row = task / column_blocks * block_rows;
    const Index column = task % column_blocks * block_columns;
    f(row, std::min(block_rows, rows - row), column, std::min(block_columns, columns - column));
  };
  const Index tasks = row_blocks * column_blocks;
  if (wanted > 1) {
    parallel_for(tasks, run);
  } else {
    for (Index task = 0; task < tasks; ++task) run(task, 0);
  }
}

/// C = A·B, from zero, from a bias (N values), or added to what C holds.
template <class Scalar>
void product_nn(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, MatrixView<Scalar> c,
                Start start = Start::zero, const Scalar* bias = nullptr) {
  MOE_ASSERT(a.width() == b.rows() && c.rows() == a.count() && c.cols() == b.cols());
  MOE_ASSERT(start == Start::bias || bias == nullptr);
  for_each_block(c.rows(), c.cols(), a.width(), 2 * panel_columns<Scalar>,
                 [&](Index row, Index rows, Index column, Index columns) {
                   multiply_nn(a.slice(row, rows), b, column, columns, start, bias,
                               ScatteredRows<Scalar>(c).slice(row, rows));
                 });
}

/// C = A·Bᵀ, or added to what C holds.
template <class Scalar>
void product_nt(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, MatrixView<Scalar> c,
                Start start = Start::zero) {
  MOE_ASSERT(a.width() == b.cols() && c.rows() == a.count() && c.cols() == b.rows());
  MOE_ASSERT(start != Start::bias);
  for_each_block(c.rows(), c.cols(), a.width(), panel_columns<Scalar>,
                 [&](Index row, Index rows, Index column, Index columns) {
                   multiply_nt(a.slice(row, rows), b, column, columns, start,
                               ScatteredRows<Scalar>(c).slice(row, rows));
                 });
}

/// C = Aᵀ·B, from zero or added to what C holds, the rows of A and B going in pairs.
template <class Scalar>
void product_tn(const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b, MatrixView<Scalar> c,
                Start start = Start::accumulate) {
  MOE_ASSERT(a.count() == b.count() && c.rows() == a.width() && c.cols() == b.width());
  MOE_ASSERT(start != Start::bias);
  for_each_block(c.rows(), c.cols(), a.count(), 2 * panel_columns<Scalar>,
                 [&](Index row, Index rows, Index column, Index columns) {
                   multiply_tn(a, b, row, rows, column, columns, start, c);
                 });
}

}  // namespace moe::detail

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
