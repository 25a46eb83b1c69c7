#pragma once

#include "moe/function_ref.hpp"
#include "moe/matrix.hpp"

/// \file
/// What a matrix product computes, in the three forms that a layer and its gradient need, named as
/// in BLAS:
///
///     GemmNN   C[M,N] = A[M,K] · B[K,N]       forward
///     GemmNT   C[M,N] = A[M,K] · B[N,K]ᵀ      gradient with respect to the input
///     GemmTN   C[M,N] = A[K,M]ᵀ · B[K,N]      gradient with respect to the weights
///
/// gemm() computes one on all workers, gemm_serial() on the calling thread.

namespace moe::detail {

/// The initial value of an element of C: zero, or what C holds.
enum class Start { zero, accumulate };
/// The initial value for a gradient that a pass overwrites (`replace`) or adds to.
constexpr Start start_of(bool replace) { return replace ? Start::zero : Start::accumulate; }

/// A row of values that is added to all rows of C, times a factor of each row: one more
/// multiply-add, before the others, of a column of factors and a row of values. With null values
/// there is no bias.
template <class Scalar>
struct Bias {
  const Scalar* values = nullptr;
  RowFactors<Scalar> factors{};

  /// The bias of the part of C that begins at a row and a column.
  Bias at(Index row, Index column) const {
    return values == nullptr ? Bias{} : Bias{values + column, factors.from(row)};
  }
};

/// Called with (row, rows, column, width) for each tile of C once it is complete and while it is in
/// L1 or L2, for what comes after the product element by element. A tile has at most direct_rows
/// rows and tile_columns columns.
using Epilogue = FunctionRef<void(Index, Index, Index, Index)>;

/// The epilogue of C for a product that computes the part of C that begins at a row and a column.
struct PartEpilogue {
  Epilogue whole;
  Index row = 0;
  Index column = 0;

  void operator()(Index first, Index rows, Index first_column, Index width) const {
    whole(row + first, rows, column + first_column, width);
  }
  /// Refers to this object, which must outlive it.
  Epilogue get() const { return whole ? Epilogue(*this) : Epilogue(); }
};

/// A matrix that is read in place: row-major, its rows `stride` apart.
template <class Scalar>
struct MatrixOperand {
  const Scalar* data;
  Index rows;
  Index columns;
  Index stride;

  MatrixOperand(const Scalar* first, Index row_count, Index column_count, Index row_stride)
      : data(first), rows(row_count), columns(column_count), stride(row_stride) {}
  template <class Derived>
  MatrixOperand(const Eigen::MatrixBase<Derived>& matrix)  // NOLINT(google-explicit-constructor)
      : MatrixOperand(matrix.derived().data(), matrix.rows(), matrix.cols(),
                      matrix.derived().outerStride()) {
    static_assert(Derived::IsRowMajor && Derived::InnerStrideAtCompileTime == 1);
  }

  const Scalar* row(Index i) const { return data + i * stride; }
};

/// All rows or all columns of C.
inline constexpr Range whole_range{0, -1};

constexpr Range range_within(Range range, Index count) {
  return range.count < 0 ? Range{0, count} : range;
}

/// C = A·B, or some of its columns. B is a matrix, one of narrow weights, or in gemm_packed() any source of
/// packets.
template <class Scalar, class B = MatrixOperand<Scalar>>
struct GemmNN {
  GatheredRows<Scalar> a;   ///< M x K
  B b;                      ///< K x N
  ScatteredRows<Scalar> c;  ///< M x N
  /// Of C, from a multiple of cache_line on; with an epilogue, of panel_columns.
  Range columns = whole_range;
  Start start = Start::zero;
  Bias<Scalar> bias{};  ///< N values and maybe M factors
  Epilogue epilogue{};
  const Scalar* prefetch_next = nullptr;  ///< B of the next product, if it is of this kind

  Range column_range() const { return range_within(columns, c.width()); }
};

/// C = A·Bᵀ, or some of its columns.
template <class Scalar, class B = MatrixOperand<Scalar>>
struct GemmNT {
  GatheredRows<Scalar> a;   ///< M x K
  B b;                      ///< N x K
  ScatteredRows<Scalar> c;  ///< M x N
  /// Of C, from a multiple of cache_line on; with an epilogue, of panel_columns.
  Range columns = whole_range;
  Start start = Start::zero;
  Epilogue epilogue{};

  Range column_range() const { return range_within(columns, c.width()); }
};

/// C = Aᵀ·B, or some of its rows and columns: the sum over k of the products of row k of A and row
/// k of B.
template <class Scalar>
struct GemmTN {
  GatheredRows<Scalar> a;       ///< K x M
  GatheredRows<Scalar> b;       ///< K x N
  MatrixView<Scalar> c;         ///< M x N
  Range rows = whole_range;     ///< of C
  Range columns = whole_range;  ///< of C
  Start start = Start::zero;

  Range row_range() const { return range_within(rows, c.rows()); }
  Range column_range() const { return range_within(columns, c.cols()); }
};

}  // namespace moe::detail
