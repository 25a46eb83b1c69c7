#include "moe/optim/factored_adam.hpp"

#include <map>

#include "../support.hpp"
#include "laws.hpp"
#include "moe/experts/expert.hpp"
#include "moe/experts/feed_forward.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/nn/linear.hpp"
#include "moe/optim/adam.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// The formulas, one number at a time and in double.
struct Naive {
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0;
  std::vector<double> r = {};
  std::vector<double> c = {};
  int t = 0;

  void update(Matrix<double>& w, const Matrix<double>& g, double learning_rate) {
    const Index rows = w.rows();
    const Index columns = w.cols();
    r.resize(detail::to_size(rows));
    c.resize(detail::to_size(columns));
    ++t;
    for (Index i = 0; i < rows; ++i) {
      double mean = 0;
      for (Index j = 0; j < columns; ++j) {
        mean += g(i, j) * g(i, j) / static_cast<double>(columns);
      }
      double& mine = r[detail::to_size(i)];
      mine = beta2 * mine + (1 - beta2) * mean;
    }
    for (Index j = 0; j < columns; ++j) {
      double mean = 0;
      for (Index i = 0; i < rows; ++i) mean += g(i, j) * g(i, j) / static_cast<double>(rows);
      double& mine = c[detail::to_size(j)];
      mine = beta2 * mine + (1 - beta2) * mean;
    }
    double mean_r = 0;
    for (const double value : r) mean_r += value / static_cast<double>(rows);
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < columns; ++j) {
        const double v = r[detail::to_size(i)] * c[detail::to_size(j)] / mean_r;
        const double v_hat = v / (1 - std::pow(beta2, t));
        w(i, j) = (1 - learning_rate * weight_decay) * w(i, j) -
                  learning_rate * g(i, j) / (std::sqrt(v_hat) + epsilon);
      }
    }
  }
};

/// How far the optimizer is from the formulas after a few updates by random gradients, beside the
/// largest move.
template <class Scalar>
double error_after_updates(Index rows, Index columns, double gradient_scale, double epsilon,
                           int updates) {
  Parameter<Scalar> parameter = scattered_parameter<Scalar>(rows, columns, 1);
  Matrix<double> w = parameter.value.template cast<double>();
  FactoredAdam<Scalar> adam({.beta2 = 0.9, .epsilon = epsilon, .weight_decay = 0.1});
  Naive naive{.beta2 = 0.9, .epsilon = epsilon, .weight_decay = 0.1};
  for (int t = 1; t <= updates; ++t) {
    parameter.gradient() = scattered<Scalar>(rows, columns, t, gradient_scale);
    naive.update(w, parameter.gradient().template cast<double>(), 0.125);
    adam.update(parameter, 0.125);
  }
  return test::relative_error(parameter.value.template cast<double>(), w);
}

}  // namespace

TEST_CASE("factored adam: two updates worked by hand", "[optim][factored_adam]") {
  Parameter<double> p(2, 2);
  p.value << 1, 2, 3, 4;
  FactoredAdam<double> adam({.beta2 = 0.5, .epsilon = 0.5, .weight_decay = 0.25});
  // g² = (16 4; 0 4): r = ½·(10, 2) = (5, 1), c = ½·(8, 4) = (4, 2), mean(r) = 3, 1 - β2 = ½, so
  // v̂ = 2·(5·4, 5·2; 1·4, 1·2)/3.
  p.gradient() << 4, 2, 0, -2;
  adam.update(p, 0.1);
  const auto check = [&](Index i, Index j, double expected) {
    CHECK_THAT(p.value(i, j), Catch::Matchers::WithinAbs(expected, 1e-14));
  };
  const double w00 = 0.975 - 0.4 / (std::sqrt(40.0 / 3) + 0.5);
  const double w01 = 1.95 - 0.2 / (std::sqrt(20.0 / 3) + 0.5);
  const double w10 = 2.925;
  const double w11 = 3.9 + 0.2 / (std::sqrt(4.0 / 3) + 0.5);
  check(0, 0, w00);
  check(0, 1, w01);
  check(1, 0, w10);
  check(1, 1, w11);
  // g² = (1 9; 1 1): r = ½·(5, 1) + ½·(5, 1), c = ½·(4, 2) + ½·(1, 5) = (2.5, 3.5), mean(r) = 3,
  // 1 - β2² = ¾, so v̂ = (5·2.5, 5·3.5; 2.5, 3.5)/2.25.
  p.gradient() << 1, -3, 1, 1;
  adam.update(p, 0.1);
  check(0, 0, w00 * 0.975 - 0.1 / (std::sqrt(50.0 / 9) + 0.5));
  check(0, 1, w01 * 0.975 + 0.3 / (std::sqrt(70.0 / 9) + 0.5));
  check(1, 0, w10 * 0.975 - 0.1 / (std::sqrt(10.0 / 9) + 0.5));
  check(1, 1, w11 * 0.975 - 0.1 / (std::sqrt(14.0 / 9) + 0.5));
}

