#include "moe/routing/balance_loss.hpp"

#include "../naive_layer.hpp"

using namespace moe;
using test::random_matrix;

namespace {

template <class Scalar>
Vector<Scalar> vector(std::initializer_list<double> values) {
  Vector<Scalar> v(static_cast<Index>(values.size()));
  Index i = 0;
  for (const double value : values) v[i++] = static_cast<Scalar>(value);
  return v;
}

}  // namespace

TEMPLATE_TEST_CASE("balance loss: squared coefficient of variation worked by hand", "[routing]",
                   float, double) {
  const auto near = [](double value) {
    return Catch::Matchers::WithinRel(value, test::tolerance<TestType>);
  };
  // mean 2.5, deviations -1.5 -0.5 0.5 1.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25,
  // 1.25 / 6.25 = 0.2.
  CHECK_THAT(static_cast<double>(cv_squared(vector<TestType>({1, 2, 3, 4}))), near(0.2));
  // Everything on one of four: mean 1, variance (9 + 1 + 1 + 1) / 4 = 3.
  CHECK_THAT(static_cast<double>(cv_squared(vector<TestType>({0, 4, 0, 0}))), near(3.0));
  // However small the mean is: 1e-5, variance 1e-10.
  CHECK_THAT(static_cast<double>(cv_squared(vector<TestType>({0, 2e-5}))), near(1.0));
  CHECK(cv_squared(vector<TestType>({3, 3, 3})) == 0);
  CHECK(cv_squared(vector<TestType>({0, 0, 0})) == 0);
  CHECK(cv_squared(vector<TestType>({7})) == 0);
  CHECK(cv_squared(vector<TestType>({})) == 0);
}

TEMPLATE_TEST_CASE("balance loss: its gradient worked by hand", "[routing]", float, double) {
  Vector<TestType> gradient;
  // v = 1 3: m = 2, q = 1, ε left out: (2/2)·[(v − m)/4 − 1·2/16] = −1/4 − 1/8 and 1/4 − 1/8.
  cv_squared_backward(vector<TestType>({1, 3}), TestType{1}, gradient);
  REQUIRE(gradient.size() == 2);
  const double epsilon = sizeof(TestType) == 4 ? 1e-6 : 1e-9;
  CHECK_THAT(static_cast<double>(gradient[0]), Catch::Matchers::WithinAbs(-0.375, epsilon));
  CHECK_THAT(static_cast<double>(gradient[1]), Catch::Matchers::WithinAbs(0.125, epsilon));
  // v = 0 0 3: m = 1, q = 2: (2/3)·[(v − 1) − 2] = −2, −2, 0; times the scale 0.5.
  cv_squared_backward(vector<TestType>({0, 0, 3}), TestType{0.5}, gradient);
  REQUIRE(gradient.size() == 3);
  CHECK_THAT(static_cast<double>(gradient[0]), Catch::Matchers::WithinAbs(-1, epsilon));
  CHECK_THAT(static_cast<double>(gradient[1]), Catch::Matchers::WithinAbs(-1, epsilon));
  CHECK_THAT(static_cast<double>(gradient[2]), Catch::Matchers::WithinAbs(0, epsilon));
  // One expert cannot be out of balance.
  cv_squared_backward(vector<TestType>({5}), TestType{1}, gradient);
  REQUIRE(gradient.size() == 1);
  CHECK(gradient[0] == 0);
}

TEST_CASE("balance loss: its gradient is the derivative at every scale", "[routing]") {
  for (const Index count : {2, 3, 5, 12}) {
    for (const double scale : {1e-5, 1e-2, 1.0, 100.0}) {
      INFO(count << " values around " << scale);
      Matrix<double> values = random_matrix(1, count, 21).cwiseAbs() * scale;
      Vector<double> gradient;
      cv_squared_backward<double>(values.row(0).transpose(), 0.7, gradient);
      const Matrix<double> expected = test::difference_gradient(
          values, [&] { return 0.7 * cv_squared<double>(values.row(0).transpose()); },
          1e-4 * scale);
      CHECK(test::relative_error(gradient.transpose().eval(), expected) < 1e-8);
    }
  }
}

