#include <cmath>
#include <string>
#include <vector>

#include "../naive_layer.hpp"
#include "../rounding.hpp"
#include "moe/experts/feed_forward.hpp"
#include "passes.hpp"

using namespace moe;
using namespace moe::test;

namespace {

using Config = FeedForwardConfig;

/// Every form, and both kinds of activations: with a kink and without.
std::vector<Config> forms(Index width, Index hidden) {
  std::vector<Config> all;
  for (int bits = 0; bits < 32; ++bits) {
    const bool gated = (bits & 1) != 0;
    const bool bias = (bits & 2) != 0;
    all.push_back({.width = width,
                   .hidden = hidden,
                   .activation = (bits & 4) != 0 ? Activation::relu : Activation::silu,
                   .gated = gated,
                   .bias = bias,
                   .limit = (bits & 8) != 0 ? 0.5 : 0.0,
                   .linear_offset = gated && bias ? 1.0 : 0.0,
                   .weighted_input = (bits & 16) != 0});
  }
  return all;
}

std::string text(const Config& c) {
  return "gated " + std::to_string(c.gated) + ", bias " + std::to_string(c.bias) + ", silu " +
         std::to_string(c.activation == Activation::silu) + ", limit " + std::to_string(c.limit) +
         ", weighted input " + std::to_string(c.weighted_input);
}

template <class Scalar>
FeedForward<Scalar> network_of(Config config, Precision saved) {
  config.saved = saved;
  FeedForward<Scalar> network(config, 1);
  randomize(network, 2, 0.7);
  return network;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

TEMPLATE_TEST_CASE("saved precision: backward has the bits of a tape whose numbers were rounded",
                   "[experts]", float, double) {
  for (const Index hidden : {1, 37, 2 * static_cast<int>(detail::panel_columns<TestType>) + 5}) {
    for (const Config& config : forms(19, hidden)) {
      INFO("H " << hidden << ", " << text(config));
      auto full = network_of<TestType>(config, Precision::full);
      auto narrow = network_of<TestType>(config, Precision::bfloat16);
      const Index rows = hidden == 37 ? 70 : 11;
      const Matrix<TestType> x = random_matrix<TestType>(rows, 19, 5);
      const Matrix<TestType> dy = random_matrix<TestType>(rows, 19, 6);
      const Matrix<TestType> weight = random_matrix<TestType>(1, rows, 7);
      Passes<TestType> expected(full, GatheredRows<TestType>(x));
      expected.forward(full, weight);
      for (TestType& number : expected.saved.reshaped()) {
        number = static_cast<TestType>(round_to_8_bits(static_cast<double>(number)));
      }
      expected.backward(full, dy, weight);
      Passes<TestType> actual(narrow, GatheredRows<TestType>(x));
      actual.forward(narrow, weight);
      CHECK(same_bits(actual.y, expected.y));
      actual.backward(narrow, dy, weight);
      CHECK(same_bits(actual.dx, expected.dx));
      CHECK(same_bits(actual.dweight, expected.dweight));
      const Named gradients = gradients_of(full);
      for (const auto& [name, gradient] : gradients_of(narrow)) {
        INFO(name);
        CHECK(same_bits(gradient, gradients.at(name)));
      }
    }
  }
}

TEST_CASE("saved precision: gradients by their formulas at rounded pre-activations", "[experts]") {
  for (const bool gated : {false, true}) {
    const Index width = 5;
    const Index hidden = 60;
    const Index rows = 13;
    auto network = network_of<double>({.width = width,
                                       .hidden = hidden,
                                       .activation = Activation::silu,
                                       .gated = gated,
                                       .bias = true},
                                      Precision::bfloat16);
    std::map<std::string, Matrix<double>> p;
    for_each_parameter(network, [&](const std::string& name, const Parameter<double>& parameter) {
      p[name] = parameter.value;
    });
    const Matrix<double> x = random_matrix(rows, width, 5);
    const Matrix<double> dy = random_matrix(rows, width, 6);
    const Matrix<double> w = random_matrix(1, rows, 7);
    const std::string first = gated ? "gate" : "up";
    Matrix<double> dx = Matrix<double>::Zero(rows, width);
    Matrix<double> dweight = Matrix<double>::Zero(1, rows);
    Matrix<double> dfirst = Matrix<double>::Zero(width, hidden);
    Matrix<double> ddown = Matrix<double>::Zero(hidden, width);
    double largest_change = 0;
    for (Index t = 0; t < rows; ++t) {
      dweight(0, t) = dy.row(t).dot(p["down.bias"].row(0));
      for (Index h = 0; h < hidden; ++h) {
        const auto pre = [&](const std::string& part) {
          const double exact = x.row(t).dot(p[part + ".weight"].col(h)) + p[part + ".bias"](0, h);
          largest_change = std::max(largest_change, std::abs(round_to_8_bits(exact) / exact - 1));
          return round_to_8_bits(exact);
        };
        const double z = pre(first);
        const double l = gated ? pre("up") : 1;
        const double act = z * sigmoid(z);
        const double slope = sigmoid(z) * (1 + z * (1 - sigmoid(z)));
        const double u = dy.row(t).dot(p["down.weight"].row(h));
        dweight(0, t) += u * act * l;
        ddown.row(h) += w(0, t) * act * l * dy.row(t);
        const double dz = w(0, t) * u * l * slope;
        dfirst.col(h) += dz * x.row(t).transpose();
        dx.row(t) += dz * p[first + ".weight"].col(h).transpose();
        if (gated) dx.row(t) += w(0, t) * u * act * p["up.weight"].col(h).transpose();
      }
    }
    CHECK(largest_change > 0.003);  // it does round
    CHECK(largest_change < 0.004);  // by up to 2^-8
    Passes<double> actual(network, GatheredRows<double>(x));
    actual.forward(network, w);
    actual.backward(network, dy, w);
    CHECK(relative_error(actual.dx, dx) < 1e-12);
    CHECK(relative_error(actual.dweight, dweight) < 1e-12);
    const Named gradients = gradients_of(network);
    CHECK(relative_error(gradients.at(first + ".weight"), dfirst) < 1e-12);
    CHECK(relative_error(gradients.at("down.weight"), ddown) < 1e-12);
  }
}

TEST_CASE("saved precision: what bfloat16 holds is not changed", "[experts]") {
  // Whole numbers below 256.
  for (Config config : forms(3, 50)) {
    INFO(text(config));
    std::vector<Named> gradients;
    std::vector<Matrix<double>> dx;
    for (const Precision saved : {Precision::full, Precision::bfloat16}) {
      config.saved = saved;
      FeedForward<double> network(config, 0);
      for_each_parameter(network, [](const std::string&, Parameter<double>& p) {
        p.value = (2 * random_matrix(p.value.rows(), p.value.cols(), 3)).array().round().matrix();
      });
      const Matrix<double> x = (2 * random_matrix(9, 3, 4)).array().round().matrix();
      Passes<double> passes(network, GatheredRows<double>(x));
      passes.forward(network);
      passes.backward(network, x, Matrix<double>::Ones(1, 9));
      gradients.push_back(gradients_of(network));
      dx.push_back(passes.dx);
    }
    CHECK(same_bits(dx[0], dx[1]));
    for (const auto& [name, gradient] : gradients[0]) {
      CHECK(same_bits(gradient, gradients[1].at(name)));
    }
  }
}

TEST_CASE("saved precision: two bytes a number, in whole Scalars", "[experts]") {
  const auto width = []<class Scalar>(Scalar, Index hidden, bool gated) {
    return FeedForward<Scalar>(
               {.width = 3, .hidden = hidden, .gated = gated, .saved = Precision::bfloat16}, 0)
        .tape_width();
  };
  CHECK(width(1.0f, 8, false) == 4);
  CHECK(width(1.0f, 7, false) == 4);
  CHECK(width(1.0f, 7, true) == 7);
  CHECK(width(1.0f, 1, false) == 1);
  CHECK(width(1.0, 8, false) == 2);
  CHECK(width(1.0, 9, false) == 3);
  CHECK(width(1.0, 5, true) == 3);
}

TEST_CASE("saved precision: a bad one is refused with its field", "[experts]") {
  Config config{.width = 1, .hidden = 1, .recompute = true, .saved = Precision::bfloat16};
  CHECK_THROWS_AS(FeedForward<float>(config, 0), std::invalid_argument);
  CHECK_THROWS_WITH(FeedForward<float>(config, 0),
                    "moe: FeedForward::Config.saved = bfloat16, must be full with recompute, which "
                    "saves nothing");
  config.recompute = false;
  CHECK_NOTHROW(FeedForward<float>(config, 0));
  for (const int number : {-1, 2}) {
    config.saved = static_cast<Precision>(number);
    CHECK_THROWS_WITH(FeedForward<float>(config, 0),
                      "moe: FeedForward::Config.saved = " + std::to_string(number) +
                          ", must be one of the 2 precisions");
  }
}
