/// A gate of one's own: fixed random planes cut the space into 2^b parts, each with an expert. It
/// trains a factor of each and checks its gradient. (../custom_gate has a gate that learns its choice.)

#include <cstdint>
#include <cstdio>
#include <moe/moe.hpp>
#include <moe/testing/check_gradients.hpp>
#include <span>

#include "../common/clouds.hpp"

template <class Scalar_>
struct HashGate {
  using Scalar = Scalar_;
  using Tape = moe::GateTape<Scalar>;
  struct Config {
    moe::Index width = 0;  ///< D; the layer fills it in
    moe::Index bits = 0;   ///< b, for 2^b experts
  };

  HashGate(const Config& config, std::uint64_t seed)
      : planes(config.width, config.bits), factor(1, moe::Index{1} << config.bits) {
    moe::fill_normal(planes.value, Scalar{1}, seed);
    planes.trained = false;  // saved with the layer, but no optimizer moves it
    factor.value.setOnes();
  }
  moe::Index experts() const { return factor.value.cols(); }

  void forward(const moe::MatrixRef<Scalar>& x, Tape& tape, const moe::Pass& pass) const {
    evaluate(x, tape, {.valid = pass.valid});
  }
  void evaluate(const moe::MatrixRef<Scalar>& x, Tape& tape,
                const moe::EvaluationPass& pass) const {
    moe::Routing<Scalar>& routing = tape.routing;
    routing = {.experts = experts(), .token_offsets = {0}, .expert = {}, .weight = {}};
    const moe::Matrix<Scalar> sides = x * planes.value;
    for (moe::Index t = 0; t < x.rows(); ++t) {
      if (pass.valid.empty() || pass.valid[static_cast<std::size_t>(t)] != 0) {  // else padding
        moe::Index part = 0;
        for (const Scalar side : sides.row(t)) part = 2 * part + (side > 0);
        routing.expert.push_back(part);
        routing.weight.push_back(factor.value(0, part));
      }
      routing.token_offsets.push_back(routing.slots());
    }
    moe::count_slots(routing, tape.balance);  // for what watches the balance
  }
  /// dweight is the gradient with respect to each slot's weight. The choice has none, so dx stays.
  void backward(const moe::MatrixRef<Scalar>&, std::span<const Scalar> dweight, Tape& tape,
                moe::Matrix<Scalar>&) {
    if (!factor.trained) return;
    for (std::size_t slot = 0; slot < dweight.size(); ++slot)
      factor.gradient()(0, tape.routing.expert[slot]) += dweight[slot];
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("planes", self.planes), visit("factor", self.factor);
  }

  moe::Parameter<Scalar> planes, factor;
};

template <class Scalar>
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward, Scalar>, HashGate<Scalar>>;

int main() {
  Layer<double> small({.width = 3, .expert = {.hidden = 4}, .gate = {.bits = 2}, .seed = 1});
  moe::Matrix<double> x(6, 3);
  moe::fill_normal(x, 1.0, 2);
  const moe::GradientCheck check = moe::check_layer_gradients(small, x, {.step = 1});
  std::printf("%s\n", check.text().c_str());

  Layer<float> layer({.width = 8, .expert = {.hidden = 32}, .gate = {.bits = 4}, .seed = 3});
  const examples::Clouds clouds;
  examples::train(layer, clouds, 600);
  const double left = examples::unexplained(layer, clouds);
  std::printf("%.1f %% of the squares of new tokens are left unexplained\n", 100 * left);
  return check.error < 1e-7 && left < 0.2 ? 0 : 1;
}