TEMPLATE_TEST_CASE("balance loss: figures worked by hand", "[routing]", float, double) {
  const auto near = [](double value) {
    return Catch::Matchers::WithinRel(value, test::tolerance<TestType>);
  };
  Balance<TestType> balance;
  balance.importance = vector<TestType>({1, 2, 3, 4});
  balance.load = vector<TestType>({0, 6, 0, 2});
  balance.tokens_per_expert = {0, 7, 0, 1};
  CHECK_THAT(static_cast<double>(balance.cv_importance()), near(std::sqrt(0.2)));
  // mean 2, variance (4 + 16 + 4 + 0) / 4 = 6.
  CHECK_THAT(static_cast<double>(balance.cv_load()), near(std::sqrt(1.5)));
  CHECK(balance.max_over_mean_load() == 3);
  CHECK(balance.unused_experts() == 2);

  balance.load = vector<TestType>({2, 2, 2});
  CHECK(balance.max_over_mean_load() == 1);
  CHECK(balance.cv_load() == 0);
  balance.load = vector<TestType>({0, 0});
  CHECK(balance.max_over_mean_load() == 0);
  CHECK(Balance<TestType>{}.max_over_mean_load() == 0);
  CHECK(Balance<TestType>{}.cv_importance() == 0);
  CHECK(Balance<TestType>{}.unused_experts() == 0);
}

TEST_CASE("balance loss: a copy has every figure, in the memory that is there", "[routing]") {
  Balance<double> from;
  from.loss = 3;
  from.importance = Vector<double>{{1, 2}};
  from.load = Vector<double>{{3, 4}};
  from.tokens_per_expert = {5, 6};
  Balance<double> to;
  to.importance = Vector<double>{{7, 8}};
  const double* memory = to.importance.data();
  detail::copy_balance(from, to);
  CHECK(to.loss == 3);
  CHECK(to.importance == from.importance);
  CHECK(to.importance.data() == memory);
  CHECK(to.load == from.load);
  CHECK(to.tokens_per_expert == from.tokens_per_expert);
}

TEMPLATE_TEST_CASE("balance loss: NaN is reported as NaN", "[routing]", float, double) {
  const double nan = std::nan("");
  CHECK(std::isnan(cv_squared(vector<TestType>({1, nan, 2}))));
  Vector<TestType> gradient;
  cv_squared_backward(vector<TestType>({1, nan, 2}), TestType{1}, gradient);
  CHECK(gradient.array().isNaN().all());
}

TEST_CASE("balance: the figures of a gate of one's own, from its slots", "[routing]") {
  // Three tokens: one to experts 0 and 2, one to none, one to expert 2.
  Routing<double> routing;
  routing.experts = 4;
  routing.token_offsets = {0, 2, 2, 3};
  routing.expert = {0, 2, 2};
  routing.weight = {0.25, 0.5, 1.0};
  Balance<double> balance;
  balance.loss = 3;
  for (int pass = 0; pass < 2; ++pass) {  // the second replaces the first
    count_slots(routing, balance);
    CHECK(balance.importance == (Vector<double>(4) << 0.25, 0, 1.5, 0).finished());
    CHECK(balance.load == (Vector<double>(4) << 1, 0, 2, 0).finished());
    CHECK(balance.tokens_per_expert == IndexedVector<Index>{1, 0, 2, 0});
    CHECK(balance.unused_experts() == 2);
    CHECK(balance.loss == 3);
  }
}

// It wrote past the figures of a gate that had forgotten `routing.experts`.
TEST_CASE("balance: slots of experts that do not exist are refused", "[routing]") {
  Routing<double> routing;
  routing.token_offsets = {0, 1};
  routing.expert = {2};
  routing.weight = {1.0};
  Balance<double> balance;
  balance.load = Vector<double>{{7}};
  CHECK_THROWS_WITH(count_slots(routing, balance), "moe: Routing.expert = 2, must be in [0, 0)");
  routing.experts = 2;
  CHECK_THROWS_WITH(count_slots(routing, balance), "moe: Routing.expert = 2, must be in [0, 2)");
  routing.expert = {-1};
  CHECK_THROWS_WITH(count_slots(routing, balance), "moe: Routing.expert = -1, must be in [0, 2)");
  CHECK(balance.load == Vector<double>{{7}});
}
