#pragma once

#include "moe/kernels/simd.hpp"
#include "moe/optim/parameter_blocks.hpp"
#include "moe/optim/parameter_state.hpp"

namespace moe {

/// Stochastic gradient descent with momentum and decoupled weight decay:
///
///     v = momentum·v + g                    v starts at 0
///     w = (1 - η·weight_decay)·w - η·v      η the learning rate
///
/// B. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964. After the
/// first update of a module no further one allocates; without momentum nothing is remembered.
///
/// Updates::lazy leaves an expert that got no token entirely alone, where a dense update decays its
/// weights and moves them on by their momentum, which decays too.
template <class Scalar = float>
class Sgd {
 public:
  struct Config {
    double momentum = 0;      ///< in [0, 1)
    double weight_decay = 0;  ///< at least 0
    Updates updates = Updates::dense;
  };

  Sgd() : Sgd(Config{}) {}
  /// For `Sgd optimizer({})`, which the copy constructor would be as good for.
  explicit Sgd(detail::Defaults) : Sgd() {}
  explicit Sgd(const Config& config) : config_(config) {
    detail::require(config.momentum >= 0 && config.momentum < 1,
                    "Sgd::Config.momentum = ", config.momentum, ", must be in [0, 1)");
    detail::require(config.weight_decay >= 0 && std::isfinite(config.weight_decay),
                    "Sgd::Config.weight_decay = ", config.weight_decay,
                    ", must be finite and at least 0");
  }

  const Config& config() const { return config_; }

  /// Moves every parameter by its gradient. Throws std::invalid_argument, with nothing changed, if
  /// the learning rate is negative or not finite, or the module is not that of the first update.
  template <class Module>
  void update(Module& module, double learning_rate) {
    detail::check_learning_rate("Sgd", learning_rate);
    const bool plain = config_.momentum == 0;
    if (!plain) velocity_.match(module, "Sgd");
    const Constants constants{
        detail::broadcast(static_cast<Scalar>(config_.momentum)),
        detail::broadcast(static_cast<Scalar>(1 - learning_rate * config_.weight_decay)),
        detail::broadcast(static_cast<Scalar>(-learning_rate))};
    detail::for_each_parameter_block(
        module, config_.updates,
        [&](Index, Index index, Parameter<Scalar>& parameter, Index first, Index count) {
          update_block(constants, count, parameter.value.data() + first,
                       parameter.stored.memory.data() + first,
                       plain ? nullptr : velocity_[index].data() + first);
        });
  }

  /// What the optimizer remembers of a module, to be saved or restored: with momentum, calls
  /// f(name, matrix) with "velocity.experts.3.up.weight" and so on. Throws std::invalid_argument if
  /// the module is not that of the first update.
  template <class Module, class F>
  void for_each_state(const Module& module, F&& f) {
    if (config_.momentum == 0) return;
    velocity_.match(module, "Sgd");
    velocity_.for_each(module, "velocity", f);
  }

 private:
  using Packet = detail::Packet<Scalar>;

  struct Constants {
    Packet momentum;
    Packet decay;
    Packet step;
  };

  /// Without momentum `v` is null and g takes its place.
  static void update_block(const Constants& k, Index count, Scalar* w, const Scalar* g, Scalar* v) {
    using namespace Eigen::internal;
    const auto accumulate = [&k](const Packet& pv, const Packet& pg) {
      return pmadd(k.momentum, pv, pg);
    };
    const auto move = [&k](const Packet& pw, const Packet& direction) {
      return pmadd(k.step, direction, pmul(k.decay, pw));
    };
    if (v != nullptr) detail::map(count, v, accumulate, v, g);
    detail::map(count, w, move, w, v != nullptr ? v : g);
  }

  Config config_;
  detail::ParameterState<Scalar> velocity_;
};

}  // namespace moe
