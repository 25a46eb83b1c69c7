#pragma once

#include <algorithm>
#include <vector>

#include "moe/matrix.hpp"

/// \file
/// The part of a tensor that is a parameter: reading and writing it.

namespace moe::detail {

/// A parameter p as part of a tensor. The tensor is read as a matrix t whose columns are its last
/// dimension:
///
///     p(i, j) = t(first_row + i·row_step, first_column + j·column_step), or, transposed,
///     p(i, j) = t(first_row + j·row_step, first_column + i·column_step)
struct Slice {
  Index first_row = 0;
  Index row_step = 1;
  Index first_column = 0;
  Index column_step = 1;
  bool transposed = false;

  friend bool operator==(const Slice&, const Slice&) = default;
};

/// Fills p. Reads the tensor's rows in blocks, by read_rows(first, count, Scalar* to), so that no more than
/// 2^16 numbers, or one row if it is longer, are in memory besides p.
template <class Scalar, class ReadRows>
void read_slice(const Slice& slice, Index tensor_columns, ReadRows&& read_rows, Matrix<Scalar>& p) {
  constexpr Index most = Index{1} << 16;
  const Index rows = slice.transposed ? p.cols() : p.rows();
  const Index columns = slice.transposed ? p.rows() : p.cols();
  if (p.size() == 0) return;
  const Index block = std::clamp<Index>(most / (tensor_columns * slice.row_step), 1, rows);
  std::vector<Scalar> numbers;
  for (Index first = 0; first < rows; first += block) {
    const Index count = std::min(block, rows - first);
    const Index read = (count - 1) * slice.row_step + 1;
    numbers.resize(to_size(read * tensor_columns));
    read_rows(slice.first_row + first * slice.row_step, read, numbers.data());
    const Index row_stride = slice.row_step * tensor_columns;
    const Scalar* const from = numbers.data() + slice.first_column;
    if (slice.transposed) {
      // A few columns at a time: rows whose distance is a multiple of a large power of two compete for the
      // same few sets of a cache, both those that are read and those that are written.
      constexpr Index tile = 4;
      for (Index tile_first = 0; tile_first < columns; tile_first += tile) {
        const Index tile_end = std::min(tile_first + tile, columns);
        for (Index r = 0; r < count; ++r) {
          for (Index c = tile_first; c < tile_end; ++c) {
            row_data(p, c)[first + r] = from[r * row_stride + c * slice.column_step];
          }
        }
      }
    } else {
      for (Index r = 0; r < count; ++r) {
        Scalar* const to = row_data(p, first + r);
        for (Index c = 0; c < columns; ++c) to[c] = from[r * row_stride + c * slice.column_step];
      }
    }
  }
}

/// Writes p to the part of t that read_slice() reads.
template <class Scalar>
void write_slice(const Slice& slice, const Matrix<Scalar>& p, Matrix<Scalar>& tensor) {
  for (Index i = 0; i < p.rows(); ++i) {
    for (Index j = 0; j < p.cols(); ++j) {
      const Index row = slice.first_row + (slice.transposed ? j : i) * slice.row_step;
      const Index column = slice.first_column + (slice.transposed ? i : j) * slice.column_step;
      tensor(row, column) = p(i, j);
    }
  }
}

}  // namespace moe::detail
