#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "moe/kernels/blocks.hpp"

/// \file
/// Products that read their large operand where it lies, in the order in which memory gives it
/// fastest: for few rows on any processor, for all on one with 32 registers.

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace moe::detail {

/// How many pairs of rows multiply_stream_tn adds at once, at most.
inline constexpr Index stream_pairs = streams ? 128 : 8;

inline constexpr Index most_steps = 128;
/// How many rows of B, `stride` apart and `depth` in all, multiply_stream_nn reads side by side for
/// so many rows of A. Where memory limits, eight are as many streams as the processor follows well;
/// twice as many for one row of A, with 32 registers two, where B's are shorter than a page of
/// memory. Where a tile is high enough that arithmetic limits, more, since C is read and written
/// less often then; for up to 12 rows not so many that they were all of B at once, which would
/// leave nothing to ask for.
template <class Scalar>
constexpr Index stream_steps(Index rows, Index depth, Index stride) {
  constexpr Index many = 96;
  if (rows > 64) return most_steps;
  if (streams && rows > 5 && (rows > 12 || depth > many)) return many;
  const bool short_rows = stride < 64 * cache_line<Scalar>;
  return rows > 5 || (rows <= (streams ? 2 : 1) && short_rows) ? 16 : 8;
}

/// Whether rows so far apart, read side by side, end before the processor has foreseen them: what
/// few rows of A are multiplied with is then asked for a tile ahead.
template <class Scalar>
constexpr bool rows_are_short(Index stride) {
  return stride <= 16 * cache_line<Scalar>;
}

/// What multiply_stream() asks for when it reads a column: what is `distance` columns after it, and
/// where that is beyond column `last`, what is `beyond` further away still.
struct StreamAhead {
  Index distance = 0;
  Index last = 0;
  Index beyond = 0;
  Index at(Index column) const { return column + distance < last ? distance : distance + beyond; }
};

/// A distance of at least `distance` at which, of `width` columns, the first that is beyond the end
/// is the first of a row: a tile that asked for the end of one row and the start of the next would
/// get only one of them.
template <class Scalar>
constexpr Index distance_by_tiles(Index distance, Index width) {
  return distance < width ? distance + (width - distance) % tile_columns<Scalar> : distance;
}

/// How far it is from one place to another that may be in another matrix.
template <class Scalar>
Index distance_between(const Scalar* from, const Scalar* to) {
  const auto bytes = reinterpret_cast<std::intptr_t>(to) - reinterpret_cast<std::intptr_t>(from);
  return bytes / static_cast<std::intptr_t>(sizeof(Scalar));
}

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
                                              Start start, const Bias<Scalar>& bias,
                                              Scalar* const (&c)[to_size(R)]) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index lines = (V * size + cache_line<Scalar> - 1) / cache_line<Scalar>;
  Packet<Scalar> sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) {
    const Index at = column + i % V * size;
    sum[i / V][i % V] = start == Start::accumulate ? load(c[i / V] + at) : broadcast(Scalar{0});
  }
  add_bias(bias.at(0, column), sum);
  if (right.ahead_in_c.distance != 0) {
    const Index ahead = right.ahead_in_c.at(column);
    MOE_UNROLL
    for (Index r = 0; r < R; ++r) prefetch_far<lines>(c[r] + column, ahead);
  }
  const Index ahead = right.ahead.at(column);
  const Index stride = right.stride;
  const Index end = right.steps * step;
  const Scalar* b = right.data + column;
  for (Index at = 0; at < end; at += step, b += stride) {
    prefetch_far<lines>(b, ahead);
    add_products(left, at, b, sum);
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) store(c[i / V] + column + i % V * size, sum[i / V][i % V]);
}

/// R rows of C, the whole packets of `columns` of them, += left[r][k]·right[k, :], the rows of
/// `right` being read side by side from one end to the other. Returns how many columns that were.
template <Index R, class Scalar>
MOE_NOINLINE Index multiply_stream(const Left<Scalar>& left, const Stream<Scalar>& right,
                                   Index columns, Start start, const Bias<Scalar>& bias,
                                   Scalar* const* c) {
  constexpr Index size = packet_size<Scalar>;
  const Scalar* a[to_size(R)];
  Scalar* out[to_size(R)];
  std::copy_n(left.row, R, a);
  std::copy_n(c, R, out);
  Index column = 0;
  for (; column + 3 * size <= columns; column += 3 * size) {
    multiply_stream_tile<R, 3>(a, left.step, right, column, start, bias, out);
  }
  // Two packets at once would be little faster, and half as much again to compile.
  for (; column + size <= columns; column += size) {
    multiply_stream_tile<R, 1>(a, left.step, right, column, start, bias, out);
  }
  return column;
}

