#include <algorithm>
#include <cmath>

#include "../naive_layer.hpp"
#include "moe/experts/feed_forward.hpp"
#include "passes.hpp"

/// \file
/// The expert networks of published models, a scalar at a time from their published code, against
/// FeedForward with the options of docs/gates.md.

using namespace moe;
using namespace moe::test;

namespace {

/// y of the network, and what f(x, w, weight of the slot) makes of it with the parameters w by name.
template <class F>
void check_published(const FeedForward<double>::Config& config, double inputs, const F& f) {
  FeedForward<double> network(config, 0);
  test::randomize(network, 3, 1);
  const test::Named w = test::values_of(network);
  const Matrix<double> x = random_matrix(6, config.width, 4, inputs);
  const Matrix<double> y = test::Passes<double>(network, GatheredRows<double>(x)).evaluate(network);
  Matrix<double> expected(x.rows(), x.cols());
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index d = 0; d < x.cols(); ++d) {
      expected(t, d) = w.contains("down.bias") ? w.at("down.bias")(0, d) : 0;
    }
    for (Index j = 0; j < config.hidden; ++j) {
      const auto map = [&](const char* weight, const char* bias) {
        double sum = w.contains(bias) ? w.at(bias)(0, j) : 0;
        for (Index d = 0; d < x.cols(); ++d) sum += x(t, d) * w.at(weight)(d, j);
        return sum;
      };
      const double up = map("up.weight", "up.bias");
      const double a = config.gated ? f(map("gate.weight", "gate.bias"), up) : f(up, 0.0);
      for (Index d = 0; d < x.cols(); ++d) expected(t, d) += a * w.at("down.weight")(j, d);
    }
  }
  CHECK(relative_error(y, expected) < 1e-13);
}

}  // namespace

TEST_CASE("published experts: gpt-oss", "[experts]") {
  Index limited = 0;
  check_published({.width = 5,
                   .hidden = 9,
                   .activation = Activation::gelu_sigmoid,
                   .gated = true,
                   .bias = true,
                   .limit = 7,
                   .linear_offset = 1},
                  4, [&](double gate, double up) {
                    limited += gate > 7;
                    limited += std::abs(up) > 7;
                    gate = std::min(gate, 7.0);
                    up = std::clamp(up, -7.0, 7.0);
                    return (up + 1) * gate / (1 + std::exp(-1.702 * gate));
                  });
  CHECK(limited > 10);
}

TEST_CASE("published experts: MiniMax-M3", "[experts]") {
  check_published({.width = 5,
                   .hidden = 9,
                   .activation = Activation::gelu_sigmoid,
                   .gated = true,
                   .limit = 7,
                   .linear_offset = 1},
                  4, [](double gate, double up) {
                    gate = std::min(gate, 7.0);
                    up = std::clamp(up, -7.0, 7.0);
                    return (up + 1) * gate / (1 + std::exp(-1.702 * gate));
                  });
}

TEST_CASE("published experts: DeepSeek-V4", "[experts]") {
  check_published(
      {.width = 5, .hidden = 9, .activation = Activation::silu, .gated = true, .limit = 10}, 8,
      [](double gate, double up) {
        gate = std::min(gate, 10.0);
        return gate / (1 + std::exp(-gate)) * std::clamp(up, -10.0, 10.0);
      });
}

TEST_CASE("published experts: Nemotron-H", "[experts]") {
  check_published({.width = 5, .hidden = 9, .activation = Activation::squared_relu, .bias = false},
                  1, [](double up, double) { return up > 0 ? up * up : 0; });
}

TEST_CASE("published experts: SwiGLU of Mixtral, Qwen and DeepSeek-V3", "[experts]") {
  check_published({.width = 5, .hidden = 9, .activation = Activation::silu, .gated = true}, 1,
                  [](double gate, double up) { return gate / (1 + std::exp(-gate)) * up; });
}
