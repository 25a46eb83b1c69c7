#include "moe/routing/router_z_loss.hpp"

#include "../support.hpp"

using namespace moe;

TEMPLATE_TEST_CASE("router z-loss: worked by hand", "[routing]", float, double) {
  using S = TestType;
  const auto near = [](double value) { return Catch::Matchers::WithinAbs(value, 1e-6); };
  // log_sum = log 4 and log 2 of c = (ln 1, ln 3) and (0, 0).
  const Matrix<S> logits{{0, std::log(S{3})}, {0, 0}};
  Vector<S> log_sum(2);
  log_sum << std::log(S{4}), std::log(S{2});
  const double ln2 = std::log(2.0);
  CHECK_THAT(static_cast<double>(detail::router_z_loss_sum(log_sum)), near(5 * ln2 * ln2));
  // d = 1 + (2·3/2)·log_sum·softmax: 3·2·ln 2·(1/4, 3/4) and 3·ln 2·(1/2, 1/2).
  Matrix<S> d = Matrix<S>::Ones(2, 2);
  detail::router_z_loss_backward(3, 2, logits, log_sum, d);
  CHECK_THAT(static_cast<double>(d(0, 0)), near(1 + 1.5 * ln2));
  CHECK_THAT(static_cast<double>(d(0, 1)), near(1 + 4.5 * ln2));
  CHECK_THAT(static_cast<double>(d(1, 0)), near(1 + 1.5 * ln2));
  CHECK_THAT(static_cast<double>(d(1, 1)), near(1 + 1.5 * ln2));
}

TEST_CASE("router z-loss: no tokens have none", "[routing]") {
  CHECK(detail::router_z_loss_sum(Vector<float>(0)) == 0);
  Matrix<float> d(0, 3);
  CHECK_NOTHROW(detail::router_z_loss_backward(1, 0, Matrix<float>(0, 3), Vector<float>(0), d));
}
