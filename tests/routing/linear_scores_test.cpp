#include "moe/routing/linear_scores.hpp"

#include "gates/token_choice_checks.hpp"

using namespace moe;
using namespace moe::test;

TEMPLATE_TEST_CASE("linear_scores: the softmax of rows", "[routing]", float, double) {
  for (const Index experts : {1, 2, 7, 16, 33}) {
    for (const double scale : {1e-3, 1.0, 30.0}) {
      const Matrix<TestType> c = random_matrix<TestType>(70, experts, 1, scale);
      Matrix<TestType> p;
      softmax_rows(c, p);
      const Matrix<double> expected = test::naive_softmax(c.template cast<double>());
      CHECK(relative_error(p.template cast<double>(), expected) < test::tolerance<TestType>);
      Matrix<TestType> in_place = c;
      softmax_rows(in_place, in_place);
      CHECK(same_bits(in_place, p));
    }
  }
  // Scores far beyond the range of e^x.
  Matrix<TestType> p;
  softmax_rows(Matrix<TestType>{{1000, 1000, -1000}, {-5000, -5000, -5000}}, p);
  CHECK(relative_error(p.row(0), Matrix<TestType>{{0.5, 0.5, 0}}) < 1e-30);
  CHECK(relative_error(p.row(1), Matrix<TestType>{{1, 1, 1}} / TestType{3}) < 1e-6);
}

TEMPLATE_TEST_CASE("linear_scores: a NaN or an infinity makes a row NaN and no other", "[routing]",
                   float, double) {
  for (const TestType bad :
       {std::numeric_limits<TestType>::quiet_NaN(), std::numeric_limits<TestType>::infinity()}) {
    for (Index place = 0; place < 9; ++place) {
      Matrix<TestType> c = random_matrix<TestType>(3, 9, 1);
      Matrix<TestType> clean;
      Matrix<TestType> p;
      softmax_rows(c, clean);
      c(1, place) = bad;
      softmax_rows(c, p);
      CHECK(p.row(1).array().isNaN().all());
      CHECK(same_bits(p.row(0), clean.row(0)));
      CHECK(same_bits(p.row(2), clean.row(2)));
    }
  }
}

TEST_CASE("linear_scores: gradients are derivatives", "[routing]") {
  for (const Index experts : {1, 3, 10}) {
    Matrix<double> x = random_matrix(5, 4, 1);
    Parameter<double> weight(4, experts);
    weight.value = random_matrix(4, experts, 2);
    Parameter<double> bias(1, experts);
    bias.value = random_matrix(1, experts, 5);
    const Matrix<double> before = random_matrix(4, experts, 3);
    weight.gradient() = before;
    const Matrix<double> before_bias = random_matrix(1, experts, 6);
    bias.gradient() = before_bias;
    const Matrix<double> r = random_matrix(5, experts, 4);
    const auto loss = [&] {
      Matrix<double> p;
      linear_scores(x, weight, bias, p);
      softmax_rows(p, p);
      return p.cwiseProduct(r).sum();
    };
    Matrix<double> p;
    linear_scores(x, weight, p);
    CHECK(relative_error(p, test::naive_scores(x, weight.value)) < 1e-13);
    const Matrix<double> without = p;
    linear_scores(x, weight, bias, p);
    for (Index t = 0; t < 5; ++t) {
      CHECK(relative_error(p.row(t), without.row(t) + bias.value) < 1e-13);
    }
    softmax_rows(p, p);
    Matrix<double> dscores = r;
    const Matrix<double> before_dx = random_matrix(x.rows(), x.cols(), 9);
    Matrix<double> dx = before_dx;
    softmax_rows_backward(p, dscores);
    linear_scores_backward(x, dscores, weight, bias, dx);
    // One expert: no gradient at all, and differences that are rounding.
    const double floor = experts == 1 ? 1e-10 : 0;
    const auto check = [&](const Matrix<double>& actual, Matrix<double>& value) {
      const Matrix<double> expected = test::difference_gradient(value, loss);
      CHECK((actual - expected).cwiseAbs().maxCoeff() <=
            1e-7 * expected.cwiseAbs().maxCoeff() + floor);
    };
    check(dx - before_dx, x);
    check(weight.gradient() - before, weight.value);
    check(bias.gradient() - before_bias, bias.value);
    bias.trained = false;
    const Matrix<double> frozen = bias.gradient();
    linear_scores_backward(x, dscores, weight, bias, dx);
    CHECK(same_bits(bias.gradient(), frozen));
  }
}

TEST_CASE("linear scores: gradients of other shapes are refused", "[routing]") {
  Parameter<double> weight(3, 4);
  const auto x = random_matrix(5, 3, 1);
  const auto dscores = random_matrix(5, 4, 2);
  Matrix<double> dx = Matrix<double>::Zero(7, 3);
  // Scores of the five rows that are tokens, and a dx of all seven.
  CHECK_THROWS_WITH(linear_scores_backward(x, dscores, weight, dx),
                    "moe: linear_scores_backward: x has 5 rows, dscores 5, dx 7");
  CHECK_THROWS_WITH(linear_scores_backward(random_matrix(4, 3, 1), dscores, weight, dx),
                    "moe: linear_scores_backward: x has 4 rows, dscores 5, dx 7");
  dx.setZero(5, 2);
  CHECK_THROWS_WITH(
      linear_scores_backward(x, dscores, weight, dx),
      "moe: linear_scores_backward: x is 3 wide, dx 2, dscores 4, the weight is 3 x 4");
  Parameter<double> bias(1, 5);
  dx.setZero(5, 3);
  CHECK_THROWS_WITH(linear_scores_backward(x, dscores, weight, bias, dx),
                    "moe: linear_scores_backward: the bias has 5 numbers for 4 experts");
  CHECK(dx == Matrix<double>::Zero(5, 3));
  CHECK(weight.gradient() == Matrix<double>::Zero(3, 4));
}

TEST_CASE("linear scores: inputs of other shapes are refused", "[routing]") {
  const Parameter<double> weight(3, 4);
  Matrix<double> scores = Matrix<double>::Constant(2, 2, 7);
  CHECK_THROWS_WITH(linear_scores(random_matrix(5, 2, 1), weight, scores),
                    "moe: linear_scores: x is 2 wide, the weight is 3 x 4");
  CHECK_THROWS_WITH(linear_scores(random_matrix(5, 3, 1), weight, Parameter<double>(1, 5), scores),
                    "moe: linear_scores: the bias has 5 numbers for 4 experts");
  const Matrix<double> p = random_matrix(5, 4, 1);
  CHECK_THROWS_WITH(softmax_rows_backward(p, scores),
                    "moe: softmax_rows_backward: the gradient is 2 x 2, p is 5 x 4");
  CHECK(scores == Matrix<double>::Constant(2, 2, 7));
}
