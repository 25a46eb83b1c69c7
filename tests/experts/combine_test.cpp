#include "moe/experts/combine.hpp"

#include <array>

#include "../support.hpp"

using namespace moe;

TEMPLATE_TEST_CASE("combine: adds weighted rows to their tokens", "[experts]", float, double) {
  using S = TestType;
  const Matrix<S> rows{{1, 10, 100}, {2, 20, 200}};
  Matrix<S> out{{100, 0, 1}, {7, 8, 1}, {0, 100, 1}};
  const std::array<Index, 2> token = {0, 2};
  const std::array<S, 2> weight = {2, 3};
  const ScatteredRows<S> to(out.data(), 3, 2, 3, token.data());
  // Columns 0 and 1 only. Token 0: 2·(1, 10); token 2: 3·(2, 20); token 1 save its row.
  detail::combine(GatheredRows<S>(rows), weight.data(), 0, 2, to);
  CHECK(out == Matrix<S>{{102, 20, 1}, {7, 8, 1}, {6, 160, 1}});
  detail::combine(GatheredRows<S>(rows), weight.data(), 2, 1, to);
  CHECK(out == Matrix<S>{{102, 20, 201}, {7, 8, 1}, {6, 160, 601}});
}

TEMPLATE_TEST_CASE("combine: no weights are ones", "[experts]", float, double) {
  using S = TestType;
  const Matrix<S> rows{{1, 10}, {2, 20}};
  Matrix<S> out{{1, 1}, {2, 2}};
  const S* none = nullptr;
  detail::combine(GatheredRows<S>(rows), none, 0, 2, ScatteredRows<S>(view(out)));
  CHECK(out == Matrix<S>{{2, 11}, {4, 22}});
}

TEST_CASE("combine: no rows are no work", "[experts]") {
  Matrix<float> out = Matrix<float>::Ones(2, 3);
  const Matrix<float> rows(0, 3);
  const float* none = nullptr;
  detail::combine(GatheredRows<float>(rows), none, 0, 3, ScatteredRows<float>(out.data(), 3, 0, 3));
  CHECK(out == Matrix<float>::Ones(2, 3));
}
