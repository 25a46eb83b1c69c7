#pragma once

#include <algorithm>
#include <utility>

#include "moe/kernels/packet.hpp"
#include "moe/parallel.hpp"

/// \file
/// Matrix products with gathered rows, in the three forms that a layer and its gradient need:
///
///     product_nn   C[M,N]  = A[M,K] · B[K,N]       forward
///     product_nt   C[M,N]  = A[M,K] · B[N,K]ᵀ      gradient of the input
///     product_tn   C[M,N] += A[K,M]ᵀ · B[K,N]      gradient of the weights
///
/// A (and B in the last form) may be rows gathered through a list, so tokens are never copied
/// together. Every element of C is one chain of multiply-adds over ascending k, from the value it
/// starts at (zero, a bias, or what C held), fused where the processor fuses. Blocks, tiles and
/// threads only decide when a chain is continued; hence a row of C has the same bits whatever other
/// rows are multiplied with it, on any number of threads. Nothing allocates and nothing throws.
///
/// How it is fast: a tile of C (8 x 3 packets where there are 32 registers, 4 x 3 where there are
/// 16) stays in registers while k runs, fed by one broadcast of A and three packets of B a row. The
/// panel of B that belongs to some neighbouring tiles is first copied into consecutive memory, long
/// rows at a time, so that memory is read in order and the tiles below each other read from the
/// nearest caches.

