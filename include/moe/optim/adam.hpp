#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "moe/kernels/math.hpp"
#include "moe/optim/parameter_blocks.hpp"
#include "moe/optim/parameter_groups.hpp"
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
/// Dense Adam, the default, moves every parameter at every update: the weights of an expert that
/// got no token go on moving by its old m, and m, v and the weights go on decaying. Updates::lazy
/// leaves such an expert entirely alone, and t counts the updates of each parameter by itself, so
/// every expert gets exactly the Adam of the updates at which it had tokens. PyTorch's SparseAdam,
/// the closest relative, leaves rows alone in the same way, but uses the optimizer's t for all of
/// them.
///
/// Limited by memory bandwidth: four reads and three writes per parameter. After the first update
/// of a module, later updates do not allocate, except for parameters that were not trained until
/// then.
template <class Scalar = float>
class Adam {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    double beta1 = 0.9;                ///< in [0, 1)
    double beta2 = 0.999;              ///< in [0, 1)
    double epsilon = 1e-8;             ///< above 0
    double weight_decay = 0;           ///< at least 0
    Updates updates = Updates::dense;  ///< whether experts without tokens are left alone
  };

  Adam() : Adam(Config{}) {}
  /// For `Adam optimizer({})`, which would be ambiguous otherwise.
  explicit Adam(detail::Defaults) : Adam() {}
  /// Throws std::invalid_argument for a configuration out of range.
  explicit Adam(const Config& config) : config_(config) {
    detail::check_decay_rate("Adam", "beta1", config.beta1);
    detail::check_decay_rate("Adam", "beta2", config.beta2);
    detail::require(config.epsilon > 0 && std::isfinite(config.epsilon),
                    "Adam::Config.epsilon = ", config.epsilon, ", must be finite and above 0");
    detail::check_weight_decay("Adam", config.weight_decay);
  }

  /// The configuration.
  const Config& config() const { return config_; }

  /// Sets learning rates and weight decays by the parameters' names; see ParameterGroups. An empty
  /// function removes them.
  void set_groups(ParameterGroups groups) { groups_.set(std::move(groups)); }

  /// Moves every parameter by its gradient. Throws std::invalid_argument, with nothing changed, if
  /// the learning rate or a field of a group is negative or not finite, or if the module is not that
  /// of the first update.
  template <class Module>
  void update(Module& module, double learning_rate) {
    groups_.match(module, "Adam", config_.weight_decay, learning_rate);
    detail::match_states(module, "Adam", first_moment_, second_moment_, updates_);
    const Constants common(config_, updates_.total() + 1);
    detail::for_each_parameter_block(
        module, config_.updates,
        [&](Index, Index index, Parameter<Scalar>& parameter, Index first, Index count) {
          if (groups_.is_fixed(index)) return;
          const Index made = updates_[index];
          const bool as_often = made == updates_.total();
          const Constants constants = as_often ? common : Constants(config_, made + 1);
          const auto [factor, decay] = groups_[index];
          update_block(constants.at_rate(learning_rate * factor, decay), count,
                       parameter.value.data() + first, parameter.stored.memory.data() + first,
                       first_moment_[index].data() + first, second_moment_[index].data() + first);
        });
    updates_.add(module, config_.updates, groups_);
  }

  /// Changes the optimizer's state in step with the experts of a layer that is a part of the model of
  /// update(). Call it right after each change of the experts. The state of parameters that stayed, and
  /// their numbers of updates, keep their bits; copies get those of their original, fresh parameters and
  /// columns zeros. Throws std::invalid_argument, with nothing changed, if the change is not the
  /// layer's last, or if follow() was not called for an earlier one.
  template <class Module, class Layer>
  void follow(const Module& model, const Layer& layer, const ExpertChange& change) {
    detail::follow_change("Adam", model, layer, change, first_moment_.known(), first_moment_,
                          second_moment_, updates_);
  }

  /// The whole state of the optimizer for a module, to save or restore it: calls
  /// f(name, matrix) with "first_moment.experts.3.up.weight" and "second_moment. ...", and
  /// f(name, numbers), a std::span<Index>, with "steps" and "updates". Before the first update it
  /// is all zero; the matrix of a parameter that was never trained is empty, 0 x 0, which stands for
  /// zeros. An f(name, matrix, shape) also gets the StateShape that the matrix has when it is not
  /// empty. Throws std::invalid_argument if the module is not that of the first update.
  template <class Module, class F>
  void for_each_state(const Module& module, F&& f) {
    detail::match_states(module, "Adam", first_moment_, second_moment_, updates_);
    first_moment_.for_each(module, "first_moment", f);
    second_moment_.for_each(module, "second_moment", f);
    updates_.for_each(f);
  }

 private:
  using Packet = detail::Packet<Scalar>;

  /// The factors of one update. 1 - β^t is a small difference at first, so it is computed in
  /// double.
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
          first_correction(correction(config.beta1, t)) {}

    Constants at_rate(double learning_rate, double weight_decay) const {
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
  };

  /// One pass, since three over a block would read it from L2 twice more.
  static void update_block(const Constants& k, Index count, Scalar* w, const Scalar* g, Scalar* m,
                           Scalar* v) {
    using namespace Eigen::internal;
    const auto move = [&k](Packet& pw, const Packet& pg, Packet& pm, Packet& pv) {
      pm = pmadd(k.beta1, pm, pmul(k.one_minus_beta1, pg));
      pv = pmadd(k.beta2, pv, pmul(k.one_minus_beta2, pmul(pg, pg)));
      const Packet root = pmadd(detail::sqrt<Scalar>(pv), k.root_scale, k.epsilon);
      pw = psub(pmul(k.decay, pw), pdiv(pmul(k.step, pm), root));
    };
    constexpr Index size = detail::packet_size<Scalar>;
    Index i = 0;
    for (; i + size <= count; i += size) {
      Packet pw = detail::load(w + i);
      Packet pm = detail::load(m + i);
      Packet pv = detail::load(v + i);
      move(pw, detail::load(g + i), pm, pv);
      detail::store(w + i, pw);
      detail::store(m + i, pm);
      detail::store(v + i, pv);
    }
    if (const Index rest = count - i; rest > 0) {
      Packet pw = detail::load_first(w + i, rest);
      Packet pm = detail::load_first(m + i, rest);
      Packet pv = detail::load_first(v + i, rest);
      move(pw, detail::load_first(g + i, rest), pm, pv);
      detail::store_first(w + i, rest, pw);
      detail::store_first(m + i, rest, pm);
      detail::store_first(v + i, rest, pv);
    }
  }

  Config config_;
  detail::ResolvedGroups groups_;
  detail::ParameterState<Scalar> first_moment_;
  detail::ParameterState<Scalar> second_moment_;
  detail::UpdateCounts updates_;
};

}  // namespace moe
