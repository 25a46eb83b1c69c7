#include "moe/io/pretrained/slice.hpp"

#include <algorithm>

#include "../../support.hpp"

using namespace moe;
using namespace moe::test;
using detail::Slice;

namespace {

/// p by the formula of Slice, an entry at a time.
Matrix<double> by_formula(const Slice& s, const Matrix<double>& t, Index rows, Index columns) {
  Matrix<double> p(rows, columns);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < columns; ++j) {
      p(i, j) = s.transposed ? t(s.first_row + j * s.row_step, s.first_column + i * s.column_step)
                             : t(s.first_row + i * s.row_step, s.first_column + j * s.column_step);
    }
  }
  return p;
}

void check(const Slice& slice, Index tensor_rows, Index tensor_columns, Index rows, Index columns) {
  const Matrix<double> tensor = random_matrix(tensor_rows, tensor_columns, 1);
  Index largest = 0;
  const auto read_rows = [&](Index first, Index count, double* to) {
    CHECK((first >= 0 && count >= 1 && first + count <= tensor_rows));
    largest = std::max(largest, count * tensor_columns);
    std::copy_n(detail::row_data(tensor, first), count * tensor_columns, to);
  };
  Matrix<double> p(rows, columns);
  detail::read_slice(slice, tensor_columns, read_rows, p);
  CHECK(p == by_formula(slice, tensor, rows, columns));
  CHECK(largest <= std::max<Index>(Index{1} << 16, tensor_columns));

  Matrix<double> written = Matrix<double>::Constant(tensor_rows, tensor_columns, 1e9);
  detail::write_slice(slice, p, written);
  // What was read is there again, and nothing else was written.
  const auto is_same = (written.array() == tensor.array()).eval();
  CHECK(is_same.count() == rows * columns);
  CHECK((is_same || written.array() == 1e9).all());
}

}  // namespace

TEST_CASE("slices: all of a tensor and parts of it, there and back", "[io][pretrained]") {
  check({}, 5, 7, 5, 7);
  check({.transposed = true}, 5, 7, 7, 5);
  check({.first_row = 2, .first_column = 3}, 5, 7, 3, 2);
  check({.first_row = 1, .row_step = 2, .first_column = 1, .column_step = 3}, 9, 11, 4, 3);
  check({.first_row = 1, .row_step = 2, .first_column = 1, .column_step = 3, .transposed = true}, 9,
        11, 3, 4);
  check({}, 1, 1, 1, 1);
}

TEST_CASE("slices: a tensor larger than a block comes in several", "[io][pretrained]") {
  check({.transposed = true}, 700, 300, 300, 700);
  check({.first_row = 1, .row_step = 2, .transposed = true}, 702, 300, 300, 350);
  check({.first_row = 3, .first_column = 100}, 503, 200, 500, 100);
  // A row alone is longer than a block.
  check({.transposed = true}, 2, 70000, 70000, 2);
}

TEST_CASE("slices: nothing is read for a parameter without entries", "[io][pretrained]") {
  Matrix<double> p(0, 3);
  detail::read_slice(
      {}, 3, [](Index, Index, double*) { CHECK(false); }, p);
  CHECK(p.size() == 0);
}
