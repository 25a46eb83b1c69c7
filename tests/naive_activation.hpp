#pragma once

#include <cmath>
#include <numbers>
#include <vector>

#include "moe/kernels/activations.hpp"

/// \file
/// The activations and their derivatives from their formulas, in double.

namespace moe::test {

inline const std::vector<Activation>& all_activations() {
  static const std::vector<Activation> all = {
      Activation::identity, Activation::relu,      Activation::squared_relu,
      Activation::gelu,     Activation::gelu_tanh, Activation::gelu_sigmoid,
      Activation::silu,     Activation::sigmoid,   Activation::tanh};
  return all;
}
/// At 0, over which no difference may step.
inline bool has_kink(Activation activation) {
  return activation == Activation::relu || activation == Activation::squared_relu;
}

inline double naive_cdf(double z) { return 0.5 * std::erfc(-z / std::numbers::sqrt2); }
inline double naive_density(double z) {
  return std::exp(-z * z / 2) / std::sqrt(2 * std::numbers::pi);
}

inline double naive_activation(Activation activation, double x) {
  switch (activation) {
    case Activation::identity:
      return x;
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::squared_relu:
      return x > 0 ? x * x : 0;
    case Activation::gelu:
      return x * naive_cdf(x);
    case Activation::gelu_tanh:
      return 0.5 * x *
             (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
    case Activation::gelu_sigmoid:
      return x / (1 + std::exp(-1.702 * x));
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::tanh:
      return std::tanh(x);
  }
  return std::nan("");
}

inline double naive_derivative(Activation activation, double x) {
  const double sigmoid = 1 / (1 + std::exp(-x));
  switch (activation) {
    case Activation::identity:
      return 1;
    case Activation::relu:
      return x > 0 ? 1 : 0;
    case Activation::squared_relu:
      return x > 0 ? 2 * x : 0;
    case Activation::gelu:
      return naive_cdf(x) + x * naive_density(x);
    case Activation::gelu_tanh: {
      const double slope = std::sqrt(2 / std::numbers::pi);
      const double t = std::tanh(slope * (x + 0.044715 * x * x * x));
      return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope * (1 + 3 * 0.044715 * x * x);
    }
    case Activation::gelu_sigmoid: {
      const double s = 1 / (1 + std::exp(-1.702 * x));
      return s + 1.702 * x * s * (1 - s);
    }
    case Activation::silu:
      return sigmoid + x * sigmoid * (1 - sigmoid);
    case Activation::sigmoid:
      return sigmoid * (1 - sigmoid);
    case Activation::tanh:
      return 1 - std::tanh(x) * std::tanh(x);
  }
  return std::nan("");
}

}  // namespace moe::test
