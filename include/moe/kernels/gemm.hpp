#pragma once

#include <algorithm>

#include "moe/kernels/panels.hpp"
#include "moe/kernels/streams.hpp"
#include "moe/parallel.hpp"

/// \file
/// Matrix products with gathered rows, in the three forms that a layer and its gradient need:
///
///     nn   C[M,N]  = A[M,K] · B[K,N]       forward
///     nt   C[M,N]  = A[M,K] · B[N,K]ᵀ      gradient of the input
///     tn   C[M,N]  = A[K,M]ᵀ · B[K,N]      gradient of the weights
///
/// A (and B in the last form) may be rows gathered through a list, and C in the first two forms
/// rows scattered through one, so tokens are never copied together. Every element of C is one chain
/// of multiply-adds over ascending k, from the value it starts at (zero or what C held, then a
/// bias), fused where the processor fuses. Blocks, tiles and threads only decide when a chain is
/// continued; hence a row of C has the same bits whatever other rows are multiplied with it, on any
/// number of threads. Nothing allocates and nothing throws.
///
/// multiply_nn, multiply_nt and multiply_tn compute a part of C on the calling thread; product_nn,
/// product_nt and product_tn split all of C over the workers.
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace moe::detail {

/// C[:, columns] = A·B, from zero or added to what C holds, and to a bias: N values and maybe M
/// factors, which begin with the first column and row of C whatever columns are asked for. At its
/// end it asks for what the next product reads first, if that is known to be like this one, with
/// `next_b` as its B.
template <class Scalar>
void multiply_nn(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, Index first_column,
                 Index columns, Start start, const Bias<Scalar>& bias,
                 const ScatteredRows<Scalar>& c, Finish finish = {},
                 const Scalar* next_b = nullptr) {
  if (a.count() == 0 || columns == 0) return;
  if constexpr (!streams) {
    if (a.count() > 2 * tile_rows) {
      const Right<Scalar> right{b, false};
      return multiply_rows(a, right, first_column, columns, start, bias, c, finish);
    }
  }
  multiply_stream_nn(a, b, first_column, columns, start, bias, c, finish, next_b);
}

/// C[:, columns] = A·Bᵀ, from zero or added to what C holds.
template <class Scalar>
void multiply_nt(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, Index first_column,
                 Index columns, Start start, const ScatteredRows<Scalar>& c, Finish finish = {}) {
  if (a.count() == 0) return;
  if constexpr (streams) {
    if (a.width() <= shallow_depth && a.count() >= 2 * tile_rows) {
      return multiply_shallow_nt(a, b, first_column, columns, start, c, finish);
    }
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
    multiply_rows<Scalar>(a, {b, true}, first_column, columns, start, {}, c, finish);
  }
}

/// Rows [first_row, first_row + rows) and some columns of C = Aᵀ·B, from zero or added to what C
/// holds, the rows of A and B going in pairs.
template <class Scalar>
void multiply_tn(const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b, Index first_row,
                 Index rows, Index first_column, Index columns, Start start, MatrixView<Scalar> c) {
  if constexpr (streams) {
    if (columns <= tile_rows && rows >= tile_columns<Scalar>) {
      return multiply_narrow_tn(a, b, first_row, rows, first_column, columns, start, c);
    }
  } else {
    if (a.count() > stream_pairs) {
      return multiply_panels_tn(a, b, first_row, rows, first_column, columns, start, c);
    }
  }
  multiply_stream_tn(a, b, first_row, rows, first_column, columns, start, c);
}

/// Splits C into blocks and calls f(first_row, rows, first_column, columns) for each, over the
/// workers. Small products stay on the calling thread.
inline void for_each_block(Index rows, Index columns, Index depth, Index block_columns,
                           FunctionRef<void(Index, Index, Index, Index)> f) {
  const Index workers = worker_count(Work{rows * columns * depth});
  const Index wanted = workers > 1 ? 4 * workers : 1;
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

/// C = A·B, from zero or added to what C holds, and to a bias: N values and maybe M factors.
template <class Scalar>
void product_nn(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, MatrixView<Scalar> c,
                Start start = Start::zero, const Bias<Scalar>& bias = {}) {
  MOE_ASSERT(a.width() == b.rows() && c.rows() == a.count() && c.cols() == b.cols());
  // One worker reads few rows' B as it lies.
  const bool whole = worker_count(Work{c.rows() * c.cols() * a.width()}) == 1 &&
                     is_in_order<Scalar>(c.rows(), c.cols(), b.outerStride());
  const Index block_columns = whole ? c.cols() : 2 * panel_columns<Scalar>;
  for_each_block(c.rows(), c.cols(), a.width(), block_columns,
                 [&](Index row, Index rows, Index column, Index columns) {
                   multiply_nn(a.slice(row, rows), b, column, columns, start, bias.at(row, 0),
                               ScatteredRows<Scalar>(c).slice(row, rows));
                 });
}

/// C = A·Bᵀ, or added to what C holds.
template <class Scalar>
void product_nt(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b,
                const ScatteredRows<Scalar>& c, Start start = Start::zero) {
  MOE_ASSERT(a.width() == b.cols() && c.count() == a.count() && c.width() == b.rows());
  for_each_block(c.count(), c.width(), a.width(), panel_columns<Scalar>,
                 [&](Index row, Index rows, Index column, Index columns) {
                   multiply_nt(a.slice(row, rows), b, column, columns, start, c.slice(row, rows));
                 });
}
template <class Scalar>
void product_nt(const GatheredRows<Scalar>& a, ConstMatrixView<Scalar> b, MatrixView<Scalar> c,
                Start start = Start::zero) {
  product_nt(a, b, ScatteredRows<Scalar>(c), start);
}

/// C = Aᵀ·B, from zero or added to what C holds, the rows of A and B going in pairs.
template <class Scalar>
void product_tn(const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b, MatrixView<Scalar> c,
                Start start = Start::accumulate) {
  MOE_ASSERT(a.count() == b.count() && c.rows() == a.width() && c.cols() == b.width());
  for_each_block(c.rows(), c.cols(), a.count(), 2 * panel_columns<Scalar>,
                 [&](Index row, Index rows, Index column, Index columns) {
                   multiply_tn(a, b, row, rows, column, columns, start, c);
                 });
}

}  // namespace moe::detail

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