/// Columns of C that are less than a packet. `right` has half a packet of them or a whole one, with
/// any values beyond `width`. What is no whole tile is computed beside C, its last row standing for
/// those that are not there, since the tile is compiled in one height only.
template <class Scalar>
void multiply_rest(Index rows, const Left<Scalar>& left, Panel<Scalar> right, Index depth,
                   Index width, Start start, const Bias<Scalar>& bias, Scalar* const* c) {
  constexpr Index half = half_packet_size<Scalar>;
  const auto run = [&](const Left<Scalar>& a, Start from, const Bias<Scalar>& initial,
                       Scalar* const* to) {
    if (width <= half) {
      multiply_tile<HalfPacket<Scalar>, tile_rows, 1>(a, right, depth, from, initial, to, {});
    } else {
      multiply_tile<Packet<Scalar>, tile_rows, 1>(a, right, depth, from, initial, to, {});
    }
  };
  if (rows == tile_rows && width == half) return run(left, start, bias, c);

  Left<Scalar> a;
  a.step = left.step;
  for (Index r = 0; r < tile_rows; ++r) a.row[r] = left.row[std::min(r, rows - 1)];
  compute_beside(rows, width, start, bias, c,
                 [&](Scalar* const* to) { run(a, Start::accumulate, {}, to); });
}

/// multiply_stream<R>() for rows from 1 to stream_rows known at run time, and for all of the
/// columns: `rest` holds those of `right` that are less than a packet, which more than tile_rows
/// must not have.
template <class Scalar>
void multiply_stream(Index rows, const Left<Scalar>& left, const Stream<Scalar>& right,
                     Index columns, Panel<Scalar> rest, Start start, const Bias<Scalar>& bias,
                     Scalar* const* c) {
  Index done = 0;
  with_constant<stream_rows>(
      rows, [&](auto R) { done = multiply_stream<R>(left, right, columns, start, bias, c); });
  if (done == columns) return;
  MOE_ASSERT(rows <= tile_rows);
  Scalar* to[to_size(tile_rows)];
  for (Index r = 0; r < rows; ++r) to[r] = c[r] + done;
  multiply_rest(rows, left, rest, right.steps, columns - done, start, bias.at(0, done), to);
}

/// How many rows of A multiply_in_order() is for, at most: until more rows of B side by side, and
/// so fewer passes over C, are worth more than the order.
inline constexpr Index rows_in_order = streams ? 5 : 3;
/// How many packets its tiles have: few enough for the registers, and mostly a row is some of them.
inline constexpr Index packets_in_order = streams ? 4 : 2;

/// Where multiply_in_order() begins to ask, some `block` of elements of B at a time: about so many
/// elements ahead, and so that it comes to the end of B just when a block does.
constexpr Index first_asked(Index block, Index end, Index ahead) {
  return std::min(end, block + ahead / block * block + end % block);
}

/// One tile of multiply_in_order(): R rows of C += `steps` rows of B. What is `further` elements
/// after `ahead` is asked for, and what follows it.
template <Index R, class Scalar>
EIGEN_ALWAYS_INLINE void multiply_in_order_tile(const Scalar* const (&left)[to_size(R)],
                                                const Scalar* b, Index stride, Index steps,
                                                const Scalar* ahead, Index further, Index column,
                                                Scalar* const (&c)[to_size(R)]) {
  constexpr Index V = packets_in_order;
  constexpr Index size = packet_size<Scalar>;
  // With packets of a line the processor foresees most of what one row is multiplied with, and what
  // is asked for besides would take the places in which it waits for memory.
  constexpr Index lines =
      streams && R == 1 ? 1 : (V * size + cache_line<Scalar> - 1) / cache_line<Scalar>;
  Packet<Scalar> sum[to_size(R)][to_size(V)];
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) sum[i / V][i % V] = load(c[i / V] + column + i % V * size);
  b += column;
  for (Index k = 0; k < steps; ++k, b += stride, further += V * size) {
    prefetch_far<lines>(ahead, further);
    add_products(left, k, b, sum);
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) store(c[i / V] + column + i % V * size, sum[i / V][i % V]);
}