TEMPLATE_TEST_CASE("factored adam: follows the formulas over many updates",
                   "[optim][factored_adam]", float, double) {
  const double tolerance = test::tolerance<TestType>;
  CHECK(error_after_updates<TestType>(5, 7, 1, 1e-8, 50) < tolerance);
  CHECK(error_after_updates<TestType>(7, 5, 1, 0.5, 20) < tolerance);
}

TEMPLATE_TEST_CASE("factored adam: follows the formulas in every shape", "[optim][factored_adam]",
                   float, double) {
  // One row, one column, ends of packets, more rows and columns than a strip, several pieces.
  for (const auto& [rows, columns] : {std::pair<Index, Index>{1, 1},
                                      {1, 37},
                                      {37, 1},
                                      {4, 8},
                                      {6, 9},
                                      {67, 33},
                                      {129, 16},
                                      {66, 1030},
                                      {2, 2100},
                                      {640, 617},
                                      {3, 90000}}) {
    INFO(rows << " x " << columns);
    CHECK(error_after_updates<TestType>(rows, columns, 1, 1e-8, 2) < test::tolerance<TestType>);
  }
}

TEMPLATE_TEST_CASE("factored adam: gradients of every size, whose squares' products fit no float",
                   "[optim][factored_adam]", float, double) {
  for (const double scale : {1e-15, 1e-6, 1e6, 1e15}) {
    INFO("scale " << scale);
    CHECK(error_after_updates<TestType>(13, 21, scale, 1e-30, 5) < test::tolerance<TestType>);
  }
}

TEMPLATE_TEST_CASE("factored adam: of rank one it is adam without a first moment",
                   "[optim][factored_adam]", float, double) {
  // g² = a·bᵀ, where a stays the same or b does, the signs being any.
  for (const bool rows_stay : {true, false}) {
    for (const auto& [rows, columns] : {std::pair<Index, Index>{1, 19}, {19, 1}, {11, 17}}) {
      Parameter<TestType> factored = scattered_parameter<TestType>(rows, columns, 1);
      Parameter<TestType> full = factored;
      FactoredAdam<TestType> factored_adam({.beta2 = 0.9, .weight_decay = 0.1});
      Adam<TestType> adam({.beta1 = 0, .beta2 = 0.9, .weight_decay = 0.1});
      for (std::uint64_t t = 1; t <= 10; ++t) {
        const Matrix<TestType> a = random_matrix<TestType>(rows, 1, rows_stay ? 100 : 100 + t);
        const Matrix<TestType> b = random_matrix<TestType>(1, columns, rows_stay ? 200 + t : 200);
        const Matrix<TestType> signs = random_matrix<TestType>(rows, columns, 300 + t);
        for (Parameter<TestType>* p : {&factored, &full}) {
          p->gradient() = (a * b).cwiseProduct(
              signs.unaryExpr([](TestType s) { return s < 0 ? TestType{-1} : TestType{1}; }));
        }
        factored_adam.update(factored, 0.05);
        adam.update(full, 0.05);
      }
      CHECK(test::relative_error(factored.value, full.value) < test::tolerance<TestType>);
    }
  }
}

