#pragma once

#include <algorithm>
#include <type_traits>

#include "moe/kernels/gemm_direct.hpp"
#include "moe/kernels/gemm_packed.hpp"
#include "moe/kernels/gemm_strips.hpp"
#include "moe/kernels/initial_values.hpp"
#include "moe/kernels/small_k.hpp"
#include "moe/kernels/small_m.hpp"
#include "moe/kernels/small_n.hpp"
#include "moe/parallel.hpp"

/// \file
/// Matrix products with gathered rows, described by GemmNN, GemmNT and GemmTN: gemm() on all workers,
/// gemm_serial() on the calling thread.
///
///     gemm(GemmNN<Scalar>{.a = x, .b = weight, .c = y, .bias = {.values = bias}});
///     gemm(GemmNT<Scalar>{.a = dy, .b = weight, .c = dx, .start = Start::accumulate});
///
/// A (and B of GemmTN) may be rows gathered through a list, and C of the other forms rows scattered
/// through one, so tokens are never gathered into a copy. Every element of C is one chain of
/// multiply-adds over ascending k, from its initial value (zero or what C held, then a bias), fused
/// where the processor fuses. Blocks, tiles and threads only decide when a chain is continued;
/// hence a row of C has the same bits whatever other rows are multiplied with it, on any number of
/// threads. Nothing allocates. gemm() throws std::invalid_argument for shapes that do not match;
/// gemm_serial() does not check them.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// C = A·B on the calling thread. Near its end it prefetches the start of the next product's B, if
/// there is a `prefetch_next`.
template <class Scalar>
void gemm_serial(const GemmNN<Scalar>& product) {
  const Index columns = product.column_range().count;
  if (product.a.count() == 0 || columns == 0) return;
  if (product.a.width() == 0) return gemm_depth_zero(product);
  if (columns == product.b.columns &&
      is_small_m<Scalar>(product.a.count(), columns, product.b.stride)) {
    return gemm_small_m(product);
  }
  if constexpr (!l2_feeds_tiles) {
    if (is_for_strips(product.a.count())) return gemm_strips(product);
  }
  gemm_direct(product);
}

/// C = A·Bᵀ on the calling thread.
template <class Scalar>
void gemm_serial(const GemmNT<Scalar>& product) {
  if (product.a.count() == 0) return;
  if (product.a.width() <= small_k_depth && product.a.count() >= 2 * tile_rows) {
    return gemm_small_k(product);
  }
  // With more rows at once, the depth would be cut into more and shorter blocks.
  for_each_tile(product.a.count(), 64, [&](Index first, Index rows) {
    const PartEpilogue epilogue{product.epilogue, first, 0};
    GemmNT<Scalar> part = product;
    part.a = product.a.slice(first, rows);
    part.c = product.c.slice(first, rows);
    part.epilogue = epilogue.get();
    gemm_direct(part);
  });
}

/// C = Aᵀ·B on the calling thread.
template <class Scalar>
void gemm_serial(const GemmTN<Scalar>& product) {
  if (product.column_range().count <= small_n_columns &&
      product.row_range().count >= tile_columns<Scalar>) {
    return gemm_small_n(product);
  }
  gemm_direct(product);
}

/// Splits C into blocks and calls f(rows, columns) for each, on all workers. Small products stay on
/// the calling thread.
inline void for_each_block(Range rows, Range columns, Index depth, Index block_columns,
                           FunctionRef<void(Range, Range)> f) {
  const Index workers = worker_count(Work{rows.count * columns.count * depth});
  const Index wanted = workers > 1 ? 4 * workers : 1;
  const Index column_blocks = (columns.count + block_columns - 1) / block_columns;
  // High blocks pack panels less often, but there should be several blocks for every worker.
  Index block_rows = task_rows;
  while (block_rows > 64 && (rows.count + block_rows - 1) / block_rows * column_blocks < wanted) {
    block_rows /= 2;
  }
  const Index row_blocks = (rows.count + block_rows - 1) / block_rows;
  const auto run = [&](Index task, Index) {
    const Index row = task / column_blocks * block_rows;
    const Index column = task % column_blocks * block_columns;
    f({rows.first + row, std::min(block_rows, rows.count - row)},
      {columns.first + column, std::min(block_columns, columns.count - column)});
  };
  const Index tasks = row_blocks * column_blocks;
  if (wanted > 1) {
    parallel_for(tasks, run);
  } else {
    for (Index task = 0; task < tasks; ++task) run(task, 0);
  }
}

