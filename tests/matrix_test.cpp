#include "moe/matrix.hpp"

#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"

using namespace moe;

namespace {

/// Entry (i, j) is 100·i + j, so a wrong stride or offset shows in the value.
template <class Scalar>
Matrix<Scalar> numbered(Index rows, Index columns) {
  Matrix<Scalar> matrix(rows, columns);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < columns; ++j) matrix(i, j) = static_cast<Scalar>(100 * i + j);
  }
  return matrix;
}

}  // namespace

TEMPLATE_TEST_CASE("matrix: memory is row by row", "[matrix]", float, double) {
  const auto matrix = numbered<TestType>(3, 5);
  for (Index i = 0; i < matrix.size(); ++i) {
    CHECK(matrix.data()[i] == static_cast<TestType>(100 * (i / 5) + i % 5));
  }
  CHECK(detail::row_data(matrix, 2) == &matrix(2, 0));
  CHECK(detail::row_data(matrix.block(1, 2, 2, 3), 1) == &matrix(2, 2));
}

TEMPLATE_TEST_CASE("matrix: views show and change the rows and columns they name", "[matrix]",
                   float, double) {
  Matrix<TestType> matrix = numbered<TestType>(6, 7);
  const Matrix<TestType> original = matrix;

  CHECK(view(original) == original);
  CHECK(view(original).data() == original.data());
  CHECK(rows_of(original, 2, 3) == original.middleRows(2, 3));
  CHECK(columns_of(view(original), 3, 2) == original.middleCols(3, 2));
  CHECK(columns_of(rows_of(original, 1, 4), 2, 5) == original.block(1, 2, 4, 5));
  // A view of a view keeps the stride of the matrix.
  CHECK(columns_of(columns_of(view(original), 1, 5), 2, 3) == original.middleCols(3, 3));

  columns_of(rows_of(matrix, 1, 4), 2, 3).setConstant(-1);
  for (Index i = 0; i < 6; ++i) {
    for (Index j = 0; j < 7; ++j) {
      const bool inside = i >= 1 && i < 5 && j >= 2 && j < 5;
      CHECK(matrix(i, j) == (inside ? TestType{-1} : original(i, j)));
    }
  }
}

TEST_CASE("matrix: views may be empty at either end", "[matrix]") {
  Matrix<float> matrix = numbered<float>(4, 3);
  for (const Index first : {Index{0}, Index{4}}) {
    CHECK(rows_of(matrix, first, 0).rows() == 0);
    CHECK(rows_of(matrix, first, 0).cols() == 3);
  }
  CHECK(columns_of(view(matrix), 3, 0).cols() == 0);
  Matrix<float> nothing(0, 3);
  CHECK(view(nothing).size() == 0);
  // Such a matrix has no memory.
  CHECK(columns_of(view(nothing), 1, 2).data() == nullptr);
  CHECK(columns_of(view(std::as_const(nothing)), 1, 2).cols() == 2);
  CHECK(GatheredRows<float>(nothing).columns(1, 2).width() == 2);
}

TEST_CASE("matrix: a view of a const matrix cannot be written", "[matrix]") {
  Matrix<float> matrix(1, 1);
  STATIC_REQUIRE(std::is_same_v<decltype(view(matrix)), MatrixView<float>>);
  STATIC_REQUIRE(std::is_same_v<decltype(view(std::as_const(matrix))), ConstMatrixView<float>>);
  STATIC_REQUIRE(
      std::is_same_v<decltype(rows_of(std::as_const(matrix), 0, 1)), ConstMatrixView<float>>);
}

TEST_CASE("matrix: a row-major argument is taken without a copy", "[matrix]") {
  const Matrix<double> matrix = numbered<double>(4, 5);
  const auto data = [](const MatrixRef<double>& argument) { return argument.data(); };
  CHECK(data(matrix) == matrix.data());
  CHECK(data(matrix.middleRows(1, 2)) == &matrix(1, 0));
  CHECK(data(matrix.block(1, 2, 2, 3)) == &matrix(1, 2));
  CHECK(data(rows_of(matrix, 2, 1)) == &matrix(2, 0));
}