/// R rows of C += a[r][k]·b[k, :], where the rows of B are whole tiles and follow each other, so
/// that all of it is read and asked for in the order in which it lies, and behind it what `next_b`
/// begins with. Only so many rows of B are side by side as it takes for C, in the nearest cache, to
/// cost less time than memory.
template <Index R, class Scalar>
MOE_NOINLINE void multiply_in_order(const Scalar* const* a, const MatrixOperand<Scalar>& b,
                                    Scalar* const* c, const Scalar* next_b) {
  constexpr Index width = packets_in_order * packet_size<Scalar>;
  constexpr Index side_by_side = R <= 2 ? 1 : R <= 4 ? 2 : 4;
  constexpr Index ahead = (Index{8} << 10) / static_cast<Index>(sizeof(Scalar));
  const Scalar* row[to_size(R)];
  Scalar* out[to_size(R)];
  std::copy_n(a, R, row);
  std::copy_n(c, R, out);
  const Index columns = b.columns;
  const Index block = side_by_side * columns;
  const Index end = b.rows * columns;
  Index asked = first_asked(block, end, ahead);
  for (Index at = 0; at < end; at += block, asked += block) {
    const Index steps = side_by_side == 1 ? 1 : std::min(side_by_side, (end - at) / columns);
    const Scalar* place = b.data + at;
    const bool is_in_next = asked >= end && next_b != nullptr;
    const Scalar* from = is_in_next ? next_b : place;
    // If nothing is left to ask for, it is what is read anyway.
    Index further = is_in_next ? asked - end : asked < end ? asked - at : 0;
    for (Index column = 0; column < columns; column += width) {
      multiply_in_order_tile<R>(row, place, columns, steps, from, further, column, out);
      further += steps * width;
    }
    for (const Scalar*& r : row) r += steps;
  }
}

/// Whether multiply_in_order() is for so many rows of A and so many columns, all those of B, whose
/// rows are `stride` apart: few rows, and short ones of B that are whole tiles. Of those longer
/// than a page of memory, eight side by side are as fast in large pages, and faster in small ones.
template <class Scalar>
constexpr bool is_in_order(Index rows, Index columns, Index stride) {
  return rows <= rows_in_order && columns == stride && columns > 0 &&
         columns % (packets_in_order * packet_size<Scalar>) == 0 &&
         stride <= 64 * cache_line<Scalar>;
}

/// multiply_in_order<R>() for a number of rows known at run time, from what C starts at.
template <class Scalar>
void multiply_in_order(const GemmNN<Scalar>& product) {
  const MatrixOperand<Scalar>& b = product.b;
  const Bias<Scalar>& bias = product.bias;
  const Scalar* from[to_size(rows_in_order)];
  Scalar* to[to_size(rows_in_order)];
  for (Index r = 0; r < product.a.count(); ++r) {
    from[r] = product.a.row(r);
    to[r] = product.c.row(r);
    if (product.start == Start::zero) std::fill_n(to[r], b.columns, Scalar{0});
    if (bias.values != nullptr) add_scaled(b.columns, *bias.factors.at(r), bias.values, to[r]);
  }
  with_constant<rows_in_order>(
      product.a.count(), [&](auto R) { multiply_in_order<R>(from, b, to, product.prefetch_next); });
}

