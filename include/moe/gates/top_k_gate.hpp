#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "moe/gates/gate.hpp"
#include "moe/routing/capacity.hpp"
#include "moe/routing/choice_weights.hpp"
#include "moe/routing/input_jitter.hpp"
#include "moe/routing/linear_scores.hpp"
#include "moe/routing/random_second.hpp"
#include "moe/routing/router_scores.hpp"
#include "moe/routing/router_z_loss.hpp"
#include "moe/routing/selection_bias.hpp"
#include "moe/routing/top_k_config.hpp"

/// \file
/// The gate of most published models: the K largest scores, without learned noise, with the options by
/// which Switch Transformer, GShard, Mixtral, OLMoE, Qwen and DeepSeek differ. docs/gates.md lists
/// the options of each model.
///
/// [W24] L. Wang, H. Gao, C. Zhao, X. Sun, D. Dai, "Auxiliary-Loss-Free Load Balancing Strategy for
/// Mixture-of-Experts", 2024 (arXiv 2408.15664).
/// [F22] and [G21] are cited in capacity.hpp, [D2] and [D3] in group_limit.hpp, [Z22] in
/// router_z_loss.hpp.

namespace moe {

/// The K largest scores of a token.
///
///     c = (x ⊙ j)·W_g + b_g              logits, j the jitter of training          T x E
///     s = softmax(c), c, sigmoid(c), or sqrt(softplus(c))   by Config.score        T x E
///     top = the K largest of s + b in the chosen groups; ties go to the lower expert
///     w = s, s / (N + ε) if renormalised, or the softmax of c over top
///     G = scale·w                        the weights of the slots
///     loss = switch_loss_weight·E·Σ_i f_i·P_i + sequence_loss_weight·(its mean over sequences) + z_loss_weight·z
///
/// N is the p-norm of s over top, Σ_top s by default, p being Config.renormalise_norm.
/// P is softmax(c), or s / Σ_i s_i [D3 eq. 19] for sigmoids and roots; f and P are those of
/// switch_loss.hpp, f counting dropped choices too; z is the mean over tokens of (log Σ_i e^c_i)²
/// [Z22 eq. 5]. backward() is the exact derivative at fixed choice, drops, jitter and f. With K = 1
/// the gradient reaches W_g through the weight s, but a renormalised weight is the constant 1.
///
/// A dropped choice has no slot. By default drops do not change the weights of the other choices.
/// With Config.renormalise_after_drops weights are renormalised once, over the choices that are left;
/// before that, drops and the random second choice are decided by s, or by the softmax over top for
/// softmax_of_chosen.
///
/// With Config.drawn_second the second of top is drawn in training: it is expert i with the probability
/// softmax(c)_i among the experts other than the first, in the chosen groups. Weights and losses are those of
/// the experts that were drawn.
///
/// The selection bias b [W24; D3] is added to the scores for the choice of experts and groups, not for
/// the weights. Only update_selection_bias() changes it: it is a Parameter that is not trained, so
/// it is saved in checkpoints, as "selection_bias", and optimizers leave it alone. Initially it is
/// zero. W_g is normal initially, since zeros would tie all experts. b_g is another bias, that of
/// the logits: it changes the weights too and is trained like W_g. It exists with Config.bias and
/// is zero initially.
///
/// tape.balance.load is the number of tokens that chose each expert, tokens_per_expert the number that
/// it got. With a capacity a token's slots depend on the other tokens of its batch. NaN in a token's
/// x makes its weights and the losses NaN. It does not change the outputs of other tokens, except that
/// with a capacity it may take another token's place.
///
/// It has the functions forward(), evaluate() and backward() of the concept Gate.
template <class Scalar_ = float>
class TopKGate : public detail::GateBase<TopKGate<Scalar_>, Scalar_> {
  using Base = detail::GateBase<TopKGate<Scalar_>, Scalar_>;
  friend Base;

 public:
  using Scalar = typename Base::Scalar;            ///< float or double
  static constexpr const char* name = "TopKGate";  ///< in messages and files
  /// See TopKConfig.
  using Config = TopKConfig;

