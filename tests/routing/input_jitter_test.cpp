#include "moe/routing/input_jitter.hpp"

#include "../support.hpp"

using namespace moe;
using test::random_matrix;
using test::same_bits;

TEMPLATE_TEST_CASE("input jitter: a factor for every number, by its key", "[routing]", float,
                   double) {
  using S = TestType;
  const Matrix<S> x = random_matrix<S>(70, 6, 1);
  Matrix<S> factor;
  Matrix<S> jittered;
  ValidTokens tokens;
  find_valid_tokens(70, {}, nullptr, tokens);
  detail::jitter_input<S>(0.5, 9, {.key = {.step = 4, .first_token = 3}}, tokens, x, factor,
                          jittered);
  CHECK(same_bits(jittered, Matrix<S>(x.cwiseProduct(factor))));
  // Uniform: mean 1, variance (2·0.5)²/12.
  CHECK(factor.minCoeff() >= S(0.5));
  CHECK(factor.maxCoeff() < S(1.5));
  CHECK(std::abs(static_cast<double>(factor.mean()) - 1) < 0.06);
  const double variance = static_cast<double>((factor.array() - factor.mean()).square().mean());
  CHECK(std::abs(variance - 1.0 / 12) < 0.015);
  const auto words = philox({1, 3 + 2, 4, 0}, 9);
  CHECK(factor(2, 5) == S{1} + S(0.5) * (S{2} * static_cast<S>(uniform(words[1])) - S{1}));

  const Matrix<S> djittered = random_matrix<S>(70, 6, 2);
  Matrix<S> dx = random_matrix<S>(70, 6, 3);
  const Matrix<S> expected = dx + djittered.cwiseProduct(factor);
  detail::jitter_input_backward(factor, djittered, ScatteredRows<S>(view(dx)));
  CHECK(test::relative_error(dx, expected) < test::tolerance<S>);
}
