#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "moe/kernels/direct_kernel.hpp"
#include "moe/kernels/pack.hpp"

/// \file
/// Products that read their large operand in the order in which memory delivers it fastest, in place:
/// with 16 registers and many rows, the first tile of rows packs what it reads for the others.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The largest number of rows of A and of B that a GemmTN adds in one pass over C.
inline constexpr Index direct_depth = l2_feeds_tiles ? 64 : 128;

/// The number of rows of B, `stride` apart and `depth` in all, that gemm_direct() reads side by side
/// for a number of rows of A. Where memory bandwidth is the limit, eight, since the hardware prefetcher
/// follows about eight streams; with 32 registers twice as many for one or two rows of A where rows of
/// B are shorter than a page of memory. Where a tile is high enough that arithmetic is the limit, more,
/// since C is then read and written less often; but with 32 registers and up to 12 rows not all of B at
/// once, which would leave nothing to prefetch.
inline constexpr Index max_direct_steps = l2_feeds_tiles ? 128 : 96;
template <class Scalar>
constexpr Index direct_steps(Index rows, Index depth, Index stride) {
  if (rows > 64) return max_direct_steps;
  if constexpr (!l2_feeds_tiles) return rows > 5 ? 64 : 8;
  constexpr Index many = 96;
  if (rows > 5 && (rows > 12 || depth > many)) return many;
  const bool short_rows = stride < 64 * cache_line<Scalar>;
  return rows > 5 || (rows <= 2 && short_rows) ? 16 : 8;
}

/// A prefetch distance of at least `distance` at which the first tile that passes the end of `width`
/// columns prefetches the start of a row: a tile cannot prefetch both the end of one row and the
/// start of the next.
template <class Scalar>
constexpr Index distance_by_tiles(Index distance, Index width) {
  return distance < width ? distance + (width - distance) % tile_columns<Scalar> : distance;
}

/// Elements between two addresses, which may be in different matrices.
template <class Scalar>
Index distance_between(const Scalar* from, const Scalar* to) {
  const auto bytes = reinterpret_cast<std::intptr_t>(to) - reinterpret_cast<std::intptr_t>(from);
  return bytes / static_cast<std::intptr_t>(sizeof(Scalar));
}

/// C = A·B with B read in place, some rows of it side by side, from one end to the other. The depth
/// is cut into steps, at each of which C is read and written, and the columns into slices that stay
/// in L2 while all rows of A pass. With 16 registers and more than two tiles of rows (from gemm_serial() then
/// more than gemm_strips() takes) the first tile packs a slice into strips, which the others read. The
/// hardware prefetcher stops at the end of a page of memory, so rows are prefetched 32 KiB ahead, and near
/// their ends the rows of the next step, the last of which may be in `prefetch_next`.
template <class Scalar>
void gemm_direct(const GemmNN<Scalar>& product) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index widest = (l2_feeds_tiles ? 2 : 3) * panel_columns<Scalar>;
  alignas(64) Scalar buffer[to_size(size * max_direct_steps)];
  alignas(64) Scalar strips[to_size(l2_feeds_tiles ? 1 : widest * max_direct_steps)];
  const GatheredRows<Scalar>& a = product.a;
  const MatrixOperand<Scalar>& b = product.b;
  const ScatteredRows<Scalar>& c = product.c;
  const Epilogue epilogue = product.epilogue;
  const Scalar* next_b = product.prefetch_next;
  const Range columns = product.column_range();
  const Index depth = a.width();
  const Index stride = b.stride;
  const Index steps = direct_steps<Scalar>(a.count(), depth, stride);
  const Index to_next = distance_between(b.data, next_b);
  constexpr Index ahead = (Index{32} << 10) / static_cast<Index>(sizeof(Scalar));
  // The last columns have lower tiles if they do not fill a packet.
  const Index tallest = columns.count % size == 0 ? direct_rows : tile_rows;
  const Index slice = a.count() > tallest ? widest : columns.count;
  // For two tiles of rows, packing costs as much as it gains.
  const bool packs = !l2_feeds_tiles && a.count() > 2 * tile_rows;
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
        DirectB<Scalar> right{place, stride, count, {distance, last - column, next}};
        if (packs) right.strips = strips;
        Panel<Scalar> rest{};
        if (const Index over = width % size; over == half_packet_size<Scalar>) {
          rest = {place + width - over, stride};
        } else if (over != 0) {
          copy_rows(GatheredRows<Scalar>(place + width - over, stride, count, over), size, buffer);
          rest = {buffer, size};
        }
        const auto multiply = [&](Index first, Index rows) {
          Left<Scalar> left;
          Scalar* to[to_size(direct_rows)];
          for (Index r = 0; r < rows; ++r) {
            left.row[r] = a.row(first + r) + k;
            to[r] = c.row(first + r) + column;
          }
          // C comes from memory in the first step only, and the next row is known only if C has no
          // list of rows.
          const bool prefetches = k == 0 && first + rows < a.count();
          right.prefetch_c = {prefetches ? rows * c.step() : 0, std::numeric_limits<Index>::max()};
          multiply_direct(rows, left, right, width, rest, from,
                          k == 0 ? product.bias.at(first, column) : Bias<Scalar>{}, to);
          if (!epilogue || k + steps < depth) return;
          for_each_strip<Scalar>(column, width, [&](Index at, Index, Index strip_width) {
            epilogue(first, rows, at, strip_width);
          });
        };
        // The first tile waits for memory, so it is as high as can be.
        const Index highest = a.count() <= tallest ? a.count() : tile_rows;
        multiply(0, highest);
        // B in place is prefetched again: the first tile did not prefetch all of it.
        right.cached = true;
        if (packs) right = DirectB<Scalar>::of_strips(strips, count);
        for_each_tile(a.count() - highest, tile_rows,
                      [&](Index first, Index rows) { multiply(highest + first, rows); });
      }
    }
  }
}

