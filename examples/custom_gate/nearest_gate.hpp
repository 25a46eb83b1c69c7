#pragma once

#include <cmath>
#include <cstdint>
#include <moe/moe.hpp>
#include <span>
#include <stdexcept>

/// \file
/// A gate of your own: all that MoELayer needs, see moe/gates/gate.hpp.

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

    /// With names the fields are saved with the gate, and compared when it is loaded.
    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("experts", self.experts);
    }
  };

  NearestGate(const Config& config, std::uint64_t seed) : config_(config) {
    if (config.experts < 1) throw std::invalid_argument("NearestGate::Config.experts is below 1");
    centre_ = moe::Parameter<Scalar>(config.experts, config.width);
    moe::fill_normal(centre_.value, Scalar{1}, seed);
  }
  const Config& config() const { return config_; }
  Index experts() const { return config_.experts; }

  /// Training and serving are the same here: there is no noise.
  void forward(const moe::MatrixRef<Scalar>& x, Tape& tape, const moe::Pass& pass) const {
    route(x, pass.valid, tape);
  }
  void evaluate(const moe::MatrixRef<Scalar>& x, Tape& tape,
                const moe::EvaluationPass& pass = {}) const {
    route(x, pass.valid, tape);
  }

  /// x is that of forward(), dweight the gradient of the loss with respect to each slot's weight w,
  /// and ∂w/∂c = w·(2/D)·(x - c) = -∂w/∂x. All gradients are added to, dx too.
  void backward(const moe::MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                moe::Matrix<Scalar>& dx) {
    const Scalar scale = Scalar{2} / static_cast<Scalar>(centre_.value.cols());
    const bool trained = centre_.trained;  // false: the centres are frozen, and dx is still needed
    for (Index t = 0; t < x.rows(); ++t) {
      const moe::Range slots = tape.routing.slots_of_token(t);
      for (Index slot = slots.first; slot < slots.first + slots.count; ++slot) {
        const Index e = tape.routing.expert[slot];
        const Scalar slope =
            scale * tape.routing.weight[slot] * dweight[static_cast<std::size_t>(slot)];
        if (trained) centre_.gradient().row(e) += slope * (x.row(t) - centre_.value.row(e));
        dx.row(t) -= slope * (x.row(t) - centre_.value.row(e));
      }
    }
  }

  /// What optimizers, checkpoints and gradient checks see: in a layer, "gate.centre".
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("centre", self.centre_);
  }

 private:
  /// One slot a token, and none for padding. (A gate with several has token_offsets that are further
  /// apart, and lists the experts of each token in ascending order.)
  void route(const moe::MatrixRef<Scalar>& x, std::span<const std::uint8_t> valid,
             Tape& tape) const {
    moe::Routing<Scalar>& routing = tape.routing;
    routing.experts = experts();
    routing.token_offsets.assign(1, 0);
    routing.expert.clear();
    routing.weight.clear();
    for (Index t = 0; t < x.rows(); ++t) {
      if (valid.empty() || valid[static_cast<std::size_t>(t)] != 0) {
        Index nearest = 0;
        const Scalar distance =
            (centre_.value.rowwise() - x.row(t)).rowwise().squaredNorm().minCoeff(&nearest);
        routing.expert.push_back(nearest);
        routing.weight.push_back(std::exp(-distance / static_cast<Scalar>(x.cols())));
      }
      routing.token_offsets.push_back(routing.slots());
    }
    moe::count_slots(routing, tape.balance);
  }

  Config config_;
  moe::Parameter<Scalar> centre_;  ///< E x D
};

static_assert(moe::Gate<NearestGate<float>>);

}  // namespace custom_gate
