#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "moe/config.hpp"

/// \file
/// Matrices and views of them.
///
/// The letters that shapes are written in, here and in every other file:
///
///     T  tokens, the rows of a batch          E  experts
///     D  width of the model                   K  experts chosen for a token
///     H  hidden width of an expert            S  slots; a slot is one (token, expert) pair,
///                                                S = T·K when nothing is dropped

namespace moe {

using Eigen::Index;

/// Dense and row-major, one token per row: the memory of a NumPy array or a PyTorch tensor.
template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// A dense column of numbers.
template <class Scalar>
using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

/// A matrix argument that is only read. A row-major matrix, block or map is taken as it is; any
/// other expression is evaluated into a temporary, which costs an allocation.
template <class Scalar>
using MatrixRef = Eigen::Ref<const Matrix<Scalar>>;

/// A view, as a matrix, of memory that it does not own, to read and to write.
template <class Scalar>
using MatrixView = Eigen::Map<Matrix<Scalar>, Eigen::Unaligned, Eigen::OuterStride<>>;
/// A view, as a matrix, of memory that it does not own, to read only.
template <class Scalar>
using ConstMatrixView = Eigen::Map<const Matrix<Scalar>, Eigen::Unaligned, Eigen::OuterStride<>>;

/// Ids, targets or other whole numbers that are only read: a vector, array or span of Index. Another
/// integer type has another memory layout; passing it does not compile, and the message says why.
class IndexSpan : public std::span<const Index> {
 public:
  using std::span<const Index>::span;
  /// Refers to these numbers, which must outlive it.
  IndexSpan(std::span<const Index> numbers)  // NOLINT(google-explicit-constructor)
      : std::span<const Index>(numbers) {}

