#include "moe/kernels/activations.hpp"

#include "../naive_activation.hpp"
#include "../support.hpp"

using namespace moe;
using test::naive_activation;
using test::naive_derivative;

namespace {

/// From deep in the lower tail to deep in the upper one, and 0.
template <class Scalar>
Matrix<Scalar> points(Index count) {
  Matrix<Scalar> x(1, count);
  for (Index i = 0; i < count; ++i) {
    x(0, i) = static_cast<Scalar>(12.0 * static_cast<double>(i - count / 2) /
                                  static_cast<double>(std::max<Index>(count / 2, 1)));
  }
  return x;
}

}  // namespace

TEMPLATE_TEST_CASE("activations: values and derivatives equal the formulas", "[kernels]", float,
                   double) {
  const Matrix<TestType> x = points<TestType>(1001);
  for (const Activation activation : test::all_activations()) {
    INFO("activation " << static_cast<int>(activation));
    Matrix<TestType> y(1, x.cols());
    Matrix<TestType> dx(1, x.cols());
    const Matrix<TestType> dy = test::random_matrix<TestType>(1, x.cols(), 3);
    detail::activate(activation, x.cols(), x.data(), y.data());
    detail::activate_backward(activation, x.cols(), x.data(), dy.data(), dx.data());
    double value_error = 0;
    double derivative_error = 0;
    for (Index i = 0; i < x.cols(); ++i) {
      const auto at = static_cast<double>(x(0, i));
      const double value = naive_activation(activation, at);
      const double derivative = static_cast<double>(dy(0, i)) * naive_derivative(activation, at);
      const double scale = std::max({1.0, std::abs(at), std::abs(value)});
      value_error = std::max(value_error, std::abs(static_cast<double>(y(0, i)) - value) / scale);
      derivative_error =
          std::max(derivative_error, std::abs(static_cast<double>(dx(0, i)) - derivative) / scale);
    }
    CHECK(value_error < (sizeof(TestType) == 4 ? 5e-7 : 1e-15));
    CHECK(derivative_error < (sizeof(TestType) == 4 ? 5e-6 : 5e-15));
  }
}

TEST_CASE("activations: derivatives are those of the values", "[kernels]") {
  Matrix<double> x = test::random_matrix(1, 37, 11, 2.0);
  const Matrix<double> dy = test::random_matrix(1, 37, 12);
  REQUIRE(x.cwiseAbs().minCoeff() > 1e-3);  // away from the kink of ReLU
  for (const Activation activation : test::all_activations()) {
    INFO("activation " << static_cast<int>(activation));
    Matrix<double> dx(1, x.cols());
    detail::activate_backward(activation, x.size(), x.data(), dy.data(), dx.data());
    const Matrix<double> expected = test::difference_gradient(x, [&] {
      Matrix<double> y(1, x.cols());
      detail::activate(activation, x.size(), x.data(), y.data());
      return y.cwiseProduct(dy).sum();
    });
    CHECK(test::relative_error(dx, expected) < 1e-9);
  }
}

TEMPLATE_TEST_CASE("activations: a value has the same bits wherever it stands in a row",
                   "[kernels]", float, double) {
  const Matrix<TestType> x = test::random_matrix<TestType>(1, 40, 5, 3.0);
  for (const Activation activation : test::all_activations()) {
    INFO("activation " << static_cast<int>(activation));
    Matrix<TestType> whole(1, 40);
    detail::activate(activation, 40, x.data(), whole.data());
    for (Index first = 0; first < 40; ++first) {
      for (const Index count : {Index{1}, Index{40} - first}) {
        Matrix<TestType> part(1, count);
        detail::activate(activation, count, x.data() + first, part.data());
        CHECK(test::same_bits(part, whole.middleCols(first, count)));
      }
    }
  }
}