/// The form nn with B where it lies, in the order in which memory gives it fastest: with few rows,
/// and short ones of B, one after the other; else some side by side, from one end to the other.
/// Then the depth goes in steps, at each of which C is read and written, in slices of columns that
/// stay in the caches while all rows of A pass. The processor foresees nothing beyond a page of
/// memory, so the rows are asked for 32 KiB ahead, and at their ends those that are read in the
/// next steps in their places, the last of which may be in `next_b`.
template <class Scalar>
void multiply_stream_nn(const GemmNN<Scalar>& product) {
  constexpr Index size = packet_size<Scalar>;
  alignas(64) Scalar buffer[to_size(size * most_steps)];
  const GatheredRows<Scalar>& a = product.a;
  const MatrixOperand<Scalar>& b = product.b;
  const ScatteredRows<Scalar>& c = product.c;
  const Epilogue epilogue = product.epilogue;
  const Scalar* next_b = product.prefetch_next;
  const Range columns = product.column_range();
  const Index depth = a.width();
  const Index stride = b.stride;
  if (columns.count == b.columns && is_in_order<Scalar>(a.count(), b.columns, stride)) {
    multiply_in_order(product);
    return call_epilogue<Scalar>(epilogue, a.count(), columns);
  }
  const Index steps = stream_steps<Scalar>(a.count(), depth, stride);
  const Index to_next = distance_between(b.data, next_b);
  constexpr Index ahead = (Index{32} << 10) / static_cast<Index>(sizeof(Scalar));
  // The last columns, if they are less than a packet, have lower tiles.
  const Index tallest = columns.count % size == 0 ? stream_rows : tile_rows;
  const Index slice = a.count() > tallest ? 2 * panel_columns<Scalar> : columns.count;
  const Index slices = std::max<Index>(1, cached_elements<Scalar> / (a.count() * slice));
  const Index end = columns.first + columns.count;
  for (Index group = columns.first; group < end; group += slices * slice) {
    const Index last = std::min(end, group + slices * slice);
    const Index distance = distance_by_tiles<Scalar>(ahead / steps, last - group);
    for (Index k = 0; k == 0 || k < depth; k += steps) {
      const Index count = std::min(steps, depth - k);
      const Start from = k == 0 ? product.start : Start::accumulate;
      const Index next = k + steps < depth   ? steps * stride - (last - group)
                         : last < end        ? -k * stride
                         : next_b != nullptr ? to_next - k * stride - (last - columns.first)
                                             : -distance;
      for (Index column = group; column < last; column += slice) {
        const Index width = std::min(slice, last - column);
        const Scalar* place = b.data + k * stride + column;
        Stream<Scalar> right{place, stride, count, {distance, last - column, next}};
        Panel<Scalar> rest{};
        if (const Index over = width % size; over == half_packet_size<Scalar>) {
          rest = {place + width - over, stride};
        } else if (over != 0) {
          rest =
              copy_panel(GatheredRows<Scalar>(place + width - over, stride, count, over), buffer);
        }
        const auto multiply = [&](Index first, Index rows) {
          Left<Scalar> left;
          Scalar* to[to_size(stream_rows)];
          for (Index r = 0; r < rows; ++r) {
            left.row[r] = a.row(first + r) + k;
            to[r] = c.row(first + r) + column;
          }
          // Only the first steps find C in memory, and only rows without a list can be foreseen.
          const bool asks = k == 0 && first + rows < a.count();
          right.ahead_in_c = {asks ? rows * c.step() : 0, std::numeric_limits<Index>::max()};
          multiply_stream(rows, left, right, width, rest, from,
                          k == 0 ? product.bias.at(first, column) : Bias<Scalar>{}, to);
          if (!epilogue || k + steps < depth) return;
          for_each_strip<Scalar>(column, width, [&](Index at, Index, Index strip_width) {
            epilogue(first, rows, at, strip_width);
          });
        };
        // The first tile waits for memory, so it is as high as can be.
        const Index highest = a.count() <= tallest ? a.count() : tile_rows;
        multiply(0, highest);
        for_each_tile(a.count() - highest, tile_rows,
                      [&](Index first, Index rows) { multiply(highest + first, rows); });
      }
    }
  }
}