TEST_CASE("factored adam: far from rank one a small element moves far", "[optim][factored_adam]") {
  Parameter<double> p(2, 2);
  p.gradient() << 1000, 0, 0, 1;
  FactoredAdam<double> adam({.epsilon = 1e-12});
  adam.update(p, 0.001);
  // r = c = (5e5, 0.5), mean(r) = 250000.25: v̂ = 0.25/250000.25 for the last.
  CHECK_THAT(p.value(1, 1), Catch::Matchers::WithinRel(-0.001 * std::sqrt(250000.25 / 0.25), 1e-8));
  CHECK_THAT(p.value(0, 0), Catch::Matchers::WithinRel(-0.001 * std::sqrt(250000.25) / 500, 1e-8));
}

TEMPLATE_TEST_CASE("factored adam: no gradient in a row or a column, no move of it",
                   "[optim][factored_adam]", float, double) {
  Parameter<TestType> p = scattered_parameter<TestType>(9, 5, 1);
  const Matrix<TestType> before = p.value;
  p.gradient().setOnes();
  p.gradient().row(3).setZero();
  p.gradient().col(2).setZero();
  FactoredAdam<TestType> adam;
  adam.update(p, 0.1);
  for (Index i = 0; i < 9; ++i) {
    for (Index j = 0; j < 5; ++j) CHECK((p.value(i, j) == before(i, j)) == (i == 3 || j == 2));
  }

  // Nor a move when everything was forgotten.
  FactoredAdam<TestType> forgetful({.beta2 = 0});
  forgetful.update(p, 0.1);
  const Matrix<TestType> then = p.value;
  p.gradient().setZero();
  forgetful.update(p, 0.1);
  CHECK(test::same_bits(p.value, then));
}

TEMPLATE_TEST_CASE("factored adam: what is not finite makes NaN of its own matrix only",
                   "[optim][factored_adam]", float, double) {
  constexpr auto largest = std::numeric_limits<TestType>::max();
  for (const TestType bad :
       {std::numeric_limits<TestType>::quiet_NaN(), std::numeric_limits<TestType>::infinity(),
        -std::numeric_limits<TestType>::infinity(), largest}) {
    INFO("gradient " << bad);
    Linear<TestType> module({.inputs = 7, .outputs = 13}, 1);
    module.weight.gradient().setOnes();
    module.bias.gradient().setOnes();
    module.weight.gradient()(2, 11) = bad;
    FactoredAdam<TestType> adam;
    adam.update(module, 0.1);
    CHECK(module.weight.value.array().isNaN().all());
    CHECK(module.bias.value.array().isFinite().all());
    module.weight.gradient().setOnes();
    module.weight.value.setZero();
    adam.update(module, 0.1);
    CHECK(module.weight.value.array().isNaN().all());
  }
}

TEST_CASE("factored adam: remembers D + H numbers of a D x H matrix", "[optim][factored_adam]") {
  Linear<float> module({.inputs = 30, .outputs = 20}, 1);
  FactoredAdam<float> adam;
  std::map<std::string, std::pair<Index, Index>> shapes;
  std::map<std::string, Index> counts;
  adam.for_each_state(module, [&](const std::string& name, auto&& value) {
    if constexpr (requires { value.rows(); }) {
      shapes[name] = {value.rows(), value.cols()};
      CHECK(value.isZero(0));
    } else {
      counts[name] = static_cast<Index>(value.size());
    }
  });
  CHECK(shapes == std::map<std::string, std::pair<Index, Index>>{{"row_means.weight", {30, 1}},
                                                                 {"column_means.weight", {1, 20}},
                                                                 {"row_means.bias", {1, 1}},
                                                                 {"column_means.bias", {1, 20}}});
  CHECK(counts == std::map<std::string, Index>{{"steps", 1}, {"updates", 2}});
}

