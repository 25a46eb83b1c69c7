#pragma once

#include <cstdint>
#include <moe/moe.hpp>
#include <moe/weights/narrow_weight.hpp>
#include <optional>
#include <utility>

/// \file
/// What surrounds each layer of the model.

namespace language_model {

using moe::Index;

/// An RMSNorm, or nothing.
template <class Scalar>
class OptionalNorm {
  using Matrix = moe::Matrix<Scalar>;
  using Norm = moe::RMSNorm<Scalar>;

 public:
  using Tape = typename Norm::Tape;

  OptionalNorm(bool present, Index width) {
    if (present) norm_.emplace(typename Norm::Config{.width = width});
  }

  const Matrix& forward(const Matrix& x, Tape& tape) const {
    return norm_ ? norm_->forward(x, tape) : x;
  }
  const Matrix& backward(const Matrix& dy, Tape& tape) {
    return norm_ ? norm_->backward(dy, tape) : dy;
  }
  const Matrix& evaluate(const Matrix& x, Tape& tape) const {
    return norm_ ? norm_->evaluate(x, tape) : x;
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    if (self.norm_) Norm::visit_parameters(*self.norm_, visit);
  }

 private:
  std::optional<Norm> norm_;
};

struct ResidualConfig {
  Index width = 0;
  bool pre_norm = false;
  double dropout = 0;
};

/// y = x + dropout(layer(norm(x))): a layer that is added to its own input.
template <class Layer, class Scalar = float>
class Residual {
  using Matrix = moe::Matrix<Scalar>;

 public:
  using State = typename Layer::State;

  struct Tape {
    typename OptionalNorm<Scalar>::Tape norm;
    typename Layer::Tape layer;
    typename moe::Dropout<Scalar>::Tape dropout;
    Matrix y;
    Matrix dx;
  };

  /// `seed` is that of dropout; the layer is made of the rest.
  template <class... Arguments>
  Residual(const ResidualConfig& config, std::uint64_t seed, Arguments&&... layer)
      : norm_(config.pre_norm, config.width),
        layer_(std::forward<Arguments>(layer)...),
        dropout_({.rate = config.dropout}, seed) {}

  /// One around a trained layer, with the layer that is served in its place.
  template <class Trained>
  Residual(const Residual<Trained, Scalar>& trained, const moe::NarrowOptions& options)
      : norm_(trained.norm_), layer_(trained.layer_, options), dropout_(trained.dropout_) {}

  /// One around a trained layer, with another in its place.
  template <class Trained>
  Residual(const Residual<Trained, Scalar>& trained, Layer layer)
      : norm_(trained.norm_), layer_(std::move(layer)), dropout_(trained.dropout_) {}

  const Layer& layer() const { return layer_; }
  Layer& layer() { return layer_; }

  /// `key` is the layer's.
  const Matrix& forward(const Matrix& x, State& state, Tape& tape, const moe::NoiseKey& key,
                        const moe::NoiseKey& dropout_key) const {
    const Matrix& y = layer_.forward(norm_.forward(x, tape.norm), state, tape.layer, key);
    tape.y = x + dropout_.forward(y, tape.dropout, dropout_key);
    return tape.y;
  }

  const Matrix& backward(const Matrix& dy, Tape& tape) {
    const Matrix& of_layer = layer_.backward(dropout_.backward(dy, tape.dropout), tape.layer);
    tape.dx = dy + norm_.backward(of_layer, tape.norm);
    return tape.dx;
  }

  const Matrix& evaluate(const Matrix& x, State& state, Tape& tape) const {
    tape.y = x + layer_.evaluate(norm_.evaluate(x, tape.norm), state, tape.layer);
    return tape.y;
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("norm", self.norm_);
    Layer::visit_parameters(self.layer_, visit);
  }

 private:
  template <class, class>
  friend class Residual;

  OptionalNorm<Scalar> norm_;
  Layer layer_;
  moe::Dropout<Scalar> dropout_;
};

}  // namespace language_model
