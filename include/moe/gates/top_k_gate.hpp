#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "moe/gates/gate.hpp"
#include "moe/routing/input_jitter.hpp"
#include "moe/routing/linear_scores.hpp"
#include "moe/routing/router_z_loss.hpp"
#include "moe/gates/top_k_config.hpp"

/// \file
/// The gate of today's models: the K largest scores, without noise of its own, with the options by
/// which Switch Transformer, GShard, Mixtral, OLMoE, Qwen and DeepSeek differ. docs/gates.md says
/// which options make which model.
///
/// [W24] L. Wang, H. Gao, C. Zhao, X. Sun, D. Dai, "Auxiliary-Loss-Free Load Balancing Strategy for
/// Mixture-of-Experts", 2024 (arXiv 2408.15664).
/// [F22] and [G21] are cited in capacity.hpp, [D2] and [D3] in group_limit.hpp, [Z22] in
/// router_z_loss.hpp.

namespace moe {

/// The K largest scores of a token.
///
///     c = (x ⊙ j)·W_g                    logits, j the jitter of training          T x E
///     s = softmax(c), c, or sigmoid(c)   by Config.score                           T x E
///     top = the K largest of s + b in the active groups; ties go to the lower expert
///     w = s, s / (Σ_top s + ε) if renormalised, or the softmax of c over top
///     G = scale·w                        the weights of the slots
///     loss = switch_loss_weight·E·Σ_i f_i·P_i + sequence_loss_weight·(its mean over sequences) + z_loss_weight·z
///
/// P is softmax(c), or s / Σ_i s_i [D3 eq. 19] for sigmoids; f counts all choices as they were
/// made, those dropped afterwards included; z is the mean over tokens of (log Σ_i e^c_i)² [Z22 eq.
/// 5]. backward() is the exact derivative at fixed choice, drops, jitter and f. With K = 1 a
/// softmax over all experts learns from its weight, while renormalised weights are the constant 1.
/// A dropped choice has no slot, and the weights that are left are not renormalised.
///
/// The selection bias b [W24; D3] takes part in the choice, that of groups too, and in no weight.
/// It is moved by update_selection_bias() alone: it is a Parameter that is not trained, so
/// checkpoints have it, as "selection_bias", and optimizers pass it by. It starts at zero, and W_g
/// with normal deviates, since zeros would tie all experts.
///
/// tape.balance.load is how many tokens chose each expert, tokens_per_expert how many it got. With
/// a capacity a token's slots depend on the other tokens of its batch. NaN in a token's x makes its
/// weights NaN, and the losses; it spoils no other token, but where there is a capacity it may take
/// another's place.
template <class Scalar_ = float>
class TopKGate {
 public:
  using Scalar = Scalar_;
  using Config = TopKConfig;

  struct Tape : GateTape<Scalar> {
    Matrix<Scalar> jitter;             ///< j, T x D
    Matrix<Scalar> jittered;           ///< x ⊙ j, T x D
    Matrix<Scalar> djittered;          ///< T x D
    Matrix<Scalar> logits;             ///< c, T x E
    Matrix<Scalar> scores;             ///< softmax(c) or sigmoid(c), T x E
    Vector<Scalar> probability_scale;  ///< T, by which scores are multiplied to be P
    Vector<Scalar> log_sum;            ///< T, log Σ_i e^c_i

    detail::Choices<Scalar> choices;  ///< with w for weights
    detail::SwitchLoss<Scalar> batch_loss;
    detail::SwitchLoss<Scalar> sequence_loss;
    Matrix<Scalar> dlogits;  ///< T x E

    struct Scratch {
      std::vector<Scalar> scores;  ///< E
      std::vector<Scalar> groups;
      std::vector<Index> best_groups;
    };
    std::vector<Scratch> scratch;  ///< one a worker
    detail::CapacityScratch<Scalar> capacity;
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is of W_g's start, the
  /// jitter and the random dispatch.
  TopKGate(const Config& config, std::uint64_t seed)
      : config_(checked(config)),
        jitter_seed_(derive_seed(seed, 1)),
        second_seed_(derive_seed(seed, 2)),
        weight_(config.width, config.experts),
        selection_bias_(1, config.selection_bias ? config.experts : 0) {
    fill_normal(weight_.value, static_cast<Scalar>(config.init_stddev), derive_seed(seed, 0));
    selection_bias_.trained = false;
  }

  const Config& config() const { return config_; }
  Index experts() const { return config_.experts; }

