#pragma once

#include <cmath>
#include <cstdint>
#include <moe/moe.hpp>

/// \file
/// A network from points of the plane to numbers, with a mixture in the middle.

namespace routing_map {

using moe::Index;
using Matrix = moe::Matrix<float>;

///     h = tanh(x·W + b)      y = (h + MoE(h))·V + c
class Network {
 public:
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;

  struct Config {
    Index width = 16;
    Index hidden = 16;
    Index experts = 8;
    Index top_k = 2;
    std::uint64_t seed = 1;
  };
  struct Tape {
    moe::Linear<float>::Tape in, out;
    Layer::Tape mixture;
    Matrix h, sum, dh;
  };

  explicit Network(const Config& config)
      : in_({.inputs = 2, .outputs = config.width}, moe::derive_seed(config.seed, 0)),
        mixture_({.width = config.width,
                  .expert = {.hidden = config.hidden},
                  .gate = {.experts = config.experts, .top_k = config.top_k},
                  .seed = moe::derive_seed(config.seed, 1)}),
        out_({.inputs = config.width, .outputs = 1}, moe::derive_seed(config.seed, 2)) {}

  /// y, a number for each row of x (T x 2).
  const Matrix& forward(const Matrix& x, Tape& tape, const moe::Pass& pass) const {
    tape.h = in_.forward(x, tape.in).array().tanh();
    tape.sum = tape.h + mixture_.forward(tape.h, tape.mixture, pass);
    return out_.forward(tape.sum, tape.out);
  }
  /// dy is the gradient with respect to y.
  void backward(const Matrix& dy, Tape& tape) {
    const Matrix& dsum = out_.backward(dy, tape.out);
    tape.dh = dsum + mixture_.backward(dsum, tape.mixture);
    tape.dh.array() *= 1 - tape.h.array().square();
    in_.backward(tape.dh, tape.in);
  }
  Matrix evaluate(const Matrix& x, Tape& tape) const {
    tape.h = in_.evaluate(x).array().tanh();
    tape.sum = tape.h + mixture_.evaluate(tape.h, tape.mixture);
    return out_.evaluate(tape.sum);
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("in", self.in_);
    visit("mixture", self.mixture_);
    visit("out", self.out_);
  }

 private:
  moe::Linear<float> in_;
  Layer mixture_;
  moe::Linear<float> out_;
};

}  // namespace routing_map