  /// The weights of the gate's losses, see Config; each finite and at least 0.
  struct LossWeights {
    double switch_loss = 0;  ///< Config.switch_loss_weight
    double sequence = 0;     ///< Config.sequence_loss_weight
    double z = 0;            ///< Config.z_loss_weight
  };

  /// The scores, choices and what else backward needs, of the N valid tokens.
  struct Tape : GateTape<Scalar> {
    LossWeights loss_weights;                  ///< of the pass, 0 where a loss was left out
    Matrix<Scalar> jitter;                     ///< j, N x D
    Matrix<Scalar> jittered;                   ///< x ⊙ j, N x D
    Matrix<Scalar> djittered;                  ///< N x D
    detail::RouterScores<Scalar> router;       ///< c and s
    detail::Choices<Scalar> choices;           ///< the chosen experts, with weights w
    detail::SwitchLoss<Scalar> batch_loss;     ///< of switch_loss
    detail::SwitchLoss<Scalar> sequence_loss;  ///< of sequence
    Matrix<Scalar> dlogits;                    ///< N x E

    /// Scratch of a worker.
    struct Scratch {
      std::vector<Scalar> scores;      ///< E
      std::vector<Scalar> groups;      ///< scores of the groups
      std::vector<Index> best_groups;  ///< the groups chosen
    };
    IndexedVector<Scratch> scratch;            ///< one per worker
    detail::CapacityScratch<Scalar> capacity;  ///< scratch for drops
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is that of the initial W_g,
  /// of the jitter and of what is random about the second choice.
  TopKGate(const Config& config, std::uint64_t seed)
      : config_(checked(config)),
        jitter_seed_(derive_seed(seed, 1)),
        second_seed_(derive_seed(seed, 2)),
        draw_seed_(derive_seed(seed, 3)),
        weight_(config.width, config.experts),
        bias_(1, config.bias ? config.experts : 0),
        selection_bias_(1, config.selection_bias ? config.experts : 0) {
    fill_normal(weight_.value, static_cast<Scalar>(config.init_stddev), derive_seed(seed, 0));
    selection_bias_.trained = false;
  }

  /// The configuration as it is now.
  const Config& config() const { return config_; }
  Index experts() const { return config_.experts; }  ///< E
  /// The number of values of Pass::noise for a row of x. With a jitter, D values in [-1, 1), which are
  /// (j − 1) / (Config.jitter·Pass::noise_factor); then, with a drawn second choice, E Gumbel deviates, which are
  /// added to c; then, with a random one, a value in [0, 1): the choice stays if it is below 2·w.
  Index noise_columns() const {
    return draw_column() + (config_.drawn_second ? experts() : 0) + (config_.random_second ? 1 : 0);
  }

  /// The calls of a SharedBatch that a pass makes, for mpi::RankDispatch.
  detail::SharedCalls shared_calls(bool training, Index rows, Index sequences) const {
    sequences = sequences_of(sequences);
    const LossWeights weights = training ? loss_weights() : evaluation_weights(rows, sequences);
    Index figures = 1 + detail::balance_figures(experts());
    if (weights.switch_loss > 0) figures += detail::SwitchLoss<Scalar>::figures(experts(), 1);
    if (weights.sequence > 0) {
      figures += detail::SwitchLoss<Scalar>::figures(experts(), sequences);
    }
    const Limit limit = training ? training_limit() : evaluation_limit();
    const detail::SharedCall choice =
        limit.exists()
            ? detail::capacity_call<Scalar>(config_.place_order, config_.top_k, experts(),
                                            limit.capacity > 0 ? sequences : 1)
            : detail::SharedCall{};
    return detail::shared_calls(choice, figures);
  }