TEMPLATE_TEST_CASE("matrix: gathered rows follow their list", "[matrix]", float, double) {
  const Matrix<TestType> matrix = numbered<TestType>(6, 7);
  const std::array<Index, 5> list = {4, 0, 4, 5, 1};

  SECTION("all rows in their order without a list") {
    const GatheredRows<TestType> rows(matrix);
    CHECK(rows.count() == 6);
    CHECK(rows.width() == 7);
    for (Index i = 0; i < 6; ++i) CHECK(rows.row(i) == &matrix(i, 0));
    const auto slice = rows.slice(2, 3);
    CHECK(slice.count() == 3);
    CHECK(slice.width() == 7);
    for (Index i = 0; i < 3; ++i) CHECK(slice.row(i) == &matrix(2 + i, 0));
    CHECK(slice.slice(1, 1).row(0) == &matrix(3, 0));
  }
  SECTION("rows of a list, with repeats") {
    const GatheredRows<TestType> rows(matrix, list.data(), 5);
    CHECK(rows.count() == 5);
    CHECK(rows.width() == 7);
    for (Index i = 0; i < 5; ++i) CHECK(rows.row(i) == &matrix(list[detail::to_size(i)], 0));
    const auto slice = rows.slice(1, 3);
    CHECK(slice.count() == 3);
    for (Index i = 0; i < 3; ++i) CHECK(slice.row(i) == &matrix(list[detail::to_size(i + 1)], 0));
    CHECK(slice.slice(2, 1).row(0) == &matrix(5, 0));
  }
  SECTION("of a block and of a view, with their stride") {
    const GatheredRows<TestType> block(matrix.block(1, 2, 5, 4), list.data(), 2);
    CHECK(block.width() == 4);
    CHECK(block.row(0) == &matrix(5, 2));
    const GatheredRows<TestType> columns(columns_of(view(matrix), 3, 2));
    CHECK(columns.count() == 6);
    CHECK(columns.width() == 2);
    CHECK(columns.row(4) == &matrix(4, 3));
  }
  SECTION("none") {
    CHECK(GatheredRows<TestType>(matrix, list.data(), 0).count() == 0);
    CHECK(GatheredRows<TestType>(matrix).slice(6, 0).count() == 0);
  }
}

TEST_CASE("matrix: a scratch vector keeps its memory when it shrinks", "[matrix]") {
  std::vector<float> scratch;
  detail::resize(scratch, 100);
  CHECK(scratch.size() == 100);
  const float* memory = scratch.data();
  detail::resize(scratch, 10);
  CHECK(scratch.size() == 10);
  detail::resize(scratch, 100);
  CHECK(scratch.data() == memory);
}

TEST_CASE("matrix: rows a large power of two apart are spread by a cache line", "[matrix]") {
  CHECK(detail::padded_stride<float>(0) == 0);
  CHECK(detail::padded_stride<float>(1) == 1);
  CHECK(detail::padded_stride<float>(255) == 255);
  CHECK(detail::padded_stride<float>(256) == 272);  // 1024 bytes and 64
  CHECK(detail::padded_stride<float>(272) == 272);
  CHECK(detail::padded_stride<float>(2048) == 2064);
  CHECK(detail::padded_stride<double>(64) == 64);
  CHECK(detail::padded_stride<double>(128) == 136);
}

TEMPLATE_TEST_CASE("matrix: copies and zeros", "[matrix]", float, double) {
  const auto original = numbered<TestType>(6, 7);
  Matrix<TestType> copy;
  detail::copy_matrix<TestType>(original.block(1, 2, 4, 3), copy);
  CHECK(copy == original.block(1, 2, 4, 3));
  const TestType* memory = copy.data();
  detail::copy_matrix<TestType>(copy, copy);  // a pass over what is on the tape already
  CHECK(copy == original.block(1, 2, 4, 3));
  CHECK(copy.data() == memory);
  detail::copy_matrix<TestType>(original.topRows(0), copy);
  CHECK(copy.rows() == 0);
  CHECK(copy.cols() == 7);

  copy = original;
  detail::resize_to_zero(copy, 3, 2);
  CHECK(copy == Matrix<TestType>::Zero(3, 2));
  Vector<TestType> vector = Vector<TestType>::Ones(5);
  detail::resize_to_zero(vector, 4);
  CHECK(vector == Vector<TestType>::Zero(4));
  CHECK(detail::zeros<TestType>(2, 0).cols() == 0);
  CHECK(detail::zeros<TestType>(2, 3) == Matrix<TestType>::Zero(2, 3));
}

TEMPLATE_TEST_CASE("matrix: some columns of gathered rows", "[matrix]", float, double) {
  const auto matrix = numbered<TestType>(6, 7);
  const std::array<Index, 3> list{4, 0, 4};
  const GatheredRows<TestType> rows(matrix, list.data(), 3);
  const GatheredRows<TestType> columns = rows.slice(1, 2).columns(2, 3);
  CHECK(columns.count() == 2);
  CHECK(columns.width() == 3);
  CHECK(columns.row(0)[0] == matrix(0, 2));
  CHECK(columns.row(1)[2] == matrix(4, 4));
}
