#include <cmath>
#include <string>

#include "../naive_layer.hpp"
#include "../rounding.hpp"
#include "moe/experts/feed_forward.hpp"
#include "passes.hpp"

using namespace moe;
using namespace moe::test;

namespace {

using Config = FeedForwardConfig;

FeedForward<float> network_of(Config config, Precision products) {
  config.products = products;
  FeedForward<float> network(config, 1);
  randomize(network, 2, 0.7);
  return network;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

TEST_CASE("rounded products: the formulas with operands of 8 bits", "[experts]") {
  for (const bool gated : {false, true}) {
    CAPTURE(gated);
    const Index width = 21;
    const Index hidden = 203;
    const Index rows = 37;
    const Config config{.width = width,
                        .hidden = hidden,
                        .activation = Activation::silu,
                        .gated = gated,
                        .bias = true};
    auto network = network_of(config, Precision::bfloat16);
    std::map<std::string, Matrix<double>> p;
    std::map<std::string, Matrix<double>> rounded;
    for_each_parameter(network, [&](const std::string& name, const Parameter<float>& parameter) {
      p[name] = parameter.value.cast<double>();
      rounded[name] = round_to_8_bits(p[name]);
    });
    const Matrix<float> x = random_matrix<float>(rows, width, 5);
    const Matrix<float> dy = random_matrix<float>(rows, width, 6);
    const Matrix<float> weight = random_matrix<float>(1, rows, 7);
    const Matrix<double> rx = round_to_8_bits(Matrix<double>(x.cast<double>()));
    const Matrix<double> rdy = round_to_8_bits(Matrix<double>(dy.cast<double>()));
    const std::string first = gated ? "gate" : "up";
    const auto pre_of = [&](const std::string& name) -> Matrix<double> {
      return (rx * rounded[name + ".weight"]).rowwise() + p[name + ".bias"].row(0);
    };
    const Matrix<double> z = pre_of(first);
    const Matrix<double> linear =
        gated ? pre_of("up") : Matrix<double>(Matrix<double>::Ones(rows, hidden));
    const Matrix<double> u = rdy * rounded["down.weight"].transpose();
    Matrix<double> a(rows, hidden);
    Matrix<double> dz(rows, hidden);
    Matrix<double> dlinear(rows, hidden);
    Matrix<double> dweight = Matrix<double>::Zero(1, rows);
    for (Index t = 0; t < rows; ++t) {
      const double w = weight(0, t);
      dweight(0, t) = dy.row(t).cast<double>().dot(p["down.bias"].row(0));
      for (Index h = 0; h < hidden; ++h) {
        const double s = sigmoid(z(t, h));
        const double act = z(t, h) * s;
        a(t, h) = w * act * linear(t, h);
        dweight(0, t) += u(t, h) * act * linear(t, h);
        dz(t, h) = w * u(t, h) * linear(t, h) * s * (1 + z(t, h) * (1 - s));
        dlinear(t, h) = w * u(t, h) * act;
      }
    }
    const Matrix<double> w_column = weight.cast<double>().transpose();
    const Matrix<double> y =
        round_to_8_bits(a) * rounded["down.weight"] + w_column * p["down.bias"];
    Matrix<double> dx = round_to_8_bits(dz) * rounded[first + ".weight"].transpose();
    if (gated) dx += round_to_8_bits(dlinear) * rounded["up.weight"].transpose();
    Named expected;
    expected[first + ".weight"] = rx.transpose() * round_to_8_bits(dz);
    expected[first + ".bias"] = dz.colwise().sum();
    if (gated) {
      expected["up.weight"] = rx.transpose() * round_to_8_bits(dlinear);
      expected["up.bias"] = dlinear.colwise().sum();
    }
    expected["down.weight"] = round_to_8_bits(a).transpose() * rdy;
    expected["down.bias"] = w_column.transpose() * dy.cast<double>();

    Passes<float> actual(network, GatheredRows<float>(x));
    actual.forward(network, weight);
    actual.backward(network, dy, weight);
    auto full = network_of(config, Precision::full);
    Passes<float> other(full, GatheredRows<float>(x));
    other.forward(full, weight);
    other.backward(full, dy, weight);
    // A number in the middle between two of 8 bits may go to either.
    const auto check = [](const Matrix<double>& given, const Matrix<double>& wanted,
                          const Matrix<double>& unrounded) {
      CHECK(relative_error(given, wanted) < 2e-4);
      CHECK(relative_error(unrounded, wanted) > 6e-4);
      CHECK(relative_error(unrounded, wanted) < 2e-2);
    };
    check(actual.y.cast<double>(), y, other.y.cast<double>());
    check(actual.dx.cast<double>(), dx, other.dx.cast<double>());
    check(actual.dweight.cast<double>(), dweight, other.dweight.cast<double>());
    const Named gradients = gradients_of(network);
    const Named unrounded = gradients_of(full);
    REQUIRE(gradients.size() == expected.size());
    for (const auto& [name, gradient] : gradients) {
      INFO(name);
      if (name == "down.bias") {
        CHECK(same_bits(gradient, unrounded.at(name)));
        CHECK(relative_error(gradient, expected.at(name)) < 1e-5);
      } else {
        check(gradient, expected.at(name), unrounded.at(name));
      }
    }
  }
}

TEST_CASE("rounded products: what 8 bits hold is not changed", "[experts]") {
  // Whole numbers below 256, in every form.
  for (int bits = 0; bits < 16; ++bits) {
    const Config config{.width = 3,
                        .hidden = 50,
                        .activation = Activation::relu,
                        .gated = (bits & 1) != 0,
                        .bias = (bits & 2) != 0,
                        .weighted_input = (bits & 4) != 0,
                        .recompute = (bits & 8) != 0};
    CAPTURE(bits);
    std::vector<Named> gradients;
    std::vector<Matrix<float>> y;
    std::vector<Matrix<float>> dx;
    for (const Precision products : {Precision::full, Precision::bfloat16}) {
      auto network = network_of(config, products);
      for_each_parameter(network, [](const std::string&, Parameter<float>& p) {
        p.value = random_matrix<float>(p.value.rows(), p.value.cols(), 3).array().round().matrix();
      });
      const Matrix<float> x = random_matrix<float>(9, 3, 4).array().round().matrix();
      const Matrix<float> dy = random_matrix<float>(9, 3, 8).array().round().matrix();
      Passes<float> passes(network, GatheredRows<float>(x));
      y.push_back(passes.forward(network));
      CHECK(y.back().cwiseAbs().maxCoeff() > 2);
      passes.backward(network, dy, Matrix<float>::Ones(1, 9));
      gradients.push_back(gradients_of(network));
      dx.push_back(passes.dx);
    }
    CHECK(y[0] == y[1]);
    CHECK(dx[0] == dx[1]);
    for (const auto& [name, gradient] : gradients[0]) CHECK(gradient == gradients[1].at(name));
  }
}

TEST_CASE("rounded products: a token has its bits whatever tokens it comes with", "[experts]") {
  for (const bool gated : {false, true}) {
    auto network =
        network_of({.width = 37, .hidden = 411, .activation = Activation::gelu, .gated = gated},
                   Precision::bfloat16);
    const Index rows = 300;
    const Matrix<float> x = random_matrix<float>(rows, 37, 5);
    const Matrix<float> dy = random_matrix<float>(rows, 37, 6);
    const Matrix<float> weight = random_matrix<float>(1, rows, 7);
    Passes<float> all(network, GatheredRows<float>(x));
    all.forward(network, weight);
    all.backward(network, dy, weight);
    for (const Range range : {Range{0, 1}, Range{17, 2}, Range{100, 9}, Range{255, 45}}) {
      CAPTURE(gated, range.first, range.count);
      const Matrix<float> part = x.middleRows(range.first, range.count);
      const Matrix<float> w = weight.middleCols(range.first, range.count);
      Passes<float> some(network, GatheredRows<float>(part));
      some.forward(network, w);
      some.backward(network, dy.middleRows(range.first, range.count), w);
      CHECK(same_bits(some.y, all.y.middleRows(range.first, range.count)));
      CHECK(same_bits(some.dx, all.dx.middleRows(range.first, range.count)));
      CHECK(same_bits(some.dweight, all.dweight.middleCols(range.first, range.count)));
    }
  }
}

TEST_CASE("rounded products: a bad precision is refused with its field", "[experts]") {
  Config config{.width = 1, .hidden = 1, .products = Precision::bfloat16};
  CHECK_NOTHROW(FeedForward<float>(config, 0));
  CHECK_THROWS_AS(FeedForward<double>(config, 0), std::invalid_argument);
  CHECK_THROWS_WITH(FeedForward<double>(config, 0),
                    "moe: FeedForward::Config.products = bfloat16, must be full unless Scalar is "
                    "float");
  for (const int number : {-1, 2}) {
    config.products = static_cast<Precision>(number);
    CHECK_THROWS_WITH(FeedForward<float>(config, 0),
                      "moe: FeedForward::Config.products = " + std::to_string(number) +
                          ", must be one of the 2 precisions");
  }
}