/// The form nt for few rows: what runs along the packets is rows of A instead of rows of B, so that
/// B, which is by far the larger, is neither transposed nor copied. In a tile that is not full its
/// last row stands for those that are not there, since tiles are compiled in one height.
template <class Scalar>
void multiply_few_nt(const GemmNT<Scalar>& product) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index capacity = (Index{1} << 16) / static_cast<Index>(sizeof(Scalar));
  alignas(64) Scalar buffer[to_size(capacity)];
  const GatheredRows<Scalar>& a = product.a;
  const MatrixOperand<Scalar>& b = product.b;
  const ScatteredRows<Scalar>& c = product.c;
  const Range columns = product.column_range();
  const Index packets = (a.count() + size - 1) / size;
  MOE_ASSERT(packets <= 2);
  const Index block_depth = capacity / (packets * size);
  const Index highest = packets == 1 ? max_tile_rows : tile_rows;
  const Index depth = a.width();
  const bool in_one_piece = b.stride == depth && rows_are_short<Scalar>(depth);
  for (Index k = 0; k == 0 || k < depth; k += block_depth) {
    const Index count = std::min(block_depth, depth - k);
    const Panel<Scalar> right = transpose_panel(a.columns(k, count), buffer);
    const bool from_zero = k == 0 && product.start == Start::zero;
    for_each_tile(columns.count, highest, [&](Index first, Index rows) {
      Scalar tile[to_size(max_tile_rows * tile_columns<Scalar>)];
      Left<Scalar> left;
      Scalar* to[to_size(max_tile_rows)];
      for (Index r = 0; r < highest; ++r) {
        const Index row = std::min(r, rows - 1);
        left.row[r] = b.row(columns.first + first + row) + k;
        to[r] = tile + row * right.stride;
      }
      for (Index i = 0; i < a.count() && !from_zero; ++i) {
        const Scalar* held = c.row(i) + columns.first + first;
        for (Index r = 0; r < rows; ++r) to[r][i] = held[r];
      }
      Ahead<Scalar> ahead;
      if (in_one_piece) {
        constexpr Index strip = strip_lines * cache_line<Scalar>;
        const Index next = std::min(rows, columns.count - first - rows);
        ahead = {left.row[0] + rows * depth, strip, next * depth / strip, 4};
      }
      const Start from = from_zero ? Start::zero : Start::accumulate;
      const Bias<Scalar> no_bias;
      if (packets == 1) {
        multiply_tile<Packet<Scalar>, max_tile_rows, 1>(left, right, count, from, no_bias, to,
                                                        ahead);
      } else {
        multiply_tile<Packet<Scalar>, tile_rows, 2>(left, right, count, from, no_bias, to, ahead);
      }
      for (Index i = 0; i < a.count(); ++i) {
        Scalar* result = c.row(i) + columns.first + first;
        for (Index r = 0; r < rows; ++r) result[r] = to[r][i];
      }
    });
  }
  call_epilogue<Scalar>(product.epilogue, a.count(), columns);
}

/// Rows as columns: to[j][i] = from[i][j], a block of as many rows as a packet that a tile's rows
/// fill has at a time.
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

/// R rows of B, `stride` apart, times V packets of the columns of a panel, from zero or what is in
/// `tile` (R x V packets, tile_columns apart). If there are only `height` rows, the last stands for
/// the others. The rows are asked for when what is `ahead` places before them is read.
template <class P, Index R, Index V, class Scalar>
MOE_NOINLINE void multiply_rows_tile(const Scalar* b, Index stride, Index height,
                                     Panel<Scalar> panel, Index depth, bool from_zero, Index ahead,
                                     Scalar* tile) {
  using namespace Eigen::internal;
  constexpr Index size = unpacket_traits<P>::size;
  const Scalar* row[to_size(R)];
  MOE_UNROLL
  for (Index r = 0; r < R; ++r) row[r] = b + std::min(r, height - 1) * stride;
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
      for (Index r = 0; r < R; ++r) prefetch_far<1>(row[r] + k, ahead);
    }
    const Index pause = std::min(depth, k + cache_line<Scalar>);
    for (; k < pause; ++k, right += panel.stride) add_products(row, k, right, sum);
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) {
    pstoreu(tile + i / V * tile_columns<Scalar> + i % V * size, sum[i / V][i % V]);
  }
}