  /// Throws std::invalid_argument if there is a loss or a capacity by sequence and the batch's rows are not a
  /// multiple of the number of sequences, or if there is a capacity, processes share the batch, and
  /// Config.place_order is PlaceOrder::best_tokens.
  void check_forward(const MatrixRef<Scalar>& x, const Pass& pass) const {
    check_batch(training_limit(), config_.sequence_loss_weight > 0, x.rows(), pass);
  }
  /// The same with the capacity of evaluation, but for the loss by sequence: evaluate() leaves it out if the
  /// number of rows is not a multiple of the number of sequences.
  void check_evaluate(const MatrixRef<Scalar>& x, const EvaluationPass& pass) const {
    check_batch(evaluation_limit(), false, x.rows(), pass);
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of a gate like this
  /// one, and the parameters have their original shapes.
  void check_tape(const Tape& tape) const {
    using detail::require;
    require(tape.trained, "TopKGate::backward without a forward pass on this tape");
    const Index tokens = tape.tokens.count;
    const Index jittered = config_.jitter > 0 ? tokens : 0;
    require(tape.router.logits.cols() == experts() &&
                static_cast<Index>(tape.choices.expert.size()) == tokens * config_.top_k &&
                tape.jitter.rows() == jittered,
            "TopKGate::backward: the tape is another gate's, of ", tape.router.logits.cols(),
            " experts, ", tape.choices.expert.size(), " choices of ", tokens,
            " tokens and jitter of ", tape.jitter.rows());
    detail::check_shapes(*this, "TopKGate");
  }

  /// Changes the weights of the losses from the next pass on. Throws std::invalid_argument for one
  /// out of range.
  void set_loss_weights(const LossWeights& weights) {
    detail::check_at_least_zero(name, "LossWeights.switch_loss", weights.switch_loss);
    detail::check_at_least_zero(name, "LossWeights.sequence", weights.sequence);
    detail::check_at_least_zero(name, "LossWeights.z", weights.z);
    config_.switch_loss_weight = weights.switch_loss;
    config_.sequence_loss_weight = weights.sequence;
    config_.z_loss_weight = weights.z;
  }

  /// Adds, copies and removes experts, see Gate: fresh columns get new initial values, the
  /// selection bias of fresh experts is 0. Copies of W_g's columns and of b_g's entries get noise
  /// of this standard deviation. The number of groups stays, so an expert's group may change:
  /// groups are runs of consecutive experts. Returns where the parameters come from. Throws
  /// std::invalid_argument, with nothing changed, if Config would be out of range.
  std::vector<ParameterSource> change_experts(const ExpertSources& sources, std::uint64_t seed,
                                              double noise_stddev) {
    Config config = config_;
    config.experts = sources.experts();
    checked(config);
    Matrix<Scalar> start(config.width, config.experts);
    fill_normal(start, static_cast<Scalar>(config.init_stddev), derive_seed(seed, 0));
    detail::change_columns(sources, weight_, start, noise_stddev, derive_seed(seed, 1));
    std::vector<ParameterSource> from{{0, sources.list()}};
    const auto push = [&] { from.push_back({static_cast<Index>(from.size()), sources.list()}); };
    if (config.bias) {
      detail::change_columns(sources, bias_, {}, noise_stddev, derive_seed(seed, 2));
      push();
    }
    if (config.selection_bias) {
      detail::change_columns(sources, selection_bias_);
      push();
    }
    config_ = config;
    return from;
  }

  /// b_i += bias_rate·sign(mean load − load_i) [W24 alg. 1; D3 sec. 2.1.2]. Call it after each update of
  /// the weights with the load of that update's batch: the sum of tape.balance.load (E) over its
  /// passes. Throws std::invalid_argument without a selection bias, or when the load does not have E
  /// entries.
  void update_selection_bias(const Vector<Scalar>& load) {
    detail::require(config_.selection_bias,
                    "TopKGate::update_selection_bias without Config.selection_bias");
    detail::require(load.size() == experts(), "TopKGate::update_selection_bias: load has ",
                    load.size(), " entries for ", experts(), " experts");
    detail::move_selection_bias(load, static_cast<Scalar>(config_.bias_rate),
                                selection_bias_.value);
  }
  /// The same with the load of one training pass; throws std::invalid_argument also if the last
  /// pass on the tape was no forward().
  void update_selection_bias(const Tape& tape) {
    detail::require(tape.trained,
                    "TopKGate::update_selection_bias without a forward pass on this tape");
    update_selection_bias(tape.balance.load);
  }

  /// "weight" (W_g, D x E), and if configured "bias" (b_g, 1 x E) and "selection_bias" (b, 1 x E).
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight_);
    if (self.config_.bias) visit("bias", self.bias_);
    if (self.config_.selection_bias) visit("selection_bias", self.selection_bias_);
  }