/// C = A·Bᵀ with B read in place, some rows of it side by side. Rows of A, packed as columns, run along
/// the packets; with 32 registers, where at most half a packet of rows is left over, those run
/// along a packet half as wide, of which such a processor computes two at once. A tile of one
/// packet is higher, for enough independent chains. Some tiles of rows of B stay in L2 while all
/// rows of A pass.
template <class Scalar>
void gemm_direct(const GemmNT<Scalar>& product) {
  using Whole = Packet<Scalar>;
  using Half = HalfPacket<Scalar>;
  constexpr Index size = packet_size<Scalar>;
  constexpr Index half = l2_feeds_tiles ? half_packet_size<Scalar> : 0;
  constexpr Index capacity = (Index{256} << 10) / static_cast<Index>(sizeof(Scalar));
  constexpr Index cached_rows = 24;
  static_assert(cached_rows % tile_rows == 0 && cached_rows % max_tile_rows == 0);
  alignas(64) Scalar buffer[to_size(capacity)];
  alignas(64) Scalar tile[to_size(max_tile_rows * tile_columns<Scalar>)] = {};
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

  // Calls f(first, parts, reach) for rows [first, first + reach) of A along `parts` whole packets,
  // or along half a packet if `parts` is 0. As many rows as possible are along a whole tile.
  const auto for_each_part_of_a = [&](auto&& f) {
    for (Index packet = 0; packet < packets; packet += tile_packets) {
      const Index parts = std::min(tile_packets, packets - packet);
      f(packet * size, parts, std::min(parts * size, rows - packet * size));
    }
    if (ends_in_half) f(packets * size, Index{0}, left_over);
  };
  const Index end = columns.first + columns.count;
  for (Index k = 0; k == 0 || k < depth; k += block) {
    const Index count = std::min(block, depth - k);
    const bool from_zero = k == 0 && product.start == Start::zero;
    for_each_part_of_a([&](Index first, Index parts, Index reach) {
      copy_transposed(a.slice(first, reach).columns(k, count), parts == 0 ? half : parts * size,
                      buffer + first * count);
    });
    // The tiles of rows [from, to) of B and of some rows of A.
    const auto multiply = [&](Index from, Index to, Index first, Index parts, Index reach) {
      const Panel<Scalar> panel{buffer + first * count, parts == 0 ? half : parts * size};
      Index tall = tile_rows;
      if (parts == 1) tall = max_tile_rows;  // no ?:, whose branches are the same with 32 registers
      for (Index column = from; column < to; column += tall) {
        const Index height = std::min(tall, to - column);
        const Scalar* place = product.b.row(column) + k;
        const ScatteredRows<Scalar> in_tile(tile, tile_columns<Scalar>, height, reach);
        const ScatteredRows<Scalar> in_c = c.slice(first, reach).columns(column, height);
        if (!from_zero) transpose_rows(in_c, in_tile);
        const Index ahead = first == 0 && height == tall ? tall * stride : 0;
        const auto run = [&]<class P, Index R, Index V>() {
          transposed_tile<P, R, V>(place, stride, height, panel, count, from_zero, ahead, tile);
        };
        if (parts == 0) {
          run.template operator()<Half, tile_rows, 1>();
        } else if (parts == 1) {
          run.template operator()<Whole, max_tile_rows, 1>();
        } else {
          with_constant<tile_packets>(parts, [&](auto V) {
            if constexpr (V > 1) run.template operator()<Whole, tile_rows, V>();
          });
        }
        transpose_rows(in_tile, in_c);
      }
    };
    for (Index group = columns.first; group < end; group += panel_columns<Scalar>) {
      const Index last = std::min(end, group + panel_columns<Scalar>);
      for (Index from = group; from < last; from += cached_rows) {
        for_each_part_of_a([&](Index first, Index parts, Index reach) {
          multiply(from, std::min(last, from + cached_rows), first, parts, reach);
        });
      }
      if (k + block >= depth) {
        call_epilogue<Scalar>(product.epilogue, rows, {group, last - group});
      }
    }
  }
}