  /// For numbers of another integer type, refused when compiled: see the class.
  template <class Numbers>
  requires requires(const Numbers& numbers) {
    requires std::integral<typename decltype(std::span(numbers))::value_type>;
    requires !std::convertible_to<const Numbers&, std::span<const Index>>;
  }
  /// For numbers of another integer type, refused when compiled: see the class.
  IndexSpan(const Numbers&) {  // NOLINT(google-explicit-constructor)
    static_assert(std::is_void_v<Numbers>,
                  "ids and targets are of type moe::Index (std::ptrdiff_t): make them a "
                  "std::vector<moe::Index>, not one of int or another integer");
  }
};

/// Rows, columns or other things first, first + 1, ..., first + count - 1.
struct Range {
  Index first = 0;  ///< the first of them
  Index count = 0;  ///< how many there are, >= 0
};

namespace detail {

/// The smallest multiple of `unit` that is at least `count`.
constexpr Index round_up(Index count, Index unit) { return (count + unit - 1) / unit * unit; }

/// The part that both have; if there is none, an empty range that begins at the larger `first`.
inline Range common_range(Range a, Range b) {
  const Index first = std::max(a.first, b.first);
  const Index end = std::min(a.first + a.count, b.first + b.count);
  return {first, std::max<Index>(0, end - first)};
}

/// The start of column `first`. Without rows it is `data`, which may be null.
template <class Entry>
Entry* column_data(Entry* data, Index rows, Index first) {
  return rows > 0 ? data + first : data;
}

}  // namespace detail

/// `count` whole rows from row `first` on.
template <class Scalar>
MatrixView<Scalar> rows_of(Matrix<Scalar>& matrix, Index first, Index count) {
  MOE_ASSERT(first >= 0 && count >= 0 && first + count <= matrix.rows());
  return {matrix.data() + first * matrix.cols(), count, matrix.cols(),
          Eigen::OuterStride<>(matrix.cols())};
}
/// The same for a matrix that is only read.
template <class Scalar>
ConstMatrixView<Scalar> rows_of(const Matrix<Scalar>& matrix, Index first, Index count) {
  MOE_ASSERT(first >= 0 && count >= 0 && first + count <= matrix.rows());
  return {matrix.data() + first * matrix.cols(), count, matrix.cols(),
          Eigen::OuterStride<>(matrix.cols())};
}
/// The whole matrix as a view.
template <class Scalar>
MatrixView<Scalar> view(Matrix<Scalar>& matrix) {
  return rows_of(matrix, 0, matrix.rows());
}
/// The same for a matrix that is only read.
template <class Scalar>
ConstMatrixView<Scalar> view(const Matrix<Scalar>& matrix) {
  return rows_of(matrix, 0, matrix.rows());
}

/// `count` whole rows of a view from row `first` on.
template <class Scalar>
MatrixView<Scalar> rows_of(MatrixView<Scalar> matrix, Index first, Index count) {
  MOE_ASSERT(first >= 0 && count >= 0 && first + count <= matrix.rows());
  return {matrix.data() + first * matrix.outerStride(), count, matrix.cols(),
          Eigen::OuterStride<>(matrix.outerStride())};
}

/// `count` columns of a view from column `first` on.
template <class Scalar>
MatrixView<Scalar> columns_of(MatrixView<Scalar> matrix, Index first, Index count) {
  MOE_ASSERT(first >= 0 && count >= 0 && first + count <= matrix.cols());
  return {detail::column_data(matrix.data(), matrix.rows(), first), matrix.rows(), count,
          Eigen::OuterStride<>(matrix.outerStride())};
}
/// The same for a view that is only read.
template <class Scalar>
ConstMatrixView<Scalar> columns_of(ConstMatrixView<Scalar> matrix, Index first, Index count) {
  MOE_ASSERT(first >= 0 && count >= 0 && first + count <= matrix.cols());
  return {detail::column_data(matrix.data(), matrix.rows(), first), matrix.rows(), count,
          Eigen::OuterStride<>(matrix.outerStride())};
}

namespace detail {

/// What GatheredRows and ScatteredRows have in common: `Rows` is one of them, `Entry` the type of
/// its numbers, const where rows are only read.
template <class Rows, class Entry>
class ListedRows {
 public:
  Index count() const { return count_; }
  Index width() const { return width_; }
  Entry* row(Index i) const { return data_ + (list_ ? list_[i] : i) * stride_; }

  Rows slice(Index first, Index count) const {
    return {list_ ? data_ : data_ + first * stride_, stride_, count, width_,
            list_ ? list_ + first : nullptr};
  }
  Rows columns(Index first, Index count) const {
    return {column_data(data_, count_, first), stride_, count_, count, list_};
  }

 protected:
  ListedRows(Entry* data, Index stride, Index count, Index width, const Index* list)
      : data_(data), stride_(stride), count_(count), width_(width), list_(list) {}

  Entry* data_;
  Index stride_;
  Index count_;
  Index width_;
  const Index* list_;
};

}  // namespace detail

/// Chosen rows of a matrix in the order of a list, which may name a row twice; without a list, all
/// rows in their own order. A view: neither the matrix nor the list is copied. Has count(), width(),
/// row(i), slice(first, count) of the rows and columns(first, count).
template <class Scalar>
class GatheredRows : public detail::ListedRows<GatheredRows<Scalar>, const Scalar> {
 public:
  /// `count` rows of `width` numbers each. Row i starts at `data + list[i]·stride`, without a
  /// list at `data + i·stride`.
  GatheredRows(const Scalar* data, Index stride, Index count, Index width,
               const Index* list = nullptr)
      : detail::ListedRows<GatheredRows, const Scalar>(data, stride, count, width, list) {}

  /// All rows of a row-major matrix, block or map.
  template <class Derived>
  GatheredRows(const Eigen::MatrixBase<Derived>& matrix)  // NOLINT(google-explicit-constructor)
      : GatheredRows(matrix.derived().data(), matrix.derived().outerStride(), matrix.rows(),
                     matrix.cols()) {
    static_assert(Derived::IsRowMajor && Derived::InnerStrideAtCompileTime == 1);
  }