 private:
  static const Config& checked(const Config& config) {
    detail::checked(config);
    const auto scale = static_cast<Scalar>(config.scale);
    detail::require(std::isfinite(scale) && scale > 0, "TopKGate::Config.scale = ", config.scale,
                    ", must be finite and above 0 as a Scalar");
    return config;
  }

  LossWeights loss_weights() const {
    return {config_.switch_loss_weight, config_.sequence_loss_weight, config_.z_loss_weight};
  }

  /// The number of sequences in a batch, given Pass::sequences.
  Index sequences_of(Index of_pass) const { return of_pass > 0 ? of_pass : config_.sequences; }

  /// The weights for evaluate() on a batch of these numbers of rows and sequences.
  LossWeights evaluation_weights(Index rows, Index sequences) const {
    LossWeights weights = loss_weights();
    if (rows % sequences != 0) weights.sequence = 0;
    return weights;
  }

  /// The places of an expert: a capacity in each sequence, or one by a factor in the batch.
  struct Limit {
    Index capacity = 0;
    double factor = 0;
    bool exists() const { return capacity > 0 || factor > 0; }
  };
  Limit training_limit() const { return {config_.capacity, config_.capacity_factor}; }
  Limit evaluation_limit() const {
    return {config_.evaluation_capacity, config_.evaluation_capacity_factor};
  }

  template <class AnyPass>
  void check_batch(const Limit& limit, bool has_sequence_loss, Index rows,
                   const AnyPass& pass) const {
    const SharedBatch* batch = pass.batch;
    if (limit.exists() && batch != nullptr) detail::check_shared_order(config_.place_order);
    if (limit.capacity == 0 && !has_sequence_loss) return;
    if (batch != nullptr) rows = batch->rows();
    const Index sequences = sequences_of(pass.sequences);
    detail::require(rows % sequences == 0, "TopKGate: the batch has ", rows,
                    " rows, not a multiple of ", pass.sequences > 0 ? "Pass" : "Config",
                    ".sequences = ", sequences);
  }

  /// The first column of Pass::noise with deviates for the drawn second choice.
  Index draw_column() const { return config_.jitter > 0 ? config_.width : 0; }

  void route(const MatrixRef<Scalar>& x, const Pass& pass, Tape& tape) const {
    const detail::NoiseSource noise = detail::noise_source(pass, noise_columns());
    if (config_.jitter > 0) {
      detail::jitter_input(config_.jitter * pass.noise_factor, jitter_seed_, noise, tape.tokens, x,
                           tape.jitter, tape.jittered);
      linear_scores(tape.jittered, weight_, bias_, tape.router.logits);
    } else {
      detail::resize(tape.jitter, 0, 0);
      linear_scores(tape.tokens.rows_of(x), weight_, bias_, tape.router.logits);
    }
    choose(config_.drawn_second ? &noise : nullptr, tape);
    if (config_.random_second) {
      detail::drop_second_choices(second_seed_, noise, tape.tokens, tape.choices);
    }
    const Index sequences = sequences_of(pass.sequences);
    make_routing(training_limit(), sequences, pass.batch, tape);
    measure_losses(loss_weights(), sequences, pass.batch, tape);
  }

