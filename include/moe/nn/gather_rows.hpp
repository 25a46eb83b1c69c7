#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "moe/matrix.hpp"

/// \file
/// Rows of a data set by their numbers, into the memory of a batch.

namespace moe {

namespace detail {

/// to[i] = from[rows[i]]. The rows must exist, and `to` must not be what is read.
template <class Scalar>
void copy_rows(const MatrixRef<Scalar>& from, std::span<const Index> rows, Matrix<Scalar>& to) {
  resize(to, static_cast<Index>(rows.size()), from.cols());
  for (Index i = 0; i < to.rows(); ++i) {
    std::copy_n(row_data(from, rows[to_size(i)]), to.cols(), row_data(to, i));
  }
}

/// Throws std::invalid_argument unless all rows are in [0, count).
inline void check_rows(std::span<const Index> rows, Index count) {
  for (const Index row : rows) {
    require(row >= 0 && row < count, "gather_rows: row = ", row, ", must be in [0, ", count, ")");
  }
}

}  // namespace detail

/// to[i] = from[rows[i]], whole rows of a matrix. Allocates only if the size of `to` changes, or if
/// `from` is not a row-major matrix, block or map. Throws std::invalid_argument, with `to`
/// unchanged, if there is no such row, or if `from` overlaps `to`.
template <class Derived, class Scalar>
void gather_rows(const Eigen::MatrixBase<Derived>& from, IndexSpan rows, Matrix<Scalar>& to) {
  const MatrixRef<Scalar> read(from.derived());
  detail::check_rows(rows, read.rows());
  detail::require_apart("gather_rows", "from", read, {to});
  detail::copy_rows<Scalar>(read, rows, to);
}
/// The same for a list of ids or labels, each of them a row. `rows` must not overlap `to` either.
inline void gather_rows(IndexSpan from, IndexSpan rows, std::vector<Index>& to) {
  detail::check_rows(rows, static_cast<Index>(from.size()));
  detail::require_apart("gather_rows", "from", from, {to});
  detail::require_apart("gather_rows", "rows", rows, {to});
  detail::resize(to, static_cast<Index>(rows.size()));
  for (std::size_t i = 0; i < to.size(); ++i) to[i] = from[detail::to_size(rows[i])];
}

}  // namespace moe
