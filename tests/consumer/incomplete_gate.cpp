// Must compile as it is, and must not with one of these defined, which leaves out a part of the gate:
// then the message says which (tests/CMakeLists.txt).
//     WITHOUT_SCALAR WITHOUT_CONFIG WITHOUT_TAPE WITHOUT_GATE_TAPE WITHOUT_SEED WITHOUT_WIDTH
//     WITHOUT_EXPERTS WITHOUT_FORWARD WITHOUT_EVALUATE WITHOUT_BACKWARD WITHOUT_PARAMETERS
//     WITHOUT_PRESENT_CONFIG, and with OF_SHARED too for the gate inside a SharedExpertGate

#include <cstdint>
#include <span>

#include "moe/gates/shared_expert_gate.hpp"
#include "moe/layer/moe_layer.hpp"

namespace {

struct AllToOne {
#ifndef WITHOUT_SCALAR
  using Scalar = float;
#endif
#ifndef WITHOUT_CONFIG
  struct Config {
#ifndef WITHOUT_WIDTH
    moe::Index width = 0;
#endif
    double loss_weight = 0;
  };
#ifdef WITHOUT_SEED
  explicit AllToOne(const Config& config) : config_(config) {}
#else
  AllToOne(const Config& config, std::uint64_t) : config_(config) {}
#endif
#ifndef WITHOUT_PRESENT_CONFIG
  const Config& config() const { return config_; }
#endif
  struct LossWeights {
    double own = 0;
  };
  void set_loss_weights(const LossWeights& weights) { config_.loss_weight = weights.own; }
#endif
#if defined(WITHOUT_GATE_TAPE)
  struct Tape {};
#elif !defined(WITHOUT_TAPE)
  using Tape = moe::GateTape<float>;
#endif
  using AnyTape = moe::GateTape<float>;

#ifndef WITHOUT_EXPERTS
  moe::Index experts() const { return 1; }
#endif
#ifndef WITHOUT_FORWARD
  void forward(const moe::MatrixRef<float>& x, AnyTape& tape, const moe::Pass&) const {
    route(x.rows(), tape);
  }
#endif
#ifndef WITHOUT_EVALUATE
  void evaluate(const moe::MatrixRef<float>& x, AnyTape& tape, const moe::EvaluationPass&) const {
    route(x.rows(), tape);
  }
#endif
#ifndef WITHOUT_BACKWARD
  void backward(const moe::MatrixRef<float>&, std::span<const float>, AnyTape&,
                moe::Matrix<float>&) {}
#endif
#ifndef WITHOUT_PARAMETERS
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}
#endif

 private:
#ifndef WITHOUT_CONFIG
  Config config_;
#endif

  static void route(moe::Index rows, AnyTape& tape) {
    tape.routing.experts = 1;
    tape.routing.token_offsets.clear();
    for (moe::Index t = 0; t <= rows; ++t) tape.routing.token_offsets.push_back(t);
    tape.routing.expert.assign(static_cast<std::size_t>(rows), 0);
    tape.routing.weight.assign(static_cast<std::size_t>(rows), 1.0f);
  }
};

}  // namespace

#ifdef OF_SHARED
using Gate = moe::SharedExpertGate<AllToOne>;
#else
using Gate = AllToOne;
#endif
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>, Gate>;

#ifndef WITHOUT_CONFIG
void fade(Layer& layer) { layer.set_loss_weights({.own = 0.5}); }
#endif

const moe::Matrix<float>& pass(const Layer& layer, const moe::Matrix<float>& x, Layer::Tape& tape) {
  return layer.forward(x, tape, {.step = 0});
}
