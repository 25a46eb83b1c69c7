// Report: the balance loss depends on the scale of what it balances, since an epsilon is added to
// the squared mean; and a loss that is switched off makes NaN of everything.

#include "../support.hpp"
#include "moe/moe.hpp"

using namespace moe;

TEST_CASE("report: CV² of two tokens over 20,000 experts is exact", "[reports]") {
  // T = 2, K = 1: two experts of importance 1, the mean m = 1e-4, so CV² = E/2 - 1 = 9999. With
  // both tokens at one expert, E - 1 = 19999.
  Vector<double> values = Vector<double>::Zero(20000);
  values[7] = 1;
  values[123] = 1;
  CHECK(std::abs(cv_squared(values) - 9999) < 1e-8);
  for (const double scale : {1e-300, 1e-30, 1e30, 1e300}) {
    CHECK(std::abs(cv_squared(Vector<double>(values * scale)) - 9999) < 1e-8);
  }
  values[123] = 0;
  CHECK(std::abs(cv_squared(values) - 19999) < 1e-8);
  CHECK(cv_squared(Vector<double>(Vector<double>::Zero(5))) == 0);
  Vector<float> small = Vector<float>::Constant(4, 1e-30f);
  small[2] = 3e-30f;  // mean 1.5, variance 0.75 of 1e-30 and its square
  CHECK(std::abs(cv_squared(small) - 1.0f / 3.0f) < 1e-6f);
}

TEST_CASE("report: the gradient of CV² is exact at every scale", "[reports]") {
  for (const double scale : {1e-12, 1e-3, 1.0, 1e6}) {
    CAPTURE(scale);
    Vector<double> values(5);
    values << 0.3, 1.2, 0.7, 2.5, 0.1;
    values *= scale;
    Vector<double> gradient;
    cv_squared_backward(values, 2.0, gradient);
    Matrix<double> at = values;
    const Matrix<double> expected = test::difference_gradient(
        at, [&] { return 2 * cv_squared(Vector<double>(at)); }, 1e-4 * scale);
    CHECK(test::relative_error(Matrix<double>(gradient), expected) < 1e-8);
  }
  Vector<double> gradient;
  cv_squared_backward(Vector<double>(Vector<double>::Zero(3)), 1.0, gradient);
  CHECK(gradient == Vector<double>(Vector<double>::Zero(3)));
}

namespace {

/// dx of a batch whose token 3 has a NaN, all losses being off.
template <class Gate>
void check_nan_stays(const typename Gate::Config& gate) {
  MoELayer<Expert<FeedForward, double>, Gate> layer(
      {.width = 4, .expert = {.hidden = 8}, .gate = gate, .seed = 5});
  for_each_parameter(layer, [](const std::string& name, Parameter<double>& p) {
    if (name.starts_with("gate") && !name.ends_with("threshold")) fill_normal(p.value, 0.5, 9);
  });
  typename MoELayer<Expert<FeedForward, double>, Gate>::Tape tape;
  Matrix<double> x = test::random_matrix(8, 4, 1);
  x(3, 2) = std::numeric_limits<double>::quiet_NaN();
  layer.forward(x, tape, {.step = 1});
  CHECK(tape.balance().loss == 0);
  const Matrix<double>& dx = layer.backward(test::random_matrix(8, 4, 2), tape);
  for (Index t = 0; t < 8; ++t) {
    if (t != 3) CHECK(dx.row(t).allFinite());
  }
}

}  // namespace

TEST_CASE("report: with losses off a NaN in one token stays in its row of dx", "[reports]") {
  check_nan_stays<NoisyTopKGate<double>>(
      {.experts = 4, .top_k = 2, .importance_weight = 0, .load_weight = 0});
  check_nan_stays<HierarchicalGate<double>>({.groups = 2,
                                             .group_experts = 2,
                                             .top_k_groups = 1,
                                             .top_k = 1,
                                             .importance_weight = 0,
                                             .load_weight = 0});
  check_nan_stays<ProductKeyGate<double>>(
      {.row_keys = 2, .column_keys = 3, .top_k = 1, .importance_weight = 0, .load_weight = 0});
  check_nan_stays<TopKGate<double>>({.experts = 4, .top_k = 2});
  check_nan_stays<BalancedGate<double>>({.experts = 4, .top_k = 2, .threshold_weight = 0});
}
