#pragma once

#include <cstddef>
#include <cstdint>
#include <moe/moe.hpp>
#include <moe/weights/narrow_linear.hpp>
#include <optional>
#include <vector>

/// \file
/// LSTMs of any width within a model of one width, alone and one after the other.

namespace language_model {

using moe::Index;

/// Multiply-adds a token of an LSTM whose output is projected back to the width of its input, unless
/// it has that already.
inline Index lstm_operations(Index width, Index hidden) {
  return (width + hidden) * 4 * hidden + (hidden != width ? hidden * width : 0);
}

struct RecurrentConfig {
  Index width = 0;   ///< D, of input and output
  Index hidden = 0;  ///< H, of the LSTM
};

/// An LSTM whose output is projected back to the width of its input, unless it has that already.
/// `Linear` is a moe::Linear, or a moe::NarrowLinear to serve.
template <class Scalar = float, class Linear = moe::Linear<Scalar>>
class Recurrent {
  using Matrix = moe::Matrix<Scalar>;
  using LSTM = moe::LSTM<Scalar>;

 public:
  using Config = RecurrentConfig;
  using State = typename LSTM::State;

  struct Tape {
    typename LSTM::Tape lstm;
    typename Linear::Tape projection;
  };

  Recurrent(const Config& config, std::uint64_t seed)
      : config_(config), lstm_({.inputs = config.width, .hidden = config.hidden}, seed) {
    if (config.hidden != config.width) {
      projection_.emplace(
          typename Linear::Config{.inputs = config.hidden, .outputs = config.width, .bias = false},
          moe::derive_seed(seed, 2));
    }
  }

  /// One that was trained, its projection rounded; the LSTM stays as it is.
  Recurrent(const Recurrent<Scalar>& trained, const moe::NarrowOptions& options)
      : config_(trained.config_), lstm_(trained.lstm_) {
    if (trained.projection_) projection_.emplace(*trained.projection_, options);
  }

  State initial_state(Index sequences) const { return lstm_.initial_state(sequences); }

  /// Multiply-adds a token.
  Index operations() const { return lstm_operations(config_.width, config_.hidden); }

  /// The key is of no use: nothing is drawn.
  const Matrix& forward(const Matrix& x, State& state, Tape& tape, const moe::NoiseKey&) const {
    const Matrix& y = lstm_.forward(x, state, tape.lstm);
    return projection_ ? projection_->forward(y, tape.projection) : y;
  }

  const Matrix& backward(const Matrix& dy, Tape& tape) {
    return lstm_.backward(projection_ ? projection_->backward(dy, tape.projection) : dy, tape.lstm);
  }

  const Matrix& evaluate(const Matrix& x, State& state, Tape& tape) const {
    const Matrix& y = lstm_.evaluate(x, state, tape.lstm);
    return projection_ ? projection_->evaluate(y, tape.projection) : y;
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("lstm", self.lstm_);
    if (self.projection_) visit("projection", *self.projection_);
  }

 private:
  template <class, class>
  friend class Recurrent;

  Config config_;
  LSTM lstm_;
  std::optional<Linear> projection_;
};

/// In place of the mixture: LSTMs one after the other, each added to its own input. The result is
/// what all of them have added, Σ r_i(x_i) with x_{i+1} = x_i + r_i(x_i); nothing, if there is none.
template <class Scalar = float>
class RecurrentStack {
  using Matrix = moe::Matrix<Scalar>;
  using Layer = Recurrent<Scalar>;

 public:
  using State = std::vector<typename Layer::State>;

  struct Config {
    Index layers = 0;
    Index hidden = 0;  ///< of each LSTM
  };

  struct Tape {
    std::vector<typename Layer::Tape> layers;
    Matrix x;   ///< x_i
    Matrix y;   ///< the sum
    Matrix dx;  ///< ∂ by x_{i+1}, at the end by x
    moe::Balance<Scalar> of_none;

    /// Of no experts.
    const moe::Balance<Scalar>& balance() const { return of_none; }
  };

  RecurrentStack(const Config& config, Index width, std::uint64_t seed) {
    for (Index i = 0; i < config.layers; ++i) {
      layers_.emplace_back(typename Layer::Config{.width = width, .hidden = config.hidden},
                           moe::derive_seed(seed, static_cast<std::uint64_t>(i)));
    }
  }

  Index experts() const { return 0; }
  Index top_k() const { return 0; }
  Index operations() const {
    Index sum = 0;
    for (const Layer& layer : layers_) sum += layer.operations();
    return sum;
  }

  State initial_state(Index sequences) const {
    State state;
    for (const Layer& layer : layers_) state.push_back(layer.initial_state(sequences));
    return state;
  }

  const Matrix& forward(const Matrix& x, State& state, Tape& tape, const moe::NoiseKey& key) const {
    return run(x, tape, [&](std::size_t i) -> const Matrix& {
      return layers_[i].forward(tape.x, state[i], tape.layers[i], key);
    });
  }

  /// Without the gradient that the model's own sum passes on.
  const Matrix& backward(const Matrix& dy, Tape& tape) {
    tape.dx = dy;
    for (std::size_t i = layers_.size(); i-- > 0;) {
      tape.dx += layers_[i].backward(tape.dx, tape.layers[i]);
    }
    tape.dx -= dy;
    return tape.dx;
  }

  const Matrix& evaluate(const Matrix& x, State& state, Tape& tape) const {
    return run(x, tape, [&](std::size_t i) -> const Matrix& {
      return layers_[i].evaluate(tape.x, state[i], tape.layers[i]);
    });
  }

  void after_update(const Tape&) {}

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("lstms", self.layers_);
  }

 private:
  template <class F>
  const Matrix& run(const Matrix& x, Tape& tape, F&& layer) const {
    tape.layers.resize(layers_.size());
    tape.x = x;
    tape.y.setZero(x.rows(), x.cols());
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const Matrix& added = layer(i);
      tape.y += added;
      tape.x += added;
    }
    return tape.y;
  }

  std::vector<Layer> layers_;
};

}  // namespace language_model
