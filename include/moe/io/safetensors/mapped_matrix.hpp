#pragma once

#include <cstddef>
#include <memory>
#include <utility>

#include "moe/matrix.hpp"

namespace moe {

/// A tensor of a mapped file as a matrix, without a copy; SafetensorsFile::mapped_matrix() makes it. The file stays
/// mapped as long as this or a copy of it exists, whatever becomes of the SafetensorsFile. What is true of
/// SafetensorsFile::map() is true of it: the numbers are read from the disk when they are first used, and a file
/// that is made shorter meanwhile ends the program by a signal.
template <class Scalar>
class MappedMatrix {
 public:
  /// `numbers`, row-major, are part of what `file` owns.
  MappedMatrix(std::shared_ptr<const std::byte> file, const Scalar* numbers, Index rows,
               Index columns)
      : file_(std::move(file)), numbers_(numbers), rows_(rows), columns_(columns) {}

  Index rows() const { return rows_; }     ///< of the matrix
  Index cols() const { return columns_; }  ///< of the matrix

  /// The matrix as an Eigen::Map, valid as long as this or a copy of it.
  ConstMatrixView<Scalar> view() const {
    return {numbers_, rows_, columns_, Eigen::OuterStride<>(columns_)};
  }

 private:
  std::shared_ptr<const std::byte> file_;
  const Scalar* numbers_;
  Index rows_;
  Index columns_;
};

}  // namespace moe
