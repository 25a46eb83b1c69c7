#include "moe/kernels/softmax.hpp"

#include "../support.hpp"

using namespace moe;
using test::random_matrix;

TEMPLATE_TEST_CASE("softmax of a row: equals the formula at every length", "[kernels]", float,
                   double) {
  for (Index count = 1; count <= 40; ++count) {
    const Matrix<TestType> x = random_matrix<TestType>(1, count, 3, 4.0);
    std::vector<TestType> terms(detail::to_size(count) + 1, TestType{-1});  // and one that stays
    const auto row = detail::softmax_row(count, x.data(), terms.data());
    double sum = 0;
    for (Index i = 0; i < count; ++i) sum += std::exp(static_cast<double>(x(0, i)));
    for (Index i = 0; i < count; ++i) {
      const auto value = static_cast<double>(x(0, i));
      const double p = static_cast<double>(terms[detail::to_size(i)]) / row.sum;
      CHECK_THAT(p, Catch::Matchers::WithinRel(std::exp(value) / sum, test::tolerance<TestType>));
      CHECK_THAT(row.loss(x(0, i)),
                 Catch::Matchers::WithinAbs(std::log(sum) - value, 20 * test::tolerance<TestType>));
    }
    CHECK(terms.back() == TestType{-1});
    const auto without_terms = detail::softmax_row<TestType>(count, x.data(), nullptr);
    CHECK(without_terms.shift == row.shift);
    CHECK(without_terms.sum == row.sum);
  }
}

TEMPLATE_TEST_CASE("softmax of a row: the largest value counts wherever it stands", "[kernels]",
                   float, double) {
  for (Index count = 1; count <= 40; ++count) {
    for (Index place = 0; place < count; ++place) {
      INFO(count << " values, the largest at " << place);
      Matrix<TestType> x = Matrix<TestType>::Constant(1, count, -1);
      x(0, place) = 1000;  // e to the 1001 overflows
      const auto row = detail::softmax_row<TestType>(count, x.data(), nullptr);
      CHECK(row.shift == 1000);
      CHECK(row.sum == 1);
      CHECK(detail::largest(count, x.data()) == 1000);
    }
  }
}

TEST_CASE("softmax of a row: the gradient, worked by hand", "[kernels]") {
  // softmax(log 1, log 3) = (1/4, 3/4); with weight 2 of 4 losses: (1/2)·(1/4, 3/4 - 1).
  Matrix<double> x{{0.0, std::log(3.0)}};
  const auto row = detail::softmax_row(2, x.data(), x.data());  // in place
  detail::softmax_row_backward(2, row, 1, 2.0, 4.0, x.data());
  CHECK_THAT(x(0, 0), Catch::Matchers::WithinRel(0.125, 1e-14));
  CHECK_THAT(x(0, 1), Catch::Matchers::WithinRel(-0.125, 1e-14));
}

TEST_CASE("softmax of a row: large values do not overflow, and NaN stays NaN", "[kernels]") {
  Matrix<double> x{{1000.0, 1000.0, -1000.0}};
  const auto row = detail::softmax_row<double>(3, x.data(), nullptr);
  CHECK(row.sum == 2.0);
  CHECK_THAT(row.loss(1000.0), Catch::Matchers::WithinRel(std::log(2.0), 1e-15));
  x(0, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(detail::softmax_row<double>(3, x.data(), nullptr).sum));
}