  /// `count` rows of a row-major matrix, block or map in the order of `list`.
  template <class Derived>
  GatheredRows(const Eigen::MatrixBase<Derived>& matrix, const Index* list, Index count)
      : GatheredRows(matrix.derived().data(), matrix.derived().outerStride(), count, matrix.cols(),
                     list) {
    static_assert(Derived::IsRowMajor && Derived::InnerStrideAtCompileTime == 1);
  }
};

/// Chosen rows of a matrix to write to, in the order of a list, which names no row twice; without a
/// list, all rows in their own order. A view, like GatheredRows.
template <class Scalar>
class ScatteredRows : public detail::ListedRows<ScatteredRows<Scalar>, Scalar> {
 public:
  /// `count` rows of `width` numbers each, which start where those of GatheredRows do.
  ScatteredRows(Scalar* data, Index stride, Index count, Index width, const Index* list = nullptr)
      : detail::ListedRows<ScatteredRows, Scalar>(data, stride, count, width, list) {}

  /// All rows of a matrix.
  ScatteredRows(Matrix<Scalar>& matrix)  // NOLINT(google-explicit-constructor)
      : ScatteredRows(matrix.data(), matrix.outerStride(), matrix.rows(), matrix.cols()) {}
  /// All rows of a view.
  ScatteredRows(MatrixView<Scalar> matrix)  // NOLINT(google-explicit-constructor)
      : ScatteredRows(matrix.data(), matrix.outerStride(), matrix.rows(), matrix.cols()) {}

  /// The distance in numbers between rows i and i + 1, or 0 if there is a list.
  Index step() const { return this->list_ ? 0 : this->stride_; }
};

namespace detail {

constexpr std::size_t to_size(Index index) { return static_cast<std::size_t>(index); }

/// Where row i of a row-major matrix or view starts.
template <class Matrix>
auto* row_data(Matrix&& matrix, Index i) {
  return matrix.data() + i * matrix.outerStride();
}

// What the library itself does to whole matrices. Eigen's assignments do the same, but each of them
// takes about a twentieth of the time to compile a program that trains a layer.

/// Resizes scratch memory, whose contents may be lost; like Eigen's resize it keeps its memory when
/// the size stays. Not inline, since a pass resizes some dozen matrices. Memory of another size is
/// released before new memory is taken, so both never exist at once, and std::bad_alloc leaves an
/// empty matrix. (Eigen's own resize leaves one that points to memory it has freed.)
template <class Scalar>
MOE_NOINLINE void resize(Matrix<Scalar>& matrix, Index rows, Index columns) {
  if (matrix.size() != rows * columns) matrix.resize(0, 0);
  matrix.resize(rows, columns);
}
template <class Scalar>
MOE_NOINLINE void resize(Vector<Scalar>& vector, Index size) {
  if (vector.size() != size) vector.resize(0);
  vector.resize(size);
}
template <class Value>
MOE_NOINLINE void reserve(std::vector<Value>& vector, Index size) {
  if (vector.capacity() >= to_size(size)) return;
  std::vector<Value>().swap(vector);
  vector.reserve(to_size(size));
}
template <class Value>
MOE_NOINLINE void resize(std::vector<Value>& vector, Index size) {
  reserve(vector, size);
  vector.resize(to_size(size));
}

/// These set all elements to one value.
template <class Scalar>
MOE_NOINLINE void resize_to_zero(Matrix<Scalar>& matrix, Index rows, Index columns) {
  resize(matrix, rows, columns);
  std::fill_n(matrix.data(), matrix.size(), Scalar{0});
}
template <class Scalar>
MOE_NOINLINE void resize_to_zero(Vector<Scalar>& vector, Index size) {
  resize(vector, size);
  std::fill_n(vector.data(), size, Scalar{0});
}
template <class Value>
MOE_NOINLINE void assign(std::vector<Value>& vector, Index size, Value value) {
  reserve(vector, size);
  vector.assign(to_size(size), value);
}
template <class Scalar>
MOE_NOINLINE Matrix<Scalar> zeros(Index rows, Index columns) {
  Matrix<Scalar> matrix;
  resize_to_zero(matrix, rows, columns);
  return matrix;
}

/// The addresses from a first element up to just after the last.
struct MemoryRange {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;