/// A block of C = A·B or C = A·Bᵀ on the calling thread; the columns are those of C.
template <class Product>
void gemm_block(const Product& product, Range rows, Range columns) {
  // To copy the description would take a noticeable part of the time of a small product.
  if (rows.count == product.c.count() && columns.count == product.column_range().count) {
    return gemm_serial(product);
  }
  const PartEpilogue epilogue{product.epilogue, rows.first, 0};
  Product block = product;
  block.a = product.a.slice(rows.first, rows.count);
  block.c = product.c.slice(rows.first, rows.count);
  block.columns = columns;
  if constexpr (requires { block.bias; }) block.bias = product.bias.at(rows.first, 0);
  block.epilogue = epilogue.get();
  gemm_serial(block);
}

struct ProductShape {
  Index rows = 0;
  Index columns = 0;
};

/// Throws std::invalid_argument unless C has the shape of the product of A and B, each as it is multiplied.
inline void check_product_shapes(const char* form, ProductShape a, ProductShape b, ProductShape c) {
  require(a.columns == b.rows, form, ": A, transposed where the form says so, is ", a.rows, " x ",
          a.columns, ", so B, likewise, must have ", a.columns, " rows, and has ", b.rows);
  require(c.rows == a.rows && c.columns == b.columns, form, ": C is ", c.rows, " x ", c.columns,
          ", must be ", a.rows, " x ", b.columns);
}

/// C = A·B on all workers.
template <class Scalar, class B>
void gemm(const GemmNN<Scalar, B>& product) {
  const Index rows = product.c.count();
  const Index width = product.c.width();
  check_product_shapes("gemm(GemmNN)", {product.a.count(), product.a.width()},
                       {product.b.rows, product.b.columns}, {rows, width});
  const Range columns = product.column_range();
  // Where few rows are multiplied on one worker, it reads all of B sequentially.
  bool whole = false;
  if constexpr (std::is_same_v<B, MatrixOperand<Scalar>>) {
    whole = columns.count == width && worker_count(Work{rows * width * product.a.width()}) == 1 &&
            is_small_m<Scalar>(rows, width, product.b.stride);
  }
  for_each_block({0, rows}, columns, product.a.width(), whole ? width : 2 * panel_columns<Scalar>,
                 [&](Range block_rows, Range block_columns) {
                   gemm_block(product, block_rows, block_columns);
                 });
}

/// C = A·Bᵀ on all workers.
template <class Scalar, class B>
void gemm(const GemmNT<Scalar, B>& product) {
  check_product_shapes("gemm(GemmNT)", {product.a.count(), product.a.width()},
                       {product.b.columns, product.b.rows}, {product.c.count(), product.c.width()});
  for_each_block({0, product.c.count()}, product.column_range(), product.a.width(),
                 panel_columns<Scalar>, [&](Range block_rows, Range block_columns) {
                   gemm_block(product, block_rows, block_columns);
                 });
}

/// C = Aᵀ·B on all workers.
template <class Scalar>
void gemm(const GemmTN<Scalar>& product) {
  check_product_shapes("gemm(GemmTN)", {product.a.width(), product.a.count()},
                       {product.b.count(), product.b.width()},
                       {product.c.rows(), product.c.cols()});
  const Range rows = product.row_range();
  const Range columns = product.column_range();
  for_each_block(rows, columns, product.a.count(), 2 * panel_columns<Scalar>,
                 [&](Range block_rows, Range block_columns) {
                   if (block_rows.count == rows.count && block_columns.count == columns.count) {
                     return gemm_serial(product);
                   }
                   gemm_serial(GemmTN<Scalar>{.a = product.a,
                                              .b = product.b,
                                              .c = product.c,
                                              .rows = block_rows,
                                              .columns = block_columns,
                                              .start = product.start});
                 });
}

}  // namespace moe::detail

namespace moe {

// For those who write gates and networks: `gemm(moe::GemmNN<float>{.a = x, .b = weight, .c = y})`.
using detail::gemm;
using detail::gemm_serial;
using detail::GemmNN;
using detail::GemmNT;
using detail::GemmTN;
using detail::Start;

}  // namespace moe

MOE_PACKETS_END