// A packet as a template argument of Eigen's PacketBlock loses its alignment attribute, which is
// harmless there; Eigen's own headers silence it the same way.
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace moe::detail {

/// What an element of C is before the first product is added.
enum class Start { zero, bias, accumulate };

#if defined(EIGEN_VECTORIZE_AVX512) || defined(EIGEN_ARCH_ARM64)
inline constexpr Index tile_rows = 8;
#else
inline constexpr Index tile_rows = 4;
#endif
inline constexpr Index tile_packets = 3;

template <class Scalar>
inline constexpr Index tile_columns = tile_packets* packet_size<Scalar>;

/// Columns and depth of a panel: 4 tiles of 3 packets of 64 bytes take 96 KiB of stack, and the
/// part that one tile reads stays in the first-level cache.
template <class Scalar>
inline constexpr Index panel_columns = 4 * tile_columns<Scalar>;
inline constexpr Index panel_depth = 128;

/// Rows of C in one task, at most: their part of A stays in the second-level cache.
inline constexpr Index task_rows = 512;

template <Index... indices, class F>
EIGEN_ALWAYS_INLINE void unroll(std::integer_sequence<Index, indices...>, F&& f) {
  (f(std::integral_constant<Index, indices>{}), ...);
}
/// f(0), f(1), ... f(N - 1) with constant arguments, so that arrays they index become registers.
template <Index N, class F>
EIGEN_ALWAYS_INLINE void unroll(F&& f) {
  unroll(std::make_integer_sequence<Index, N>{}, f);
}

/// Left operand of a tile whose rows run along k: A of NN and NT.
template <class Scalar>
struct RowsAlongDepth {
  GatheredRows<Scalar> a;

  /// at(k)(r) is the value of row r at depth k.
  template <Index R>
  struct Tile {
    const Scalar* row[to_size(R)];
    auto at(Index k) const {
      return [this, k](Index r) { return row[r][k]; };
    }
  };
  template <Index R>
  Tile<R> tile(Index first_row, Index first_k) const {
    Tile<R> tile;
    for (Index r = 0; r < R; ++r) tile.row[r] = a.row(first_row + r) + first_k;
    return tile;
  }
};

/// Left operand of a tile whose columns run along k: A of TN, used transposed.
template <class Scalar>
struct ColumnsAlongDepth {
  GatheredRows<Scalar> a;

  template <Index R>
  struct Tile {
    GatheredRows<Scalar> a;
    Index first_row;
    auto at(Index k) const {
      return [column = a.row(k) + first_row](Index r) { return column[r]; };
    }
  };
  template <Index R>
  Tile<R> tile(Index first_row, Index first_k) const {
    return {a.slice(first_k, a.count() - first_k), first_row};
  }
};

/// Rows of B along the depth, `stride` apart, where they are or copied.
template <class Scalar>
struct Panel {
  const Scalar* data;
  Index stride;
};

/// The tile: C (R rows, V packets) = start + Σ_k left(·, k)·right(k, ·). A null `start` is zero.
template <Index R, Index V, class Scalar, class Left>
void multiply_tile(const Left& left, Panel<Scalar> right, Index depth, const Scalar* start,
                   Index start_stride, Scalar* c, Index c_stride) {
  constexpr Index size = packet_size<Scalar>;
  Packet<Scalar> sum[to_size(R)][to_size(V)];
  unroll<R>([&](auto r) {
    unroll<V>([&](auto v) {
      sum[r][v] =
          start != nullptr ? load(start + r * start_stride + v * size) : broadcast(Scalar{0});
    });
  });
  const Scalar* b = right.data;
  for (Index k = 0; k < depth; ++k, b += right.stride) {
    Packet<Scalar> row[to_size(V)];
    unroll<V>([&](auto v) { row[v] = load(b + v * size); });
    const auto left_k = left.at(k);
    unroll<R>([&](auto r) {
      const Packet<Scalar> a = broadcast(left_k(r));
      unroll<V>([&](auto v) { sum[r][v] = Eigen::internal::pmadd(a, row[v], sum[r][v]); });
    });
  }
  unroll<R>(
      [&](auto r) { unroll<V>([&](auto v) { store(c + r * c_stride + v * size, sum[r][v]); }); });
}

/// The tiles below each other, the highest first. Of their columns `width` belong to C; a tile that
/// sticks out is computed beside C and copied.
template <Index R, Index V, class Scalar, class Source>
void multiply_column(const Source& source, Index first_row, Index rows, Index first_k, Index depth,
                     Panel<Scalar> right, Index width, const Scalar* start, Index start_stride,
                     Scalar* c, Index c_stride) {
  constexpr Index columns = V * packet_size<Scalar>;
  Index r = 0;
  for (; r + R <= rows; r += R) {
    const auto left = source.template tile<R>(first_row + r, first_k);
    const Scalar* from = start != nullptr ? start + r * start_stride : nullptr;
    Scalar* to = c + r * c_stride;
    if (width == columns) {
      multiply_tile<R, V>(left, right, depth, from, start_stride, to, c_stride);
    } else {
      Scalar tile[to_size(R * columns)] = {};
      for (Index i = 0; from != nullptr && i < R; ++i) {
        std::copy_n(from + i * start_stride, width, tile + i * columns);
      }
      multiply_tile<R, V>(left, right, depth, static_cast<const Scalar*>(tile), columns, tile,
                          columns);
      for (Index i = 0; i < R; ++i) std::copy_n(tile + i * columns, width, to + i * c_stride);
    }
  }
  if constexpr (R > 1) {
    if (r < rows) {
      multiply_column<R / 2, V>(source, first_row + r, rows - r, first_k, depth, right, width,
                                start != nullptr ? start + r * start_stride : nullptr, start_stride,
                                c + r * c_stride, c_stride);
    }
  }
}

/// One block of C, rows x columns, over the whole depth. `panel(first_k, depth, column, columns,
/// buffer)` gives rows of B, filled up with zeros to whole packets.
template <class Scalar, class Source, class MakePanel>
void multiply_block(const Source& source, Index first_row, Index rows, Index first_column,
                    Index columns, Index depth, const MakePanel& panel, Start start,
                    const Scalar* bias, Scalar* c, Index c_stride) {
  constexpr Index size = packet_size<Scalar>;
  alignas(64) Scalar buffer[to_size(panel_depth * panel_columns<Scalar>)];
  const Index packets = (columns + size - 1) / size;
  const Index tiles = (packets + tile_packets - 1) / tile_packets;
  for (Index k = 0; k == 0 || k < depth; k += panel_depth) {
    const Index block_depth = std::min(panel_depth, depth - k);
    const Panel<Scalar> right = panel(k, block_depth, first_column, columns, buffer);
    const Start from = k == 0 ? start : Start::accumulate;
    Index packet = 0;
    for (Index t = 0; t < tiles; ++t) {
      // As even as possible: 4 packets are 2 + 2, since a tile of one packet wastes the broadcasts.
      const Index tile_width = (packets - packet + tiles - t - 1) / (tiles - t);
      const Index column = packet * size;
      packet += tile_width;
      Scalar* out = c + first_row * c_stride + first_column + column;
      const Scalar* initial = nullptr;
      if (from == Start::accumulate) initial = out;
      if (from == Start::bias) initial = bias + first_column + column;
      const auto run = [&](auto v) {
        multiply_column<tile_rows, v>(source, first_row, rows, k, block_depth,
                                      Panel<Scalar>{right.data + column, right.stride},
                                      std::min(tile_width * size, columns - column), initial,
                                      from == Start::bias ? 0 : c_stride, out, c_stride);
      };
      if (tile_width == 3) run(std::integral_constant<Index, 3>{});
      if (tile_width == 2) run(std::integral_constant<Index, 2>{});
      if (tile_width == 1) run(std::integral_constant<Index, 1>{});
    }
  }
}

/// Splits C into blocks and the blocks over the workers. Small products stay on one worker, since
/// waking another takes some microseconds.
template <class Scalar, class Source, class MakePanel>
void multiply(const Source& source, Index rows, Index columns, Index depth, const MakePanel& panel,
              Start start, const Scalar* bias, MatrixView<Scalar> c) {
  MOE_ASSERT(c.rows() == rows && c.cols() == columns);
  constexpr Index worth_waking = Index{1} << 18;  // multiply-adds
  const bool parallel = rows * columns * depth >= worth_waking;
  const Index column_blocks = (columns + panel_columns<Scalar> - 1) / panel_columns<Scalar>;
  // High blocks copy panels less often, but there should be some for every worker.
  const Index wanted = parallel ? 4 * worker_count() : 1;
  Index block_rows = task_rows;
  while (block_rows > 64 && (rows + block_rows - 1) / block_rows * column_blocks < wanted) {
    block_rows /= 2;
  }
  const Index row_blocks = (rows + block_rows - 1) / block_rows;
  const auto run = [&](Index task, Index) {
    const Index row = task / column_blocks * block_rows;
    const Index column = task % column_blocks * panel_columns<Scalar>;
    multiply_block(source, row, std::min(block_rows, rows - row), column,
                   std::min(panel_columns<Scalar>, columns - column), depth, panel, start, bias,
                   c.data(), c.outerStride());
  };
  const Index tasks = row_blocks * column_blocks;
  if (parallel) {
    parallel_for(tasks, run);
  } else {
    for (Index task = 0; task < tasks; ++task) run(task, 0);
  }
}

/// Copies rows of `width` values next to each other, the last packet of each filled up with zeros.
template <class Scalar, class RowAt>
Panel<Scalar> copy_panel(Index depth, Index width, const RowAt& row_at, Scalar* buffer) {
  constexpr Index size = packet_size<Scalar>;
  const Index stride = (width + size - 1) / size * size;
  for (Index k = 0; k < depth; ++k) {
    const Scalar* from = row_at(k);
    Scalar* to = buffer + k * stride;
    Index j = 0;
    for (; j + size <= width; j += size) store(to + j, load(from + j));
    if (j < width) store(to + j, load_first(from + j, width - j));
  }
  return {buffer, stride};
}

/// C = A·B, from zero, from a bias (N values), or added to what C holds.
template <class Scalar>
void product_nn(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, MatrixView<Scalar> c,
                Start start = Start::zero, const Scalar* bias = nullptr) {
  MOE_ASSERT(a.width() == b.rows() && (start == Start::bias || bias == nullptr));
  // Copying pays from a few tiles below each other on; until then B is read in place.
  const bool in_place = a.count() <= 2 * tile_rows;
  const auto panel = [&](Index k, Index depth, Index column, Index width,
                         Scalar* buffer) -> Panel<Scalar> {
    const Scalar* from = b.data() + k * b.outerStride() + column;
    if (in_place && width % packet_size<Scalar> == 0) return {from, b.outerStride()};
    return copy_panel(
        depth, width, [&](Index i) { return from + i * b.outerStride(); }, buffer);
  };
  multiply(RowsAlongDepth<Scalar>{a}, a.count(), b.cols(), a.width(), panel, start, bias, c);
}

/// Copies `width` rows of B, `depth` values each, as columns next to each other.
template <class Scalar>
Panel<Scalar> transpose_panel(const Scalar* from, Index from_stride, Index depth, Index width,
                              Scalar* buffer) {
  constexpr Index size = packet_size<Scalar>;
  using Block = Eigen::internal::PacketBlock<Packet<Scalar>, static_cast<int>(size)>;
  const Index stride = (width + size - 1) / size * size;
  Index column = 0;
  for (; column + size <= width; column += size) {
    Index k = 0;
    for (; k + size <= depth; k += size) {
      Block block;
      for (Index i = 0; i < size; ++i) {
        block.packet[i] = load(from + (column + i) * from_stride + k);
      }
      if constexpr (size > 1) Eigen::internal::ptranspose(block);
      for (Index i = 0; i < size; ++i) store(buffer + (k + i) * stride + column, block.packet[i]);
    }
    for (; k < depth; ++k) {
      for (Index i = 0; i < size; ++i) {
        buffer[k * stride + column + i] = from[(column + i) * from_stride + k];
      }
    }
  }
  for (Index k = 0; k < depth; ++k) {
    for (Index j = column; j < stride; ++j) {
      buffer[k * stride + j] = j < width ? from[j * from_stride + k] : Scalar{0};
    }
  }
  return {buffer, stride};
}

/// C = A·Bᵀ, or added to what C holds.
template <class Scalar>
void product_nt(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, MatrixView<Scalar> c,
                Start start = Start::zero) {
  MOE_ASSERT(a.width() == b.cols() && start != Start::bias);
  const auto panel = [&](Index k, Index depth, Index column, Index width, Scalar* buffer) {
    return transpose_panel(b.data() + column * b.outerStride() + k, b.outerStride(), depth, width,
                           buffer);
  };
  const Scalar* no_bias = nullptr;
  multiply(RowsAlongDepth<Scalar>{a}, a.count(), b.rows(), a.width(), panel, start, no_bias, c);
}

/// C += Aᵀ·B, the rows of A and B going in pairs.
template <class Scalar>
void product_tn(const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b,
                MatrixView<Scalar> c) {
  MOE_ASSERT(a.count() == b.count());
  if (a.count() == 0) return;
  const auto panel = [&](Index k, Index depth, Index column, Index width, Scalar* buffer) {
    return copy_panel(
        depth, width, [&](Index i) { return b.row(k + i) + column; }, buffer);
  };
  const Scalar* no_bias = nullptr;
  multiply(ColumnsAlongDepth<Scalar>{a}, a.width(), b.width(), a.count(), panel, Start::accumulate,
           no_bias, c);
}

}  // namespace moe::detail

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