TEST_CASE("factored adam: remembers means", "[optim][factored_adam]") {
  Parameter<double> p(2, 3);
  p.gradient() << 1, 2, 1, -5, 4, 1;  // squares 1 4 1; 25 16 1
  FactoredAdam<double> adam({.beta2 = 0.5});
  adam.update(p, 0.1);
  const auto holds = [](const Matrix<double>& actual, std::initializer_list<double> expected) {
    CHECK(actual.size() == static_cast<Index>(expected.size()));
    Index i = 0;
    for (const double value : expected) {
      CHECK_THAT(actual.data()[i++], Catch::Matchers::WithinRel(value, 1e-14));
    }
  };
  adam.for_each_state(p, [&](const std::string& name, auto&& value) {
    if constexpr (requires { value.rows(); }) {
      if (name.starts_with("row_means")) {
        holds(value, {1, 7});
      } else {
        holds(value, {6.5, 5, 0.5});
      }
    } else {
      CHECK(value[0] == 1);
    }
  });
}

TEST_CASE("factored adam: what is wrong is named", "[optim][factored_adam]") {
  CHECK_THROWS_WITH(FactoredAdam<float>({.beta2 = 1}),
                    "moe: FactoredAdam::Config.beta2 = 1, must be in [0, 1)");
  CHECK_THROWS_WITH(FactoredAdam<float>({.beta2 = -1}),
                    "moe: FactoredAdam::Config.beta2 = -1, must be in [0, 1)");
  CHECK_THROWS_WITH(FactoredAdam<float>({.epsilon = 0}),
                    "moe: FactoredAdam::Config.epsilon = 0, must be finite and above 0");
  // Would be zero, and of a gradient of zero make NaN.
  CHECK_THROWS_AS(FactoredAdam<float>({.epsilon = 1e-60}), std::invalid_argument);
  CHECK_NOTHROW(FactoredAdam<double>({.epsilon = 1e-60}));
  CHECK_THROWS_AS(FactoredAdam<double>({.epsilon = std::numeric_limits<double>::infinity()}),
                  std::invalid_argument);
  CHECK_THROWS_AS(FactoredAdam<float>({.beta2 = std::nan("")}), std::invalid_argument);
}

TEST_CASE("factored adam: lazy, large parameters too, the bias by their own updates",
          "[optim][factored_adam][lazy]") {
  // β2 = ½ and a gradient of 1: at its own update t the second moment over its correction is 1.
  std::vector<Parameter<float>> experts(2, Parameter<float>(600, 500));
  detail::track_gradients(experts);
  FactoredAdam<float> adam({.beta2 = 0.5, .updates = Updates::lazy});
  for (int t = 1; t <= 3; ++t) {
    zero_gradients(experts, Updates::lazy);
    auto& routed = experts[t == 2 ? 1 : 0];
    detail::accumulate(routed);
    routed.gradient().setOnes();
    adam.update(experts, 0.25);
  }
  CHECK((experts[0].value.array() + 2 * 0.25f).abs().maxCoeff() < 1e-5f);
  CHECK((experts[1].value.array() + 0.25f).abs().maxCoeff() < 1e-5f);
}

TEST_CASE("factored adam: trains a layer, lazily", "[optim][factored_adam]") {
  MoELayer<Expert<FeedForward>> layer(
      {.width = 8, .expert = {.hidden = 16}, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
  const Matrix<float> x = random_matrix<float>(64, 8, 2);
  const Matrix<float> target = x.cwiseAbs();
  FactoredAdam<float> adam({.updates = Updates::lazy});
  MoELayer<Expert<FeedForward>>::Tape tape;
  float first = 0;
  float last = 0;
  for (std::uint32_t step = 0; step < 200; ++step) {
    zero_gradients(layer, Updates::lazy);
    const Matrix<float> error = layer.forward(x, tape, {.step = step}) - target;
    layer.backward(error / 64.0f, tape);
    adam.update(layer, 1e-2);
    last = error.squaredNorm();
    if (step == 0) first = last;
  }
  CHECK(last < 0.1f * first);
}
