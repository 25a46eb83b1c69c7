#pragma once

#include <utility>

#include "moe/kernels/simd.hpp"
#include "moe/optim/parameter_blocks.hpp"
#include "moe/optim/parameter_groups.hpp"
#include "moe/optim/parameter_state.hpp"

namespace moe {

/// Stochastic gradient descent with momentum and decoupled weight decay:
///
///     v = momentum·v + g                    v starts at 0
///     w = (1 - η·weight_decay)·w - η·v      η the learning rate
///
/// B. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964. After the
/// first update of a module, later updates do not allocate, except for parameters that were not
/// trained until then. Without momentum there is no state.
///
/// Updates::lazy leaves an expert that got no token entirely alone, where a dense update decays its
/// weights and moves them on by their momentum, which decays too.
template <class Scalar = float>
class SGD {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    double momentum = 0;               ///< in [0, 1)
    double weight_decay = 0;           ///< at least 0
    Updates updates = Updates::dense;  ///< whether experts without tokens are left alone
  };

  SGD() : SGD(Config{}) {}
  /// For `SGD optimizer({})`, which would be ambiguous otherwise.
  explicit SGD(detail::Defaults) : SGD() {}
  /// Throws std::invalid_argument for a configuration out of range.
  explicit SGD(const Config& config) : config_(config) {
    detail::check_decay_rate("SGD", "momentum", config.momentum);
    detail::check_weight_decay("SGD", config.weight_decay);
  }

  /// The configuration.
  const Config& config() const { return config_; }

  /// Sets learning rates and weight decays by the parameters' names; see ParameterGroups. An empty
  /// function removes them.
  void set_groups(ParameterGroups groups) { groups_.set(std::move(groups)); }

  /// Moves every parameter by its gradient. Throws std::invalid_argument, with nothing changed, if
  /// the learning rate or a field of a group is negative or not finite, or, with momentum, if the module is
  /// not that of the first update.
  template <class Module>
  void update(Module& module, double learning_rate) {
    groups_.match(module, "SGD", config_.weight_decay, learning_rate);
    const bool plain = config_.momentum == 0;
    if (!plain) velocity_.match(module, "SGD");
    detail::for_each_parameter_block(
        module, config_.updates,
        [&](Index, Index index, Parameter<Scalar>& parameter, Index first, Index count) {
          if (groups_.is_fixed(index)) return;
          const auto [factor, decay] = groups_[index];
          update_block(constants_at(learning_rate * factor, decay), count,
                       parameter.value.data() + first, parameter.stored.memory.data() + first,
                       plain ? nullptr : velocity_[index].data() + first);
        });
  }

  /// Changes the optimizer's state in step with the experts of a layer that is a part of the model of
  /// update(). Call it right after each change of the experts. The velocities of parameters that stayed
  /// keep their bits; copies get those of their original, fresh parameters and columns zeros. Throws
  /// std::invalid_argument, with nothing changed, if the change is not the layer's last, or, with
  /// momentum, if follow() was not called for an earlier one.
  template <class Module, class Layer>
  void follow(const Module& model, const Layer& layer, const ExpertChange& change) {
    detail::follow_change("SGD", model, layer, change, velocity_.known(), velocity_);
  }

  /// The whole state of the optimizer for a module, to save or restore it: with momentum, calls
  /// f(name, matrix) with "velocity.experts.3.up.weight" and so on; the matrix of a parameter that was
  /// never trained is empty, 0 x 0, which stands for zeros. An f(name, matrix, shape) also gets the
  /// StateShape that the matrix has when it is not empty. Throws std::invalid_argument if the
  /// module is not that of the first update.
  template <class Module, class F>
  void for_each_state(const Module& module, F&& f) {
    if (config_.momentum == 0) return;
    velocity_.match(module, "SGD");
    velocity_.for_each(module, "velocity", f);
  }

 private:
  using Packet = detail::Packet<Scalar>;

  struct Constants {
    Packet momentum;
    Packet decay;
    Packet step;
  };

  Constants constants_at(double learning_rate, double weight_decay) const {
    const auto packet = [](double value) { return detail::broadcast(static_cast<Scalar>(value)); };
    return {packet(config_.momentum), packet(1 - learning_rate * weight_decay),
            packet(-learning_rate)};
  }

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
  detail::ResolvedGroups groups_;
  detail::ParameterState<Scalar> velocity_;
};

}  // namespace moe
