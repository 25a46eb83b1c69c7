#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "../naive_layer.hpp"

/// \file
/// A network and a gate as users may write them.

namespace moe::test {

/// A user's network with a single matrix, y = sin(x)·W, which counts the rows of its calls.
template <class Scalar_>
struct SineMap {
  using Scalar = Scalar_;
  struct Config {
    Index width = 0;
  };

  explicit SineMap(const Config& config, std::uint64_t seed) : w(config.width, config.width) {
    fill_normal(w.value, static_cast<Scalar>(0.6), seed);
  }
  Index tape_width() const { return 0; }
  void forward(ConstMatrixView<Scalar> x, MatrixView<Scalar>, MatrixView<Scalar> y) const {
    evaluate(x, y);
  }
  void evaluate(ConstMatrixView<Scalar> x, MatrixView<Scalar> y) const {
    rows_forward += x.rows();
    ++calls;
    y = x.array().sin().matrix() * w.value;
  }
  void backward(ConstMatrixView<Scalar> x, ConstMatrixView<Scalar>, ConstMatrixView<Scalar> dy,
                MatrixView<Scalar> dx) {
    rows_backward += x.rows();
    ++calls;
    w.gradient() += x.array().sin().matrix().transpose() * dy;
    dx = (dy * w.value.transpose()).cwiseProduct(x.array().cos().matrix());
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("w", self.w);
  }

  Parameter<Scalar> w;
  mutable Index rows_forward = 0;
  mutable Index calls = 0;
  Index rows_backward = 0;
};

/// A user's gate: token t goes to t mod 3 experts, which have learned weights, times 1 + Σ x_t.
struct HashGate {
  using Scalar = double;
  struct Config {
    Index width = 0;
    Index experts = 0;
  };
  using Tape = GateTape<double>;

  explicit HashGate(const Config& config, std::uint64_t) : strength(1, config.experts) {
    for (Index e = 0; e < config.experts; ++e)
      strength.value(0, e) = 0.5 + 0.3 * static_cast<double>(e);
  }
  Index experts() const { return strength.value.cols(); }
  void forward(const MatrixRef<double>& x, Tape& tape, const Pass&) const { evaluate(x, tape); }
  void evaluate(const MatrixRef<double>& x, Tape& tape, const EvaluationPass& = {}) const {
    Routing<double>& routing = tape.routing;
    routing.experts = experts();
    routing.token_offsets = {0};
    routing.expert.clear();
    routing.weight.clear();
    for (Index t = 0; t < x.rows(); ++t) {
      std::vector<Index> chosen;
      for (Index k = 0; k < t % 3; ++k) chosen.push_back((5 * t + 2 * k) % experts());
      std::sort(chosen.begin(), chosen.end());
      for (const Index e : chosen) {
        routing.expert.push_back(e);
        routing.weight.push_back(strength.value(0, e) * (1 + x.row(t).sum()));
      }
      routing.token_offsets.push_back(routing.slots());
    }
    tape.balance.loss = strength.value.squaredNorm();
  }
  void backward(const MatrixRef<double>& x, std::span<const double> dweight, Tape& tape,
                Matrix<double>& dx) {
    for (Index t = 0; t < x.rows(); ++t) {
      for (Index s = tape.routing.token_offsets[detail::to_size(t)];
           s < tape.routing.token_offsets[detail::to_size(t) + 1]; ++s) {
        const Index e = tape.routing.expert[detail::to_size(s)];
        const double d = dweight[detail::to_size(s)];
        strength.gradient()(0, e) += d * (1 + x.row(t).sum());
        dx.row(t).array() += d * strength.value(0, e);
      }
    }
    strength.gradient() += 2 * strength.value;
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("strength", self.strength);
  }

  Parameter<double> strength;
};

}  // namespace moe::test