  /// Training pass over x (T x D). Give every update its own key.step: the same key draws the same
  /// jitter and second choices. Throws std::invalid_argument when x is not D wide, or T is not a
  /// multiple of Config.sequences while sequences have a loss. O(T·D·E).
  const Routing<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape,
                                 const NoiseKey& key) const {
    detail::check_gate_input(*this, "TopKGate", x);
    const Index tokens = detail::batch_tokens(tape.batch, x.rows());
    detail::require(config_.sequence_loss_weight == 0 || tokens % config_.sequences == 0,
                    "TopKGate: x has ", tokens,
                    " rows, not a multiple of Config.sequences = ", config_.sequences);
    tape.trained = false;
    if (config_.jitter > 0) {
      detail::jitter_input(config_.jitter, jitter_seed_, key, x, tape.jitter, tape.jittered);
      compute_scores(tape.jittered, tape);
    } else {
      detail::resize(tape.jitter, 0, 0);
      compute_scores(x, tape);
    }
    choose(tape);
    if (config_.random_second) drop_second_choices(tape, key);
    fill_routing(tape, config_.capacity_factor);
    compute_losses(tape, config_.sequence_loss_weight > 0);
    tape.trained = true;
    return tape.routing;
  }

  /// Routing without jitter and random dispatch, with the capacity of evaluation, and its balance;
  /// the loss per sequence is left out where T is not a multiple of Config.sequences. Leaves
  /// nothing that backward() could use.
  const Routing<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    detail::check_gate_input(*this, "TopKGate", x);
    tape.trained = false;
    compute_scores(x, tape);
    choose(tape);
    fill_routing(tape, config_.evaluation_capacity_factor);
    const Index tokens = detail::batch_tokens(tape.batch, x.rows());
    compute_losses(tape, config_.sequence_loss_weight > 0 && tokens % config_.sequences == 0);
    return tape.routing;
  }
  Routing<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    return evaluate(x, tape);
  }

  /// Takes the x of forward() and dweight, the gradient of the loss with respect to the weight of
  /// each slot (S), and adds the losses' share once. Adds to the gradient of W_g, and to dx (T x D).
  /// Throws std::invalid_argument when an argument does not belong to the tape.
  void backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                Matrix<Scalar>& dx) {
    check_tape(tape);
    detail::check_gate_backward("TopKGate::backward", config_.width, x, dweight, tape, dx);
    detail::resize_to_zero(tape.dlogits, x.rows(), experts());
    compute_losses_backward(tape);
    if (config_.score != Score::softmax_of_chosen) weigh_backward(dweight, tape);
    compute_scores_backward(tape);
    if (config_.score == Score::softmax_of_chosen) weigh_backward(dweight, tape);
    if (config_.z_loss_weight > 0) {
      detail::router_z_loss_backward(config_.z_loss_weight, tape.logits, tape.log_sum, tape.dlogits,
                                     tape.batch);
    }
    if (config_.jitter > 0) {
      detail::resize_to_zero(tape.djittered, x.rows(), config_.width);
      detail::linear_scores_backward<Scalar>(tape.jittered, tape.dlogits, weight_, tape.djittered);
      detail::jitter_input_backward(tape.jitter, tape.djittered, dx);
    } else {
      detail::linear_scores_backward(x, tape.dlogits, weight_, dx);
    }
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of such a gate, and
  /// its parameters have the shapes that it made.
  void check_tape(const Tape& tape) const {
    using detail::require;
    require(tape.trained, "TopKGate::backward without a forward pass on this tape");
    const Index tokens = tape.routing.tokens();
    const Index jittered = config_.jitter > 0 ? tokens : 0;
    require(tape.logits.cols() == experts() &&
                static_cast<Index>(tape.choices.expert.size()) == tokens * config_.top_k &&
                tape.jitter.rows() == jittered &&
                has_loss(config_.switch_loss_weight, tape.batch_loss, 1) &&
                has_loss(config_.sequence_loss_weight, tape.sequence_loss, config_.sequences),
            "TopKGate::backward: the tape is another gate's, of ", tape.logits.cols(),
            " experts, ", tape.choices.expert.size(), " choices of ", tokens,
            " tokens and jitter of ", tape.jitter.rows());
    detail::check_shapes(*this, "TopKGate");
  }

  /// b_i += bias_rate·sign(mean load − load_i) [W24 alg. 1; D3 sec. 2.1.2]: after each update of
  /// the weights, by the load of the whole batch of that update; where that came in several passes,
  /// by the sum of their tape.balance.load (E). Throws std::invalid_argument without a selection
  /// bias, or when the load is not of E experts.
  void update_selection_bias(const Vector<Scalar>& load) {
    detail::require(config_.selection_bias,
                    "TopKGate::update_selection_bias without Config.selection_bias");
    detail::require(load.size() == experts(), "TopKGate::update_selection_bias: load has ",
                    load.size(), " entries for ", experts(), " experts");
    double total = 0;
    for (Index i = 0; i < experts(); ++i) total += static_cast<double>(load[i]);
    const auto rate = static_cast<Scalar>(config_.bias_rate);
    for (Index i = 0; i < experts(); ++i) {
      // Counts times E are exact, a mean would be rounded.
      const double scaled = static_cast<double>(load[i]) * static_cast<double>(experts());
      if (scaled < total) selection_bias_.value(0, i) += rate;
      if (scaled > total) selection_bias_.value(0, i) -= rate;
    }
  }
  /// The same by the load of one training pass.
  void update_selection_bias(const Tape& tape) {
    detail::require(tape.trained,
                    "TopKGate::update_selection_bias without a forward pass on this tape");
    update_selection_bias(tape.balance.load);
  }

  /// "weight", and "selection_bias" where there is one.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight_);
    if (self.config_.selection_bias) visit("selection_bias", self.selection_bias_);
  }

 private:
  using P = detail::Packet<Scalar>;
  static constexpr Index block = 64;  ///< tokens in a task

  /// 1 / sum, but 0 for a sum so small that its inverse would be infinite.
  static Scalar inverse(Scalar sum) {
    return sum < std::numeric_limits<Scalar>::min() ? Scalar{0} : Scalar{1} / sum;
  }

  static const Config& checked(const Config& config) {
    detail::checked(config);
    const auto scale = static_cast<Scalar>(config.scale);
    detail::require(std::isfinite(scale) && scale > 0,
                    "TopKGate::Config.scale = ", config.scale,
                    ", must be finite and above 0 as a Scalar");
    return config;
  }

  bool has_loss(double weight, const detail::SwitchLoss<Scalar>& loss, Index sequences) const {
    return weight == 0 || (loss.share().rows() == sequences && loss.share().cols() == experts());
  }

  // c = x·W_g; s and what goes with it.

  void compute_scores(const MatrixRef<Scalar>& x, Tape& tape) const {
    detail::linear_scores(x, weight_, tape.logits);
    detail::resize(tape.scores, x.rows(), experts());
    detail::resize(tape.probability_scale, x.rows());
    detail::resize(tape.log_sum, x.rows());
    parallel_for_blocks(
        x.rows(), block, function_work(tape.scores.size()), [&](Index first, Index count) {
          for (Index t = first; t < first + count; ++t) {
            const Scalar* c = detail::row_data(tape.logits, t);
            Scalar* s = detail::row_data(tape.scores, t);
            if (config_.score == Score::sigmoid) {
              tape.log_sum[t] = config_.z_loss_weight > 0
                                    ? log_sum(detail::softmax_row<Scalar>(experts(), c, nullptr))
                                    : Scalar{0};
              detail::map(
                  experts(), s, [](const P& v) { return detail::sigmoid<Scalar>(v); }, c);
              tape.probability_scale[t] = inverse(detail::sum(experts(), s));
            } else {
              const auto softmax = detail::softmax_row(experts(), c, s);
              tape.log_sum[t] = log_sum(softmax);
              const P total = detail::broadcast(static_cast<Scalar>(softmax.sum));
              detail::map(
                  experts(), s, [&](const P& e) { return Eigen::internal::pdiv(e, total); }, s);
              tape.probability_scale[t] = Scalar{1};
            }
          }
        });
  }

  static Scalar log_sum(const detail::SoftmaxRow<Scalar>& softmax) {
    return softmax.shift + static_cast<Scalar>(std::log(softmax.sum));
  }

  /// Turns tape.dlogits from ∂L/∂s into ∂L/∂c.
  void compute_scores_backward(Tape& tape) const {
    if (config_.score != Score::sigmoid) {
      detail::softmax_rows_backward(tape.scores, tape.dlogits);
      return;
    }
    parallel_for_blocks(
        tape.scores.rows(), block, element_work(tape.scores.size()), [&](Index first, Index count) {
          using namespace Eigen::internal;
          const P one = detail::broadcast(Scalar{1});
          for (Index t = first; t < first + count; ++t) {
            Scalar* d = detail::row_data(tape.dlogits, t);
            detail::map(
                experts(), d,
                [&](const P& g, const P& s) { return pmul(g, pmul(s, psub(one, s))); }, d,
                detail::row_data(tape.scores, t));
          }
        });
  }

  // The choice, and the weights of the chosen.

  void choose(Tape& tape) const {
    const Index tokens = tape.logits.rows();
    const Index top_k = config_.top_k;
    tape.choices.resize(tokens, top_k);
    if (static_cast<Index>(tape.scratch.size()) < worker_count()) {
      detail::resize(tape.scratch, worker_count());
    }
    for (auto& scratch : tape.scratch) {
      detail::resize(scratch.scores, experts());
      detail::resize(scratch.groups, config_.groups);
      detail::resize(scratch.best_groups, config_.top_k_groups);
    }
    parallel_for((tokens + block - 1) / block, element_work(2 * tape.scores.size()),
                 [&](Index task, Index worker) {
                   auto& scratch = tape.scratch[detail::to_size(worker)];
                   for (Index t = task * block; t < std::min(tokens, (task + 1) * block); ++t) {
                     detail::select_largest(choice_scores(tape, t, scratch), experts(), top_k,
                                            &tape.choices.expert[detail::to_size(t * top_k)]);
                     weigh(tape, t);
                   }
                 });
  }

  /// s + b of the experts in the active groups, -infinity of the others.
  const Scalar* choice_scores(const Tape& tape, Index t, typename Tape::Scratch& scratch) const {
    const Scalar* scores =
        detail::row_data(config_.score == Score::softmax_of_chosen ? tape.logits : tape.scores, t);
    if (!config_.selection_bias && config_.top_k_groups == config_.groups) return scores;
    std::copy_n(scores, experts(), scratch.scores.data());
    if (config_.selection_bias) {
      detail::add_scaled(experts(), Scalar{1}, selection_bias_.value.data(), scratch.scores.data());
    }
    if (config_.top_k_groups < config_.groups) {
      detail::limit_to_groups(config_.group_score, experts(), config_.groups, config_.top_k_groups,
                              scratch.scores.data(), scratch.groups.data(),
                              scratch.best_groups.data());
    }
    return scratch.scores.data();
  }

  void weigh(Tape& tape, Index t) const {
    const Index* chosen = &tape.choices.expert[detail::to_size(t * config_.top_k)];
    Scalar* w = &tape.choices.weight[detail::to_size(t * config_.top_k)];
    if (config_.score == Score::softmax_of_chosen) {
      const Scalar* c = detail::row_data(tape.logits, t);
      Scalar shift = c[chosen[0]];
      for (Index k = 1; k < config_.top_k; ++k) shift = std::max(shift, c[chosen[k]]);
      for (Index k = 0; k < config_.top_k; ++k) w[k] = std::exp(c[chosen[k]] - shift);
    } else {
      for (Index k = 0; k < config_.top_k; ++k) w[k] = tape.scores(t, chosen[k]);
    }
    if (!adds_up_to_one()) return;
    const Scalar total = std::accumulate(w, w + config_.top_k, epsilon());
    if (total == Scalar{0}) return;  // all sigmoids are 0 to the last bit
    for (Index k = 0; k < config_.top_k; ++k) w[k] /= total;
  }

  /// Adds to tape.dlogits what comes through the weights: ∂L/∂s of the chosen, or ∂L/∂c where the
  /// weights are a softmax of the chosen. With g the gradient by w, 0 where dropped, and
  /// S = Σ s + ε: ds = g; renormalised, ds = (g − Σ g·w) / S; and dc = w·(g − Σ g·w).
  void weigh_backward(std::span<const Scalar> dweight, Tape& tape) const {
    const auto scale = static_cast<Scalar>(config_.scale);
    const Index top_k = config_.top_k;
    parallel_for_blocks(
        tape.scores.rows(), block, function_work(tape.choices.size()),
        [&](Index first, Index count) {
          for (Index t = first; t < first + count; ++t) {
            const auto choice = [&](Index k) { return detail::to_size(t * top_k + k); };
            const auto g = [&](Index k) {
              return tape.choices.keeps[choice(k)] == 0
                         ? Scalar{0}
                         : scale * dweight[detail::to_size(tape.choices.slot[choice(k)])];
            };
            Scalar mean{0};
            Scalar total = epsilon();
            if (adds_up_to_one()) {
              for (Index k = 0; k < top_k; ++k) {
                mean += g(k) * tape.choices.weight[choice(k)];
                total += tape.scores(t, tape.choices.expert[choice(k)]);
              }
            }
            for (Index k = 0; k < top_k; ++k) {
              const Scalar factor = config_.score == Score::softmax_of_chosen
                                        ? tape.choices.weight[choice(k)]
                                    : adds_up_to_one() ? inverse(total)
                                                       : Scalar{1};
              tape.dlogits(t, tape.choices.expert[choice(k)]) += factor * (g(k) - mean);
            }
          }
        });
  }

  /// ε. A softmax of the chosen has a term of 1 in its sum.
  Scalar epsilon() const {
    return config_.score == Score::softmax_of_chosen
               ? Scalar{0}
               : static_cast<Scalar>(config_.renormalise_epsilon);
  }
  bool adds_up_to_one() const {
    return config_.renormalise || config_.score == Score::softmax_of_chosen;
  }

  // The choices that become slots.

  /// Keeps a token's second choice with probability 2·w: an expert of little weight would take a
  /// place from others.
  void drop_second_choices(Tape& tape, const NoiseKey& key) const {
    for (Index t = 0; t < tape.logits.rows(); ++t) {
      const auto second = detail::to_size(2 * t + 1);
      const auto draw =
          static_cast<Scalar>(uniform(detail::noise_words(second_seed_, key, t, 0)[0]));
      if (!(draw < Scalar{2} * tape.choices.weight[second])) tape.choices.keeps[second] = 0;
    }
  }

  void fill_routing(Tape& tape, double capacity_factor) const {
    if (capacity_factor > 0) {
      const Index tokens = detail::batch_tokens(tape.batch, tape.logits.rows());
      const Index capacity =
          detail::expert_capacity(capacity_factor, tokens, config_.top_k, experts());
      detail::drop_over_capacity(config_.place_order, capacity, experts(), tape.batch, tape.choices,
                                 tape.capacity);
    }
    detail::make_slots(tape.choices, static_cast<Scalar>(config_.scale), experts(), tape.routing);
  }

  // The losses, and the figures to watch.

  void compute_losses(Tape& tape, bool by_sequence) const {
    Balance<Scalar>& balance = tape.balance;
    detail::measure_importance(tape.routing, tape.batch, balance);
    detail::count_load(std::span<const Index>(tape.choices.expert), experts(), balance.counts,
                       balance.load);
    detail::sum_over_batch(tape.batch, experts(), balance.load.data());
    balance.loss = Scalar{0};
    const auto measure = [&](detail::SwitchLoss<Scalar>& loss, double weight, Index sequences) {
      balance.loss += static_cast<Scalar>(weight) *
                      loss.measure(tape.scores, tape.probability_scale,
                                   std::span<const Index>(tape.choices.expert),
                                   config_.switch_count, sequences, config_.row_order, tape.batch);
    };
    if (config_.switch_loss_weight > 0) measure(tape.batch_loss, config_.switch_loss_weight, 1);
    if (by_sequence) measure(tape.sequence_loss, config_.sequence_loss_weight, config_.sequences);
    if (config_.z_loss_weight > 0) {
      balance.loss +=
          static_cast<Scalar>(config_.z_loss_weight) * detail::router_z_loss(tape.log_sum, tape.batch);
    }
  }

  /// Adds ∂L/∂s of the losses by batch and by sequence to tape.dlogits. With P = s / S, S = Σ s:
  /// ds = (dP − Σ dP·P) / S.
  void compute_losses_backward(Tape& tape) const {
    const Index tokens = tape.scores.rows();
    const auto batch = static_cast<Scalar>(config_.switch_loss_weight);
    const auto sequence = static_cast<Scalar>(config_.sequence_loss_weight);
    if (batch == Scalar{0} && sequence == Scalar{0}) return;
    parallel_for_blocks(
        tokens, block, element_work(2 * tape.scores.size()), [&](Index first, Index count) {
          using namespace Eigen::internal;
          for (Index t = first; t < first + count; ++t) {
            Scalar* d = detail::row_data(tape.dlogits, t);
            if (batch > Scalar{0}) tape.batch_loss.add_gradient(batch, t, d);
            if (sequence > Scalar{0}) tape.sequence_loss.add_gradient(sequence, t, d);
            if (config_.score != Score::sigmoid) continue;
            const Scalar scale = tape.probability_scale[t];
            const P factor = detail::broadcast(scale);
            const P mean = detail::broadcast(
                scale * detail::dot(experts(), d, detail::row_data(tape.scores, t)));
            detail::map(
                experts(), d, [&](const P& g) { return pmul(factor, psub(g, mean)); }, d);
          }
        });
  }

  Config config_;
  std::uint64_t jitter_seed_;
  std::uint64_t second_seed_;
  Parameter<Scalar> weight_;          ///< W_g, D x E
  Parameter<Scalar> selection_bias_;  ///< b, 1 x E; empty without one
};

}  // namespace moe