TEMPLATE_TEST_CASE("activations: work in place and write nothing past the end", "[kernels]", float,
                   double) {
  for (const Activation activation : test::all_activations()) {
    for (Index count = 0; count <= 35; ++count) {
      const Matrix<TestType> x = test::random_matrix<TestType>(1, count + 1, 7);
      Matrix<TestType> y(1, count);
      detail::activate(activation, count, x.data(), y.data());
      Matrix<TestType> in_place = x;
      detail::activate(activation, count, in_place.data(), in_place.data());
      CHECK(test::same_bits(in_place.leftCols(count), y));
      CHECK(in_place(0, count) == x(0, count));

      Matrix<TestType> dx(1, count);
      detail::activate_backward(activation, count, x.data(), x.data(), dx.data());
      in_place = x;
      detail::activate_backward(activation, count, x.data(), in_place.data(), in_place.data());
      CHECK(test::same_bits(in_place.leftCols(count), dx));
      CHECK(in_place(0, count) == x(0, count));
    }
  }
}

TEMPLATE_TEST_CASE("activations: the way back of a long row", "[kernels]", float, double) {
  constexpr Index count = 2 * 64 * detail::packet_size<TestType> + 3;  // more than two pieces
  const Matrix<TestType> x = test::random_matrix<TestType>(1, count, 1, 2.0);
  const Matrix<TestType> dy = test::random_matrix<TestType>(1, count, 2);
  Matrix<TestType> dx(1, count);
  detail::activate_backward(Activation::tanh, count, x.data(), dy.data(), dx.data());
  Matrix<TestType> in_place = dy;
  detail::activate_backward(Activation::tanh, count, x.data(), in_place.data(), in_place.data());
  CHECK(test::same_bits(dx, in_place));
  double error = 0;
  for (Index i = 0; i < count; ++i) {
    const double slope = naive_derivative(Activation::tanh, static_cast<double>(x(0, i)));
    error = std::max(
        error, std::abs(static_cast<double>(dx(0, i)) - static_cast<double>(dy(0, i)) * slope));
  }
  CHECK(error < (sizeof(TestType) == 4 ? 1e-6 : 1e-14));
}

TEMPLATE_TEST_CASE("activations: NaN stays NaN and touches no neighbour", "[kernels]", float,
                   double) {
  const Matrix<TestType> clean = test::random_matrix<TestType>(1, 20, 9);
  for (const Activation activation : test::all_activations()) {
    INFO("activation " << static_cast<int>(activation));
    Matrix<TestType> x = clean;
    Matrix<TestType> expected(1, 20);
    Matrix<TestType> y(1, 20);
    detail::activate(activation, 20, x.data(), expected.data());
    x(0, 6) = std::numeric_limits<TestType>::quiet_NaN();
    detail::activate(activation, 20, x.data(), y.data());
    CHECK(std::isnan(y(0, 6)));
    y(0, 6) = expected(0, 6);
    CHECK(test::same_bits(y, expected));
  }
}

TEMPLATE_TEST_CASE("activations: saturate at infinity", "[kernels]", float, double) {
  const TestType infinity = std::numeric_limits<TestType>::infinity();
  const auto at = [&](Activation activation, TestType x) {
    TestType y = 0;
    detail::activate(activation, 1, &x, &y);
    return static_cast<double>(y);
  };
  CHECK(at(Activation::relu, infinity) == static_cast<double>(infinity));
  CHECK(at(Activation::relu, -infinity) == 0);
  CHECK(at(Activation::squared_relu, infinity) == static_cast<double>(infinity));
  CHECK(at(Activation::squared_relu, -infinity) == 0);
  CHECK(at(Activation::sigmoid, infinity) == 1);
  CHECK_THAT(at(Activation::sigmoid, -infinity), Catch::Matchers::WithinAbs(0, 1e-37));
  CHECK(at(Activation::tanh, infinity) == 1);
  CHECK(at(Activation::tanh, -infinity) == -1);
  CHECK(at(Activation::silu, TestType{1000}) == 1000);
  CHECK_THAT(at(Activation::silu, TestType{-1000}), Catch::Matchers::WithinAbs(0, 1e-30));
}

