#pragma once

#include <cstdint>
#include <moe/moe.hpp>

namespace examples {

/// Clouds of tokens, each with a linear map of its own from x to y: easy for a mixture that distinguishes
/// the clouds, and hard for any other model of its size.
class Clouds {
 public:
  static constexpr moe::Index width = 8;  ///< of x and y
  static constexpr moe::Index count = 6;  ///< of clouds

  Clouds() : centres_(count, width), maps_(count * width, width) {
    moe::fill_normal(centres_, 1.5f, 1);
    moe::fill_normal(maps_, 0.35f, 2);
  }

  /// The same clouds with other maps, which differ by normal numbers of this standard deviation.
  Clouds changed(float stddev) const {
    moe::Matrix<float> difference(maps_.rows(), maps_.cols());
    moe::fill_normal(difference, stddev, 3);
    Clouds other = *this;
    other.maps_ += difference;
    return other;
  }

  /// Tokens for training or testing, others for each seed: x and y are tokens x width.
  void draw(moe::Index tokens, std::uint64_t seed, moe::Matrix<float>& x,
            moe::Matrix<float>& y) const {
    x.resize(tokens, width);
    y.resize(tokens, width);
    moe::fill_normal(x, 0.5f, seed);
    for (moe::Index t = 0; t < tokens; ++t) {
      const moe::Index cloud = t % count;
      x.row(t) += centres_.row(cloud);
      y.row(t).noalias() = x.row(t) * maps_.middleRows(cloud * width, width);
    }
  }

 private:
  moe::Matrix<float> centres_;
  moe::Matrix<float> maps_;
};

/// The share of y's squares that a layer leaves unexplained on tokens it has never seen.
template <class Layer>
double unexplained(const Layer& layer, const Clouds& clouds) {
  moe::Matrix<float> x;
  moe::Matrix<float> y;
  clouds.draw(6000, 99, x, y);
  return static_cast<double>((layer.evaluate(x) - y).squaredNorm() / y.squaredNorm());
}

/// Trains a layer by the squared error with Adam, on new tokens at each update.
template <class Layer>
void train(Layer& layer, const Clouds& clouds, std::uint64_t updates) {
  typename Layer::Tape tape;
  moe::Adam<float> adam;
  moe::Matrix<float> x;
  moe::Matrix<float> y;
  const moe::Index tokens = 240;
  for (std::uint64_t step = 1; step <= updates; ++step) {
    clouds.draw(tokens, 100 + step, x, y);
    const moe::Matrix<float> dy = layer.forward(x, tape, {.step = step}) - y;
    moe::zero_gradients(layer);
    layer.backward(2 * dy / static_cast<float>(tokens), tape);
    adam.update(layer, 0.01);
  }
}

}  // namespace examples
