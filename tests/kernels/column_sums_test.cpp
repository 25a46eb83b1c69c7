#include "moe/kernels/column_sums.hpp"

#include <vector>

#include "../support.hpp"

using namespace moe;

TEST_CASE("column sums are added to what is there", "[kernels][column_sums]") {
  Matrix<float> rows(3, 2);
  rows << 1, 10, 2, 20, 3, 30;
  Matrix<float> sums(1, 2);
  sums << 100, 1000;
  detail::add_column_sums(GatheredRows<float>(rows), sums);
  CHECK(sums(0, 0) == 106);
  CHECK(sums(0, 1) == 1060);
}

TEMPLATE_TEST_CASE("column sums are made of blocks in the order of the rows",
                   "[kernels][column_sums]", float, double) {
  const auto rows = test::random_matrix<TestType>(700, 500, 1);
  Matrix<double> total = Matrix<double>::Zero(1, 500);
  for (Index first = 0; first < 700; first += detail::summed_rows) {
    Matrix<TestType> block = Matrix<TestType>::Zero(1, 500);
    for (Index i = first; i < std::min<Index>(700, first + detail::summed_rows); ++i) {
      block += rows.row(i);
    }
    total += block.template cast<double>();
  }
  const Matrix<TestType> expected = total.template cast<TestType>();
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    Matrix<TestType> sums = Matrix<TestType>::Zero(1, 500);
    detail::add_column_sums(GatheredRows<TestType>(rows), sums);
    CHECK(test::same_bits(sums, expected));
  }
}

TEMPLATE_TEST_CASE("column sums: add_scaled_rows adds row after row", "[kernels][column_sums]",
                   float, double) {
  constexpr Index size = detail::packet_size<TestType>;
  for (const Index width :
       {Index{1}, size - 1, size, size + 1, 8 * size - 1, 8 * size, 8 * size + 1, 19 * size + 3}) {
    for (const Index count : {0, 1, 2, 9}) {
      INFO("width " << width << ", rows " << count);
      const Matrix<TestType> matrix = test::random_matrix<TestType>(11, width + 3, 1);
      const Matrix<TestType> factors = test::random_matrix<TestType>(11, 2, 2);
      const std::vector<Index> list = {4, 4, 0, 10, 7, 2, 9, 1, 4};
      const GatheredRows<TestType> rows =
          GatheredRows<TestType>(matrix, list.data(), count).columns(1, width);
      const Matrix<TestType> before = test::random_matrix<TestType>(1, width + 1, 3);
      Matrix<TestType> y = before;
      Matrix<TestType> by_rows = Matrix<TestType>::Zero(1, width + 1);  // a block begins at zero
      Matrix<TestType> unscaled = before;
      Matrix<TestType> sums = by_rows;
      detail::add_scaled_rows(rows, {factors.data(), 2}, y.data());
      detail::add_scaled_rows(rows, {}, unscaled.data());
      for (Index i = 0; i < count; ++i) {
        detail::add_scaled(width, factors(i, 0), rows.row(i), by_rows.data());
        sums.leftCols(width) += matrix.row(list[detail::to_size(i)]).segment(1, width);
      }
      CHECK(test::same_bits(y, Matrix<TestType>(before + by_rows)));
      CHECK(test::same_bits(unscaled, Matrix<TestType>(before + sums)));
    }
  }
}