/// The form nt with B where it lies, a tile's rows of it side by side. What runs along the packets
/// is rows of A, copied as columns; where half a packet or less of them is left, a packet half as
/// wide, of which the processor can do two at once.
template <class Scalar>
void multiply_stream_nt(const GemmNT<Scalar>& product) {
  using Whole = Packet<Scalar>;
  using Half = HalfPacket<Scalar>;
  constexpr Index size = packet_size<Scalar>;
  constexpr Index half = half_packet_size<Scalar>;
  constexpr Index capacity = (Index{256} << 10) / static_cast<Index>(sizeof(Scalar));
  alignas(64) Scalar buffer[to_size(capacity)];
  alignas(64) Scalar tile[to_size(tile_rows * tile_columns<Scalar>)] = {};
  const GatheredRows<Scalar>& a = product.a;
  const ScatteredRows<Scalar>& c = product.c;
  const Range columns = product.column_range();
  const Index rows = a.count();
  const Index left_over = rows % size;
  const bool ends_in_half = left_over > 0 && left_over <= half;
  const Index packets = rows / size + (left_over > half ? 1 : 0);
  const Index width = packets * size + (ends_in_half ? half : 0);
  const Index block = std::min<Index>(1024, capacity / width);
  const Index depth = a.width();
  const Index stride = product.b.stride;

  const auto multiply = [&](Index k, Index count, Index column, Index height) {
    const Scalar* place = product.b.row(column) + k;
    const bool from_zero = k == 0 && product.start == Start::zero;
    // One tile of rows [first, first + reach), which are `parts` whole packets, or half a one.
    const auto run = [&](Index first, Index parts, Index reach) {
      const Panel<Scalar> panel{buffer + first, width};
      const ScatteredRows<Scalar> in_tile(tile, tile_columns<Scalar>, height, reach);
      const ScatteredRows<Scalar> in_c = c.slice(first, reach).columns(column, height);
      if (!from_zero) transpose_rows(in_c, in_tile);
      const Index ahead = first == 0 && height == tile_rows ? tile_rows * stride : 0;
      if (parts == 0) {
        multiply_rows_tile<Half, tile_rows, 1>(place, stride, height, panel, count, from_zero,
                                               ahead, tile);
      } else {
        with_constant<tile_packets>(parts, [&](auto V) {
          multiply_rows_tile<Whole, tile_rows, V>(place, stride, height, panel, count, from_zero,
                                                  ahead, tile);
        });
      }
      transpose_rows(in_tile, in_c);
    };
    for_each_tile(packets, tile_packets, [&](Index first, Index parts) {
      run(first * size, parts, std::min(parts * size, rows - first * size));
    });
    if (ends_in_half) run(packets * size, 0, left_over);
  };

  const Index end = columns.first + columns.count;
  for (Index k = 0; k == 0 || k < depth; k += block) {
    const Index count = std::min(block, depth - k);
    copy_transposed(a.columns(k, count), width, buffer);
    for (Index group = columns.first; group < end; group += panel_columns<Scalar>) {
      const Index last = std::min(end, group + panel_columns<Scalar>);
      for (Index column = group; column < last; column += tile_rows) {
        multiply(k, count, column, std::min(tile_rows, last - column));
      }
      if (k + block >= depth) {
        call_epilogue<Scalar>(product.epilogue, rows, {group, last - group});
      }
    }
  }
}

/// What multiply_shallow_nt is for: so deep, or less, and some tiles of rows.
inline constexpr Index shallow_depth = 64;

/// The form nt for a small depth, as that of a gate with few experts: a copy of Bᵀ costs less than
/// transposing C on its way for so few steps.
template <class Scalar>
void multiply_shallow_nt(const GemmNT<Scalar>& product) {
  constexpr Index widest = panel_columns<Scalar>;
  alignas(64) Scalar buffer[to_size(shallow_depth * widest)];
  const Index depth = product.a.width();
  const Range columns = product.column_range();
  const Index end = columns.first + columns.count;
  for (Index first = columns.first; first < end; first += widest) {
    const Index width = std::min(widest, end - first);
    copy_transposed(GatheredRows<Scalar>(product.b.row(first), product.b.stride, width, depth),
                    width, buffer);
    const PartEpilogue epilogue{product.epilogue, 0, first};
    multiply_stream_nn(GemmNN<Scalar>{.a = product.a,
                                      .b = {buffer, depth, width, width},
                                      .c = product.c.columns(first, width),
                                      .start = product.start,
                                      .epilogue = epilogue.get()});
  }
}