/// C = Aᵀ·B with C read and written in the order in which memory is fastest: some rows of C from
/// one end to the other, prefetched as B is in the first form. The rows of B that are added, at
/// most direct_depth at once, are packed as strips and stay in L2.
template <class Scalar>
void gemm_direct(const GemmTN<Scalar>& product) {
  const GatheredRows<Scalar>& a = product.a;
  const GatheredRows<Scalar>& b = product.b;
  MatrixView<Scalar> c = product.c;
  const Range rows = product.row_range();
  const Range columns = product.column_range();
  constexpr Index size = packet_size<Scalar>;
  constexpr Index strip = tile_columns<Scalar>;
  constexpr Index capacity = (Index{256} << 10) / static_cast<Index>(sizeof(Scalar));
  constexpr Index ahead = (Index{32} << 10) / static_cast<Index>(tile_rows * sizeof(Scalar));
  alignas(64) Scalar buffer[to_size(capacity + direct_depth * strip)];
  constexpr Index second = direct_depth * tile_rows;
  constexpr Index held_lines = std::max<Index>(1, 2 * tile_rows / cache_line<Scalar>);
  alignas(64) Scalar values[to_size(2 * second)];  // of two tiles, those of a step contiguous
  const Index end = columns.first + columns.count;
  if (a.count() == 0 && product.start == Start::zero) {
    for (Index row = rows.first; row < rows.first + rows.count; ++row) {
      std::fill_n(row_data(c, row) + columns.first, columns.count, Scalar{0});
    }
  }
  for_each_tile(a.count(), direct_depth, [&](Index k, Index pairs) {
    const Start from = k == 0 ? product.start : Start::accumulate;
    const Index slice = round_up(capacity / pairs, strip);
    for (Index column = columns.first; column < end; column += slice) {
      const Index width = std::min(slice, end - column);
      const Index whole = width / size * size;
      copy_strips(b.slice(k, pairs).columns(column, width), buffer);
      DirectB<Scalar> right = DirectB<Scalar>::of_strips(buffer, pairs);
      right.prefetch_c = {distance_by_tiles<Scalar>(ahead, width), width,
                          tile_rows * c.outerStride() - width};
      // The rows of A are far apart, so the values of two tiles are copied from each at once.
      // The rows are not cut evenly, since copying another number of values than two whole tiles
      // takes longer.
      for (Index first = 0; first < rows.count; first += 2 * tile_rows) {
        const Index height = std::min(2 * tile_rows, rows.count - first);
        // Rows of the first of the two tiles.
        const Index upper = height > tile_rows ? (height + 1) / 2 : height;
        const Index row = rows.first + first;
        for (Index i = 0; i < pairs; ++i) {
          const Scalar* held = a.row(k + i) + row;
          Scalar* value = values + i * tile_rows;
          prefetch_far<held_lines>(held, 2 * tile_rows);
          if (height == 2 * tile_rows) {  // nearly always, and the counts are then constants
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
          multiply_direct<Scalar>(count, left, right, width, {right.at(whole), strip}, from, {},
                                  to);
        }
      }
    }
  });
}

}  // namespace moe::detail

MOE_PACKETS_END
