#include "moe/kernels/column_sums.hpp"

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
