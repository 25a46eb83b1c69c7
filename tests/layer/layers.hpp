#pragma once

#include "../naive_layer.hpp"

/// \file
/// What the tests of layers of feed-forward experts behind a noisy gate need.

namespace moe::test {

template <class Scalar>
using Layer = MoELayer<Expert<FeedForward, Scalar>>;
template <class Scalar>
using LayerConfig = typename Layer<Scalar>::Config;

/// Small, with parameters that are not as at the start.
inline Layer<double> small_layer() {
  Layer<double> layer({.width = 3,
                       .expert = {.hidden = 4},
                       .gate = {.experts = 5, .top_k = 2},
                       .output = Activation::sigmoid,
                       .seed = 6});
  randomize(layer, 4, 0.5);
  return layer;
}

/// Largest error over all parameters' gradients, each relative to its largest entry.
inline double gradient_error(const Named& actual, const Named& expected) {
  REQUIRE(actual.size() == expected.size());
  double largest = 0;
  for (const auto& [name, gradient] : actual) {
    largest = std::max(largest, relative_error(gradient, expected.at(name)));
  }
  return largest;
}

/// dx and the parameters' gradients of ⟨r, y⟩ + balance loss against differences.
template <class Layer>
void check_against_differences(Layer& layer, Matrix<double>& x, const Pass& key,
                               const Matrix<double>& r, double weights, double inputs,
                               double steep = 1.0) {
  const Threads threads(1);  // too small for more
  typename Layer::Tape tape;
  zero_gradients(layer);
  layer.forward(x, tape, key);
  const Matrix<double> dx = layer.backward(r, tape);
  const auto loss = [&] {
    typename Layer::Tape fresh;
    return layer.forward(x, fresh, key).cwiseProduct(r).sum() + fresh.balance().loss;
  };
  check_scaled_gradients(layer, dx, x, loss, weights, inputs, steep);
}

/// Results and gradients of one training pass, from gradients at zero.
template <class Scalar>
struct Everything {
  Matrix<Scalar> y, dx;
  Scalar loss;
  Named gradients;

  template <class Layer>
  Everything(Layer& layer, const Matrix<Scalar>& x, const Matrix<Scalar>& r) {
    typename Layer::Tape tape;
    zero_gradients(layer);
    y = layer.forward(x, tape, {.step = 2});
    dx = layer.backward(r, tape);
    loss = tape.balance().loss;
    gradients = gradients_of(layer);
  }
  bool same_as(const Everything& other) const {
    bool same = same_bits(y, other.y) && same_bits(dx, other.dx) && loss == other.loss;
    for (const auto& [name, gradient] : gradients) {
      same = same && same_bits(gradient, other.gradients.at(name));
    }
    return same;
  }
};

/// A layer that sends every token with a positive first entry to expert `favourite`.
template <class Scalar>
void collapse(Layer<Scalar>& layer, Index favourite) {
  for_each_parameter(layer, [&](const std::string& name, Parameter<Scalar>& parameter) {
    if (name == "gate.weight") parameter.value(0, favourite) += Scalar{100};
  });
}
template <class Scalar>
Matrix<Scalar> with_positive_first_entry(Matrix<Scalar> x) {
  x.col(0) = (x.col(0).array().abs() + 1).matrix();
  return x;
}

}  // namespace moe::test
