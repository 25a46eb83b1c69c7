#include "moe/layer/combine.hpp"

#include "../support.hpp"

using namespace moe;

namespace {

/// Tokens 0 and 2 with two slots, token 1 with none; two experts.
template <class Scalar>
Routing<Scalar> small_routing() {
  Routing<Scalar> routing;
  routing.experts = 2;
  routing.token_offsets = {0, 2, 2, 4};
  routing.expert = {0, 1, 0, 1};
  routing.weight = {1, 2, 3, 4};
  group_by_expert(routing);
  return routing;
}

}  // namespace

TEMPLATE_TEST_CASE("combine: adds weighted rows to their tokens", "[layer]", float, double) {
  using S = TestType;
  const Routing<S> routing = small_routing<S>();
  // Rows by expert: token 0 and 2 at expert 0, then token 0 and 2 at expert 1.
  const Matrix<S> rows{{1, 10}, {2, 20}, {3, 30}, {4, 40}};
  Matrix<S> out{{100, 0}, {7, 8}, {0, 100}};
  detail::combine<S>(routing, routing.weight, rows, out);
  // Token 0: 1·(1, 10) + 2·(3, 30); token 2: 3·(2, 20) + 4·(4, 40); token 1 keeps its row.
  CHECK(out == Matrix<S>{{107, 70}, {7, 8}, {22, 320}});
}

TEMPLATE_TEST_CASE("combine: no weights are ones", "[layer]", float, double) {
  using S = TestType;
  const Matrix<S> rows{{1, 10}, {2, 20}, {3, 30}, {4, 40}};
  Matrix<S> out = Matrix<S>::Zero(3, 2);
  detail::combine<S>(small_routing<S>(), {}, rows, out);
  CHECK(out == Matrix<S>{{4, 40}, {0, 0}, {6, 60}});
}

TEMPLATE_TEST_CASE("combine: has the same bits on any number of threads", "[layer]", float,
                   double) {
  using S = TestType;
  const Index tokens = 333;
  Routing<S> routing;
  routing.experts = 5;
  routing.token_offsets = {0};
  for (Index t = 0; t < tokens; ++t) {
    for (Index e = 0; e < 5; ++e) {
      if ((t + e) % 3 == 0) routing.expert.push_back(e);
    }
    routing.token_offsets.push_back(routing.slots());
  }
  const Matrix<S> weight = test::random_matrix<S>(1, routing.slots(), 1);
  routing.weight.assign(weight.data(), weight.data() + weight.size());
  group_by_expert(routing);
  const Matrix<S> rows = test::random_matrix<S>(routing.slots(), 19, 2);
  const auto combined = [&](int count) {
    const test::Threads threads(count);
    Matrix<S> out = Matrix<S>::Zero(tokens, 19);
    detail::combine<S>(routing, routing.weight, rows, out);
    return out;
  };
  const Matrix<S> one = combined(1);
  for (const int count : {2, 3, 8}) CHECK(test::same_bits(combined(count), one));

  Matrix<double> expected = Matrix<double>::Zero(tokens, 19);
  for (Index t = 0; t < tokens; ++t) {
    for (Index s = routing.token_offsets[detail::to_size(t)];
         s < routing.token_offsets[detail::to_size(t) + 1]; ++s) {
      expected.row(t) += static_cast<double>(routing.weight[detail::to_size(s)]) *
                         rows.row(routing.slot_row[detail::to_size(s)]).template cast<double>();
    }
  }
  CHECK(test::relative_error(one.template cast<double>().eval(), expected) < test::tolerance<S>);
}

TEST_CASE("combine: no tokens are no work", "[layer]") {
  Routing<float> routing;
  routing.experts = 2;
  routing.token_offsets = {0};
  group_by_expert(routing);
  Matrix<float> out(0, 3);
  detail::combine<float>(routing, routing.weight, Matrix<float>(0, 3), out);
  CHECK(out.rows() == 0);
}
