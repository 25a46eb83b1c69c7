#pragma once

#include <span>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/nn/gather_rows.hpp"

namespace moe {

/// The rows of a padded batch that are not padding. Packed, they can be the input of a layer that has no
/// mask for padding.
struct PackedRows {
  std::vector<Index> rows;  ///< ascending, each at least 0

  Index count() const { return static_cast<Index>(rows.size()); }  ///< the number of real rows

  /// Sets the rows to those whose entry of `numbers` is not negative.
  void assign(IndexSpan numbers) {
    rows.clear();
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      if (numbers[i] >= 0) rows.push_back(static_cast<Index>(i));
    }
  }

  /// packed[i] = padded[rows[i]]. The padding is not read. Throws std::invalid_argument if `rows`
  /// names a row that `padded` does not have, or if both are one matrix.
  template <class Scalar>
  void pack(const Matrix<Scalar>& padded, Matrix<Scalar>& packed) const {
    check(padded.rows());
    detail::require(&packed != &padded, "PackedRows::pack: a matrix cannot be packed into itself");
    detail::copy_rows<Scalar>(padded, rows, packed);
  }

  /// Sets padded to T rows: padded[rows[i]] = packed[i], and the others are 0. unpack() of
  /// gradients is the backward of pack(), and pack() that of unpack(). Throws std::invalid_argument
  /// if the rows do not fit, or if both are one matrix.
  template <class Scalar>
  void unpack(const Matrix<Scalar>& packed, Index T, Matrix<Scalar>& padded) const {
    check(T);
    detail::require(&packed != &padded,
                    "PackedRows::unpack: a matrix cannot be unpacked into itself");
    detail::require(packed.rows() == count(), "PackedRows::unpack: packed has ", packed.rows(),
                    " rows, must have ", count());
    detail::resize_to_zero(padded, T, packed.cols());
    for (Index i = 0; i < count(); ++i) padded.row(rows[detail::to_size(i)]) = packed.row(i);
  }

 private:
  void check(Index T) const {
    if (rows.empty()) return;
    for (const Index row : {rows.front(), rows.back()}) {
      detail::require(row >= 0 && row < T, "PackedRows: row = ", row, ", must be in [0, ", T, ")");
    }
  }
};

}  // namespace moe