  template <class Value>
  MemoryRange(const Value* first, Index count)
      : begin(reinterpret_cast<std::uintptr_t>(first)),
        end(begin + to_size(std::max<Index>(0, count)) * sizeof(Value)) {}
  template <class Derived>
  MemoryRange(const Eigen::MatrixBase<Derived>& matrix)  // NOLINT(google-explicit-constructor)
      : MemoryRange(matrix.derived().data(),
                    matrix.size() == 0
                        ? 0
                        : (matrix.rows() - 1) * matrix.derived().outerStride() + matrix.cols()) {}
  template <class Value>
  MemoryRange(const std::vector<Value>& vector)  // NOLINT(google-explicit-constructor)
      : MemoryRange(vector.data(), static_cast<Index>(vector.size())) {}
  template <class Value>
  MemoryRange(std::span<Value> numbers)  // NOLINT(google-explicit-constructor)
      : MemoryRange(numbers.data(), static_cast<Index>(numbers.size())) {}

  bool overlaps(const MemoryRange& other) const { return begin < other.end && other.begin < end; }
};

/// Throws std::invalid_argument if an argument of a call overlaps memory that the call writes to or
/// resizes: it would read numbers that it has overwritten, or memory that it has freed.
MOE_NOINLINE inline void require_apart(std::string_view verb, std::string_view argument,
                                       const MemoryRange& of_argument,
                                       std::initializer_list<MemoryRange> written) {
  for (const MemoryRange& range : written) {
    require(
        !of_argument.overlaps(range), verb, ": ", argument,
        " overlaps memory that this call writes to; pass a copy, or use another tape or another "
        "matrix for the result");
  }
}

/// to = from, which may be all of `to`. Throws std::invalid_argument if `from` is a part of `to`,
/// but not all of it.
template <class Scalar>
void copy_matrix(const MatrixRef<Scalar>& from, Matrix<Scalar>& to) {
  if (from.data() == to.data() && from.rows() == to.rows() && from.cols() == to.cols()) return;
  require_apart("copying an argument for backward", "the argument", from, {to});
  resize(to, from.rows(), from.cols());
  for (Index i = 0; i < from.rows(); ++i) {
    std::copy_n(row_data(from, i), from.cols(), row_data(to, i));
  }
}
template <class Value>
void copy_vector(std::span<const Value> from, std::vector<Value>& to) {
  resize(to, static_cast<Index>(from.size()));
  std::copy(from.begin(), from.end(), to.begin());
}

/// A factor for each row of a matrix: 1 where none are given.
template <class Scalar>
struct RowFactors {
  static constexpr Scalar one{1};
  const Scalar* data = &one;
  Index step = 0;  ///< the distance between the factors of rows i and i + 1

  const Scalar* at(Index row) const { return data + row * step; }
  RowFactors from(Index row) const { return {at(row), step}; }
};

/// Numbers in a cache line.
template <class Scalar>
inline constexpr auto cache_line = static_cast<Index>(64 / sizeof(Scalar));

/// A distance between rows of `width` numbers: `width`, or a cache line more where rows would begin a
/// multiple of 1 KiB apart. Such rows compete for the same few sets of a cache.
template <class Scalar>
constexpr Index padded_stride(Index width) {
  constexpr Index line = cache_line<Scalar>;
  return width > 0 && width % (16 * line) == 0 ? width + line : width;
}

}  // namespace detail
}  // namespace moe
