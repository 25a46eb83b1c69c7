#pragma once

#include <cmath>
#include <span>

#include "moe/kernels/packet.hpp"
#include "moe/optim/parameter_blocks.hpp"
#include "moe/optim/parameter_state.hpp"

namespace moe {

/// Adam with decoupled weight decay. At update t = 1, 2, ...:
///
///     m = β1·m + (1 - β1)·g            v = β2·v + (1 - β2)·g²        both start at 0
///     m̂ = m / (1 - β1^t)               v̂ = v / (1 - β2^t)
///     w = (1 - η·weight_decay)·w - η·m̂ / (√v̂ + ε)                    η the learning rate
///
/// D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015;
/// I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
///
/// Runs at the speed of memory: four reads and three writes a parameter. After the first update of
/// a module no further one allocates.
template <class Scalar = float>
class Adam {
 public:
  struct Config {
    double beta1 = 0.9;       ///< in [0, 1)
    double beta2 = 0.999;     ///< in [0, 1)
    double epsilon = 1e-8;    ///< above 0
    double weight_decay = 0;  ///< at least 0
  };

  Adam() : Adam(Config{}) {}
  explicit Adam(const Config& config) : config_(config) {
    detail::require(config.beta1 >= 0 && config.beta1 < 1, "Adam::Config.beta1 = ", config.beta1,
                    ", must be in [0, 1)");
    detail::require(config.beta2 >= 0 && config.beta2 < 1, "Adam::Config.beta2 = ", config.beta2,
                    ", must be in [0, 1)");
    detail::require(config.epsilon > 0 && std::isfinite(config.epsilon),
                    "Adam::Config.epsilon = ", config.epsilon, ", must be finite and above 0");
    detail::require(config.weight_decay >= 0 && std::isfinite(config.weight_decay),
                    "Adam::Config.weight_decay = ", config.weight_decay,
                    ", must be finite and at least 0");
  }

  const Config& config() const { return config_; }

  /// Moves every parameter by its gradient. `factors` scales the learning rate of each parameter, in
  /// the order of for_each_parameter(); empty stands for ones. Throws std::invalid_argument, with
  /// nothing changed, if the learning rate or a factor is negative or not finite, if there are not as
  /// many factors as parameters, or if the module is not that of the first update.
  template <class Module>
  void update(Module& module, double learning_rate, std::span<const double> factors = {}) {
    detail::check_learning_rate("Adam", learning_rate);
    for (const double factor : factors) detail::check_learning_rate("Adam", factor * learning_rate);
    first_moment_.match(module, "Adam");
    second_moment_.match(module, "Adam");
    detail::require(factors.empty() || static_cast<Index>(factors.size()) == first_moment_.size(),
                    "Adam::update: ", factors.size(), " factors for ", first_moment_.size(),
                    " parameters");
    ++steps_;
    const Constants common(config_, steps_);
    detail::for_each_parameter_block(
        module, [&](Index, Index index, Parameter<Scalar>& parameter, Index first, Index count) {
          const double factor = factors.empty() ? 1.0 : factors[detail::to_size(index)];
          update_block(common.at_rate(learning_rate * factor), count,
                       parameter.value.data() + first, parameter.gradient.data() + first,
                       first_moment_[index].data() + first, second_moment_[index].data() + first);
        });
  }

 private:
  using Packet = detail::Packet<Scalar>;

  /// The factors of one update. 1 - β^t is a small difference at first, so it is made in double.
  struct Constants {
    Constants(const Config& config, Index t)
        : beta1(packet(config.beta1)),
          one_minus_beta1(packet(1 - config.beta1)),
          beta2(packet(config.beta2)),
          one_minus_beta2(packet(1 - config.beta2)),
          epsilon(packet(config.epsilon)),
          root_scale(packet(1 / std::sqrt(correction(config.beta2, t)))),
          step(packet(0)),
          decay(packet(1)),
          first_correction(correction(config.beta1, t)),
          weight_decay(config.weight_decay) {}

    Constants at_rate(double learning_rate) const {
      Constants constants = *this;
      constants.step = packet(learning_rate / first_correction);
      constants.decay = packet(1 - learning_rate * weight_decay);
      return constants;
    }

    static double correction(double beta, Index t) {
      return 1 - std::pow(beta, static_cast<double>(t));
    }
    static Packet packet(double value) { return detail::broadcast(static_cast<Scalar>(value)); }

    Packet beta1, one_minus_beta1, beta2, one_minus_beta2, epsilon;
    Packet root_scale;  // √v̂ = √v · root_scale
    Packet step;        // η·m̂ = step · m
    Packet decay;
    double first_correction;
    double weight_decay;
  };

  static void update_block(const Constants& k, Index count, Scalar* w, const Scalar* g, Scalar* m,
                           Scalar* v) {
    using namespace Eigen::internal;
    detail::map(
        count, m,
        [&k](const Packet& pm, const Packet& pg) {
          return pmadd(k.beta1, pm, pmul(k.one_minus_beta1, pg));
        },
        m, g);
    detail::map(
        count, v,
        [&k](const Packet& pv, const Packet& pg) {
          return pmadd(k.beta2, pv, pmul(k.one_minus_beta2, pmul(pg, pg)));
        },
        v, g);
    detail::map(
        count, w,
        [&k](const Packet& pw, const Packet& pm, const Packet& pv) {
          const Packet root = pmadd(psqrt(pv), k.root_scale, k.epsilon);
          return psub(pmul(k.decay, pw), pdiv(pmul(k.step, pm), root));
        },
        w, m, v);
  }

  Config config_;
  Index steps_ = 0;
  detail::ParameterState<Scalar> first_moment_;
  detail::ParameterState<Scalar> second_moment_;
};

}  // namespace moe