  /// With the capacity of evaluation; the loss by sequence is left out where the number of
  /// rows is not a multiple of the number of sequences.
  void route(const MatrixRef<Scalar>& x, const EvaluationPass& pass, Tape& tape) const {
    linear_scores(tape.tokens.rows_of(x), weight_, bias_, tape.router.logits);
    choose(nullptr, tape);
    const Index sequences = sequences_of(pass.sequences);
    make_routing(evaluation_limit(), sequences, pass.batch, tape);
    measure_losses(evaluation_weights(tape.tokens.batch_rows, sequences), sequences, pass.batch,
                   tape);
  }

  void route_backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                      Matrix<Scalar>& dx) {
    const detail::ChoiceWeights<Scalar> weights(config_);
    const bool of_logits = config_.score == Score::softmax_of_chosen;
    detail::resize_to_zero(tape.dlogits, tape.tokens.count, experts());
    switch_losses_backward(tape);
    if (!of_logits) weights.backward(dweight, tape.router, tape.choices, tape.dlogits);
    detail::score_logits_backward(config_.score, tape.router, tape.dlogits);
    if (of_logits) weights.backward(dweight, tape.router, tape.choices, tape.dlogits);
    if (tape.loss_weights.z * tape.loss_scale > 0) {
      detail::router_z_loss_backward(tape.loss_weights.z * tape.loss_scale, tape.tokens.batch_count,
                                     tape.router.logits, tape.router.log_sum, tape.dlogits);
    }
    const ScatteredRows<Scalar> dx_rows = tape.tokens.rows_of(dx);
    if (config_.jitter > 0) {
      detail::resize_to_zero(tape.djittered, tape.tokens.count, config_.width);
      linear_scores_backward(tape.jittered, tape.dlogits, weight_, bias_, tape.djittered);
      detail::jitter_input_backward(tape.jitter, tape.djittered, dx_rows);
    } else {
      linear_scores_backward(tape.tokens.rows_of(x), tape.dlogits, weight_, bias_, dx_rows);
    }
  }

  // The choice of experts, and their weights.

  /// Given noise, the second choices are drawn.
  void choose(const detail::NoiseSource* noise, Tape& tape) const {
    const Index tokens = tape.router.logits.rows();
    detail::score_logits(config_.score, config_.z_loss_weight > 0, tape.router);
    tape.choices.resize(tokens, config_.top_k);
    if (static_cast<Index>(tape.scratch.size()) < worker_count()) {
      detail::resize(tape.scratch, worker_count());
    }
    for (auto& scratch : tape.scratch) {
      detail::resize(scratch.scores, experts());
      detail::resize(scratch.groups, config_.groups);
      detail::resize(scratch.best_groups, config_.top_k_groups);
    }
    const detail::ChoiceWeights<Scalar> weights(config_);
    constexpr Index block = detail::router_block;
    const Work work = noise != nullptr ? function_work(tape.router.scores.size())
                                       : element_work(2 * tape.router.scores.size());
    parallel_for((tokens + block - 1) / block, work, [&](Index task, Index worker) {
      auto& scratch = tape.scratch[worker];
      for (Index t = task * block; t < std::min(tokens, (task + 1) * block); ++t) {
        const Scalar* scores = choice_scores(tape, t, scratch);
        Index* chosen = &tape.choices.expert[t * config_.top_k];
        select_largest(scores, experts(), config_.top_k, chosen);
        if (noise != nullptr) {
          detail::draw_second_choice(draw_seed_, *noise, tape.tokens.row_of(t), draw_column(),
                                     experts(), detail::row_data(tape.router.logits, t), scores,
                                     chosen);
        }
        weights.forward(tape.router, t, tape.choices);
      }
    });
  }

