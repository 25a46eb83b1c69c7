#pragma once

#include <cmath>
#include <cstdint>
#include <moe/moe.hpp>
#include <span>
#include <stdexcept>

/// \file
/// A gate of one's own: all that MoELayer asks for, see moe/gates/gate.hpp.

namespace custom_gate {

using moe::Index;

/// Every expert has a place among the tokens, its centre c. A token goes to the expert whose centre
/// is nearest, with the weight e^(-|x - c|² / D). The centres are trained; there is no noise and no
/// balance loss.
template <class Scalar_ = float>
class NearestGate {
 public:
  using Scalar = Scalar_;
  using Tape = moe::GateTape<Scalar>;
  struct Config {
    Index width = 0;    ///< D; a layer fills it in
    Index experts = 0;  ///< E, at least 1
  };

  NearestGate(const Config& config, std::uint64_t seed) {
    if (config.experts < 1) throw std::invalid_argument("NearestGate::Config.experts is below 1");
    centre_ = moe::Parameter<Scalar>(config.experts, config.width);
    moe::fill_normal(centre_.value, Scalar{1}, seed);
  }
  Index experts() const { return centre_.value.rows(); }

  /// Training and serving are the same here: there is no noise.
  void forward(const moe::MatrixRef<Scalar>& x, Tape& tape, const moe::Pass&) const {
    evaluate(x, tape);
  }

  /// One slot a token. (A gate with several has token_offsets that are further apart, and lists the
  /// experts of each token in ascending order.)
  void evaluate(const moe::MatrixRef<Scalar>& x, Tape& tape, const moe::EvaluationPass& = {}) const {
    tape.routing.experts = experts();
    tape.routing.token_offsets.assign(1, 0);
    tape.routing.expert.clear();
    tape.routing.weight.clear();
    for (Index t = 0; t < x.rows(); ++t) {
      Index nearest = 0;
      const Scalar distance =
          (centre_.value.rowwise() - x.row(t)).rowwise().squaredNorm().minCoeff(&nearest);
      tape.routing.expert.push_back(nearest);
      tape.routing.weight.push_back(std::exp(-distance / static_cast<Scalar>(x.cols())));
      tape.routing.token_offsets.push_back(t + 1);
    }
  }

  /// x is that of forward(), dweight the gradient of the loss with respect to each slot's weight w,
  /// and ∂w/∂c = w·(2/D)·(x - c) = -∂w/∂x. All gradients are added to, dx too.
  void backward(const moe::MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                moe::Matrix<Scalar>& dx) {
    const Scalar scale = Scalar{2} / static_cast<Scalar>(centre_.value.cols());
    for (std::size_t slot = 0; slot < dweight.size(); ++slot) {
      const auto t = static_cast<Index>(slot);
      const Index e = tape.routing.expert[slot];
      const Scalar slope = scale * tape.routing.weight[slot] * dweight[slot];
      centre_.gradient().row(e) += slope * (x.row(t) - centre_.value.row(e));
      dx.row(t) -= slope * (x.row(t) - centre_.value.row(e));
    }
  }

  /// What optimizers, checkpoints and gradient checks see: in a layer, "gate.centre".
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("centre", self.centre_);
  }

 private:
  moe::Parameter<Scalar> centre_;  ///< E x D
};

static_assert(moe::Gate<NearestGate<float>>);

}  // namespace custom_gate