TEST_CASE("activations: the derivative of ReLU at its kink is zero", "[kernels]") {
  const double zero = 0;
  const double dy = 5;
  double dx = -1;
  detail::activate_backward(Activation::relu, 1, &zero, &dy, &dx);
  CHECK(dx == 0);
}

TEST_CASE("activations: far from zero the gradient of gelu_tanh is 0 or 1", "[kernels]") {
  for (const float x : {-3e38f, -1e20f, -50.0f, 50.0f, 1e20f, 3e38f}) {
    const float dy = 1;
    float dx = 7;
    detail::activate_backward(Activation::gelu_tanh, 1, &x, &dy, &dx);
    CHECK(std::abs(dx - (x > 0 ? 1.0f : 0.0f)) < 1e-6f);
  }
}

TEMPLATE_TEST_CASE("activations: rows that are apart, with factors", "[kernels]", float, double) {
  using S = TestType;
  constexpr Index rows = 3;
  for (const Index count :
       {Index{0}, Index{1}, detail::packet_size<S>, detail::packet_size<S> + 3}) {
    const Matrix<S> x = test::random_matrix<S>(rows, count + 2, 1, 2.0);
    const Matrix<S> dy = test::random_matrix<S>(rows, count + 5, 2);
    const Matrix<S> factors = test::random_matrix<S>(rows, 2, 3);
    for (const Activation activation : test::all_activations()) {
      INFO("count " << count << ", activation " << static_cast<int>(activation));
      const GatheredRows<S> in = GatheredRows<S>(x).columns(0, count);
      Matrix<S> plain = Matrix<S>::Constant(rows, count + 7, S{9});
      Matrix<S> scaled = plain;
      Matrix<S> y = plain;
      Matrix<S> dx = dy;
      Matrix<S> dots(1, rows);
      const auto at_first = [count](Matrix<S>& matrix) {
        return ScatteredRows<S>(view(matrix)).columns(0, count);
      };
      detail::activate(activation, in, at_first(plain));
      detail::activate(activation, in, at_first(scaled), {factors.data(), 2});
      detail::activate_backward(activation, in, at_first(y), at_first(dx), dots.data(),
                                {factors.data(), 2});
      Matrix<double> slope(rows, count);
      Matrix<double> dot = Matrix<double>::Zero(1, rows);
      for (Index r = 0; r < rows; ++r) {
        for (Index i = 0; i < count; ++i) {
          const auto at = static_cast<double>(x(r, i));
          const auto d = static_cast<double>(dy(r, i));
          slope(r, i) = static_cast<double>(factors(r, 0)) * d * naive_derivative(activation, at);
          dot(0, r) += d * naive_activation(activation, at);
          CHECK(scaled(r, i) == factors(r, 0) * plain(r, i));
        }
      }
      CHECK(test::same_bits(y, scaled));
      const double tolerance = sizeof(S) == 4 ? 1e-5 : 1e-13;
      const Matrix<double> result = dx.leftCols(count).template cast<double>();
      CHECK((result - slope).norm() <= tolerance * (1 + slope.norm()));
      CHECK((dots.template cast<double>() - dot).norm() <= tolerance * (1 + dot.norm()));
      // Nothing beyond the columns was touched.
      CHECK((plain.rightCols(7).array() == S{9}).all());
      CHECK((y.rightCols(7).array() == S{9}).all());
      CHECK(test::same_bits(dx.rightCols(5), dy.rightCols(5)));

      for (Index r = 0; r < rows; ++r) {  // the rows are those of the form for one row
        Matrix<S> value(1, count);
        Matrix<S> gradient(1, count);
        detail::activate(activation, count, x.row(r).data(), value.data());
        detail::activate_backward(activation, count, x.row(r).data(), dy.row(r).data(),
                                  gradient.data());
        CHECK(test::same_bits(plain.row(r).head(count), value));
        Matrix<S> unscaled = dy.row(r).head(count);
        detail::activate_backward<S>(activation, in.slice(r, 1), {value.data(), count, 1, count},
                                     {unscaled.data(), count, 1, count}, dots.data());
        CHECK(test::same_bits(unscaled, gradient));
      }
    }
  }
}