/// The form tn in the order in which memory gives and takes C fastest: some rows of it are read and
/// written from one end to the other, and asked for ahead as multiply_stream_nn does with B. What
/// is added to them, at most stream_pairs at once, stays in the second-level cache, with 16
/// registers in the first.
template <class Scalar>
void multiply_stream_tn(const GemmTN<Scalar>& product) {
  const GatheredRows<Scalar>& a = product.a;
  const GatheredRows<Scalar>& b = product.b;
  MatrixView<Scalar> c = product.c;
  const Range rows = product.row_range();
  const Range columns = product.column_range();
  constexpr Index size = packet_size<Scalar>;
  constexpr Index capacity = (Index{streams ? 256 : 16} << 10) / static_cast<Index>(sizeof(Scalar));
  constexpr Index ahead = (Index{32} << 10) / static_cast<Index>(tile_rows * sizeof(Scalar));
  alignas(64) Scalar buffer[to_size(capacity)];
  constexpr Index second = stream_pairs * tile_rows;
  constexpr Index held_lines = std::max<Index>(1, 2 * tile_rows / cache_line<Scalar>);
  alignas(64) Scalar values[to_size(2 * second)];  // of two tiles, in each a step's are neighbours
  const Index end = columns.first + columns.count;
  if (a.count() == 0 && product.start == Start::zero) {
    for (Index row = rows.first; row < rows.first + rows.count; ++row) {
      std::fill_n(row_data(c, row) + columns.first, columns.count, Scalar{0});
    }
  }
  for_each_tile(a.count(), stream_pairs, [&](Index k, Index pairs) {
    const Start from = k == 0 ? product.start : Start::accumulate;
    const Index slice = capacity / pairs / size * size;
    for (Index column = columns.first; column < end; column += slice) {
      const Index width = std::min(slice, end - column);
      const Index whole = width / size * size;
      const Index stride = (width + size - 1) / size * size;
      copy_panel(b.slice(k, pairs).columns(column, width), buffer);
      Stream<Scalar> right{buffer, stride, pairs};
      right.ahead_in_c = {distance_by_tiles<Scalar>(ahead, width), width,
                          tile_rows * c.outerStride() - width};
      // The rows of A are far apart, so what two tiles take of each is copied at once.
      for_each_tile(rows.count, 2 * tile_rows, [&](Index first, Index height) {
        const Index upper = (height + 1) / 2;  // rows of the first of the two
        const Index row = rows.first + first;
        for (Index i = 0; i < pairs; ++i) {
          const Scalar* held = a.row(k + i) + row;
          Scalar* value = values + i * tile_rows;
          prefetch_far<held_lines>(held, 2 * tile_rows);
          if (height == 2 * tile_rows) {  // nearly always, and then a constant
            std::copy_n(held, tile_rows, value);
            std::copy_n(held + tile_rows, tile_rows, value + second);
          } else {
            std::copy_n(held, upper, value);
            std::copy_n(held + upper, height - upper, value + second);
          }
        }
        for (Index done = 0; done < height; done += upper) {
          const Index count = std::min(upper, height - done);
          Left<Scalar> left;
          Scalar* to[to_size(tile_rows)];
          left.step = tile_rows;
          for (Index r = 0; r < count; ++r) {
            left.row[r] = values + (done > 0 ? second : 0) + r;
            to[r] = row_data(c, row + done + r) + column;
          }
          multiply_stream<Scalar>(count, left, right, width, {buffer + whole, stride}, from, {},
                                  to);
        }
      });
    }
  });
}

/// The form tn where C has few columns, no more than a tile has rows: as Cᵀ = Bᵀ·A, beside C.
template <class Scalar>
void multiply_narrow_tn(const GemmTN<Scalar>& product) {
  constexpr Index widest = 2 * panel_columns<Scalar>;
  alignas(64) Scalar buffer[to_size(tile_rows * widest)];
  const Range rows = product.row_range();
  const Range columns = product.column_range();
  const Index end = rows.first + rows.count;
  for (Index first = rows.first; first < end; first += widest) {
    const Index width = std::min(widest, end - first);
    const MatrixView<Scalar> transposed(buffer, columns.count, width, Eigen::OuterStride<>(widest));
    const ScatteredRows<Scalar> in_buffer(buffer, widest, columns.count, width);
    const ScatteredRows<Scalar> in_c =
        ScatteredRows<Scalar>(product.c).slice(first, width).columns(columns.first, columns.count);
    if (product.start == Start::accumulate) transpose_rows(in_c, in_buffer);
    multiply_stream_tn(GemmTN<Scalar>{.a = product.b.columns(columns.first, columns.count),
                                      .b = product.a.columns(first, width),
                                      .c = transposed,
                                      .start = product.start});
    transpose_rows(in_buffer, in_c);
  }
}

}  // namespace moe::detail

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