  /// s + b of the experts in the chosen groups, -infinity of the others.
  const Scalar* choice_scores(const Tape& tape, Index t, typename Tape::Scratch& scratch) const {
    const Scalar* scores = detail::row_data(
        config_.score == Score::softmax_of_chosen ? tape.router.logits : tape.router.scores, t);
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

  // The choices that become slots.

  void make_routing(const Limit& limit, Index sequences, const SharedBatch* batch,
                    Tape& tape) const {
    if (limit.exists()) {
      const bool by_sequence = limit.capacity > 0;
      const Index capacity = by_sequence
                                 ? limit.capacity
                                 : detail::expert_capacity(limit.factor, tape.tokens.batch_count,
                                                           config_.top_k, experts());
      const detail::PlaceSequences places{by_sequence ? sequences : 1, config_.row_order,
                                          &tape.tokens};
      detail::drop_over_capacity(config_.place_order, capacity, experts(), places, batch,
                                 tape.choices, tape.capacity);
    }
    detail::ChoiceWeights<Scalar>(config_).renormalise(tape.router, tape.choices);
    detail::make_slots(tape.choices, static_cast<Scalar>(config_.scale), experts(), tape.routing);
    detail::insert_padding(tape.tokens, tape.routing);
  }

  // The losses and the balance.

  void measure_losses(const LossWeights& weights, Index sequences, const SharedBatch* batch,
                      Tape& tape) const {
    Balance<Scalar>& balance = tape.balance;
    detail::BatchSum sum(batch);
    const auto accumulate = [&](detail::SwitchLoss<Scalar>& loss, Index parts) {
      loss.accumulate(tape.router.scores, tape.router.probability_scale, tape.choices.expert,
                      config_.top_k, config_.switch_count, parts, config_.row_order, tape.tokens,
                      sum);
    };
    if (weights.switch_loss > 0) accumulate(tape.batch_loss, 1);
    if (weights.sequence > 0) accumulate(tape.sequence_loss, sequences);
    double squares = weights.z > 0 ? detail::router_z_loss_sum(tape.router.log_sum) : 0;
    sum.add(&squares, 1);
    detail::measure_balance(tape.routing, tape.choices.expert, sum, balance);

    tape.loss_weights = weights;
    balance.losses = {};
    const auto scaled = [&](double weight) {
      return static_cast<Scalar>(weight * tape.loss_scale);
    };
    if (weights.switch_loss > 0) {
      balance.losses.switch_loss = scaled(weights.switch_loss) * tape.batch_loss.finish();
    }
    if (weights.sequence > 0) {
      balance.losses.sequence = scaled(weights.sequence) * tape.sequence_loss.finish();
    }
    if (weights.z > 0 && tape.tokens.batch_count > 0) {
      const double mean = squares / static_cast<double>(tape.tokens.batch_count);
      balance.losses.z = scaled(weights.z) * static_cast<Scalar>(mean);
    }
    balance.loss = balance.losses.switch_loss + balance.losses.sequence + balance.losses.z;
  }

  /// Adds ∂L/∂s of the losses by batch and by sequence to tape.dlogits.
  void switch_losses_backward(Tape& tape) const {
    const auto batch = static_cast<Scalar>(tape.loss_weights.switch_loss * tape.loss_scale);
    const auto sequence = static_cast<Scalar>(tape.loss_weights.sequence * tape.loss_scale);
    if (batch == Scalar{0} && sequence == Scalar{0}) return;
    const Work work = element_work(2 * tape.router.scores.size());
    parallel_for_blocks(tape.tokens.count, detail::router_block, work,
                        [&](Index first, Index count) {
                          for (Index t = first; t < first + count; ++t) {
                            Scalar* d = detail::row_data(tape.dlogits, t);
                            if (batch > Scalar{0}) tape.batch_loss.add_gradient(batch, t, d);
                            if (sequence > Scalar{0})
                              tape.sequence_loss.add_gradient(sequence, t, d);
                            detail::probability_backward(config_.score, tape.router, t, d);
                          }
                        });
  }

  Config config_;
  std::uint64_t jitter_seed_;
  std::uint64_t second_seed_;
  std::uint64_t draw_seed_;
  Parameter<Scalar> weight_;          ///< W_g, D x E
  Parameter<Scalar> bias_;            ///< b_g, 1 x E; empty without one
  Parameter<Scalar> selection_bias_;  ///< b, 1 x E; empty without one
};

}  // namespace moe
