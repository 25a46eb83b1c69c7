#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "moe/gates/gate.hpp"
#include "moe/kernels/column_sums.hpp"
#include "moe/random.hpp"
#include "moe/routing/choose_tokens.hpp"
#include "moe/routing/linear_scores.hpp"

/// \file
/// The gate of [S17 App. F]: in training every expert gets the same number of tokens.

namespace moe {

/// Strictly balanced gating [S17 App. F, eq. 15-20].
///
///     p = softmax(x·W_g)                 Gσ, over all experts          T x E
///     M = 1 where expert i takes t       the mask                      T x E
///     G_ti = p_ti·M_ti / Σ_j p_tj·M_tj   over the experts that took the token
///
/// Training: each expert takes the m tokens with the largest values in its column of p, ties going to
/// the lower token (eq. 18). m = K·T/E rounded down, but at least 1. So every expert gets exactly m
/// tokens, and a token gets K experts on average: a little fewer if E does not divide K·T (the paper
/// assumes that it does), more only in a batch of fewer than E/K tokens.
///
/// Inference: M_ti = 1 where p_ti > threshold_i (eq. 19). So a token's experts do not depend on its
/// batch, and their number is not bounded. Thresholds are trained by
///
///     L_batchwise = Σ_t Σ_i (Mthreshold_ti − Mbatch_ti)·(p_ti − threshold_i)      (eq. 20)
///
/// which is never negative, and zero where both masks agree. It is continuous, so the derivative at
/// fixed masks is exact almost everywhere. W.r.t. threshold_i it is m minus the number of tokens above
/// the threshold: zero for a threshold between the m-th and the (m+1)-th largest value of the column.
/// W.r.t. p it is Mthreshold − Mbatch, which backward passes on through the softmax to W_g and x, as
/// in the paper's formula: p rises where an expert takes a token that is not above its threshold, and
/// falls where it does not take one that is.
///
/// tape.balance.loss is threshold_weight·L_batchwise in training, a sum over tokens as in the
/// paper, and 0 in evaluation, where there is no batchwise mask. With a training loss that is a mean
/// over tokens the weight should be about 1/T: then masks that disagree for a token cost about as much
/// as the token's own loss. The default is 1/T for a thousand tokens. Thresholds are about 1/E, and
/// their learning rate should be small accordingly.
///
/// A token that no expert takes has no slots, so a layer's y for it is its output activation of 0 (0 by
/// default). With one expert G is the constant 1 and has no gradient. The paper does not give initial
/// weights for this gate. Zeros, as in its noisy gate, would tie all tokens, and every expert would take the first m of a batch. So
/// W_g is uniform in ±1/√D initially, and thresholds are 1/E, the mean of p.
///
/// A token with NaN or infinity in x has NaN in its row of p and in its weights. In training it comes
/// last, and the loss is NaN unless threshold_weight is 0; in evaluation it goes to expert 0.
///
/// It has the functions forward(), evaluate() and backward() of the concept Gate.
template <class Scalar_ = float>
class BalancedGate : public detail::GateBase<BalancedGate<Scalar_>, Scalar_> {
  using Base = detail::GateBase<BalancedGate<Scalar_>, Scalar_>;
  friend Base;

 public:
  using Scalar = typename Base::Scalar;                ///< float or double
  static constexpr const char* name = "BalancedGate";  ///< in messages and files

  /// The configuration; the constructor checks it.
  struct Config {
    Index width = 0;    ///< D; 0 inside a layer's configuration stands for the layer's width
    Index experts = 0;  ///< E
    Index top_k = 0;    ///< K, experts of a token on average, 1 <= K <= E
    double threshold_weight = 1e-3;  ///< of L_batchwise, >= 0

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("experts", self.experts);
      visit("top_k", self.top_k);
      visit("threshold_weight", self.threshold_weight);
    }
  };

  /// The weight of the gate's loss, see Config; finite and at least 0.
  struct LossWeights {
    double threshold = 0;  ///< Config.threshold_weight
  };

  /// What backward needs of the N valid tokens, and scratch.
  struct Tape : GateTape<Scalar> {
    LossWeights loss_weights;            ///< of the pass
    Matrix<Scalar> scores;               ///< x·W_g, N x E
    Matrix<Scalar> p;                    ///< Gσ, N x E
    Matrix<Scalar> difference;           ///< Mthreshold − Mbatch, N x E
    Vector<Scalar> token_loss;           ///< N, the tokens' parts of L_batchwise
    Matrix<Scalar> dscores;              ///< N x E
    detail::TokenChoice<Scalar> choice;  ///< scratch
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is that of the initial W_g.
  BalancedGate(const Config& config, std::uint64_t seed)
      : config_(checked(config)),
        weight_(config.width, config.experts),
        threshold_(1, config.experts) {
    fill_uniform(weight_.value, Scalar{1} / std::sqrt(static_cast<Scalar>(config.width)), seed);
    threshold_.value.setConstant(Scalar{1} / static_cast<Scalar>(config.experts));
  }

  /// The configuration as it is now.
  const Config& config() const { return config_; }
  Index experts() const { return config_.experts; }  ///< E

  /// The calls of a SharedBatch that a pass makes, for mpi::RankDispatch.
  detail::SharedCalls shared_calls(bool training, Index, Index) const {
    const auto choice = detail::SharedSelection<Scalar>::first_call(experts());
    return detail::shared_calls(training ? choice : detail::SharedCall{},
                                1 + detail::balance_figures(experts()));
  }

  /// Changes the weight of the loss from the next pass on. Throws std::invalid_argument for one out of
  /// range.
  void set_loss_weights(const LossWeights& weights) {
    detail::check_at_least_zero(name, "LossWeights.threshold", weights.threshold);
    config_.threshold_weight = weights.threshold;
  }

  /// Adds, copies and removes experts, see Gate: fresh columns and thresholds get new initial
  /// values. The other thresholds stay, though the number of experts in the softmax changes. Copies
  /// of W_g's columns get noise of this standard deviation. Returns where the parameters come from.
  /// Throws std::invalid_argument, with nothing changed, if Config would be out of range.
  std::vector<ParameterSource> change_experts(const ExpertSources& sources, std::uint64_t seed,
                                              double noise_stddev) {
    Config config = config_;
    config.experts = sources.experts();
    checked(config);
    const BalancedGate start(config, derive_seed(seed, 0));
    detail::change_columns(sources, weight_, start.weight_.value, noise_stddev,
                           derive_seed(seed, 1));
    detail::change_columns(sources, threshold_, start.threshold_.value);
    config_ = config;
    return {{0, sources.list()}, {1, sources.list()}};
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of a gate like this
  /// one, and the parameters have their original shapes.
  void check_tape(const Tape& tape) const {
    detail::require(tape.trained, "BalancedGate::backward without a forward pass on this tape");
    detail::require(tape.p.cols() == experts() && tape.difference.rows() == tape.p.rows() &&
                        (tape.tokens.batch_count != tape.tokens.count ||
                         tape.routing.slots() == experts() * taken(tape.p.rows())),
                    "BalancedGate::backward: the tape is another gate's, of ", tape.p.cols(),
                    " experts and ", tape.routing.slots(), " slots of ", tape.p.rows(), " tokens");
    detail::check_shapes(*this, "BalancedGate");
  }

  /// "weight" (W_g) and "threshold".
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight_);
    visit("threshold", self.threshold_);
  }

 private:
  static constexpr Index block = 64;  ///< tokens in a task

  static const Config& checked(const Config& config) {
    detail::check_at_least_one(name, "width", config.width);
    detail::check_at_least_one(name, "experts", config.experts);
    detail::check_choice(name, "top_k", config.top_k, "experts", config.experts);
    detail::check_at_least_zero(name, "Config.threshold_weight", config.threshold_weight);
    return config;
  }

  /// m, the number of tokens that an expert takes.
  Index taken(Index tokens) const {
    return detail::tokens_to_take(static_cast<double>(config_.top_k), tokens, experts());
  }

  /// Training, with the batchwise mask.
  void route(const MatrixRef<Scalar>& x, const Pass& pass, Tape& tape) const {
    compute_p(x, tape);
    detail::choose_tokens(tape.p, taken(tape.tokens.batch_count), pass.batch, tape.choice,
                          tape.routing);
    compute_weights(tape);
    compute_difference(tape);
    measure(config_.threshold_weight, pass.batch, tape);
    detail::insert_padding(tape.tokens, tape.routing);
  }
  /// Evaluation, with the thresholds.
  void route(const MatrixRef<Scalar>& x, const EvaluationPass& pass, Tape& tape) const {
    compute_p(x, tape);
    choose_by_threshold(tape);
    compute_weights(tape);
    measure(0, pass.batch, tape);
    detail::insert_padding(tape.tokens, tape.routing);
  }
  void route_backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                      Matrix<Scalar>& dx) {
    compute_loss_backward(tape);
    compute_weights_backward(dweight, tape);
    linear_scores_backward(tape.tokens.rows_of(x), tape.dscores, weight_, tape.tokens.rows_of(dx));
  }

  void compute_p(const MatrixRef<Scalar>& x, Tape& tape) const {
    linear_scores(tape.tokens.rows_of(x), weight_, tape.scores);
    softmax_rows(tape.scores, tape.p);
  }

  /// For a routing of valid tokens only, before padding is inserted.
  void measure(double threshold_weight, const SharedBatch* batch, Tape& tape) const {
    double loss = 0;
    if (threshold_weight > 0) {
      for (Index t = 0; t < tape.p.rows(); ++t) loss += static_cast<double>(tape.token_loss[t]);
    }
    detail::BatchSum sum(batch);
    sum.add(&loss, 1);
    detail::measure_balance(tape.routing, tape.routing.expert, sum, tape.balance);
    tape.loss_weights = {threshold_weight};
    tape.balance.losses = {};
    if (threshold_weight > 0) {
      tape.balance.losses.threshold =
          static_cast<Scalar>(threshold_weight * tape.loss_scale * loss);
    }
    tape.balance.loss = tape.balance.losses.threshold;
  }

  // The mask of thresholds [S17 eq. 19].

  template <class F>
  void for_each_passed(const Scalar* p, F&& f) const {
    if (std::isnan(p[0])) {
      f(Index{0});  // NaN is above no threshold, and without an expert the token's y would be 0
      return;
    }
    const Scalar* threshold = threshold_.value.data();
    for (Index i = 0; i < experts(); ++i) {
      if (p[i] > threshold[i]) f(i);
    }
  }

  void choose_by_threshold(Tape& tape) const {
    const Index tokens = tape.p.rows();
    Routing<Scalar>& routing = tape.routing;
    routing.experts = experts();
    detail::resize(routing.token_offsets, tokens + 1);
    routing.token_offsets[0] = 0;
    parallel_for_blocks(tokens, block, element_work(tape.p.size()), [&](Index first, Index count) {
      for (Index t = first; t < first + count; ++t) {
        Index passed = 0;
        for_each_passed(detail::row_data(tape.p, t), [&](Index) { ++passed; });
        routing.token_offsets[t + 1] = passed;
      }
    });
    for (Index t = 1; t <= tokens; ++t) {
      routing.token_offsets[t] += routing.token_offsets[t - 1];
    }
    detail::resize(routing.expert, routing.token_offsets.back());
    detail::resize(routing.weight, routing.token_offsets.back());
    parallel_for_blocks(tokens, block, element_work(tape.p.size()), [&](Index first, Index count) {
      for (Index t = first; t < first + count; ++t) {
        Index slot = routing.token_offsets[t];
        for_each_passed(detail::row_data(tape.p, t), [&](Index i) { routing.expert[slot++] = i; });
      }
    });
  }

  // G [S17 eq. 16], computed as the softmax over the scores of the experts that took the token: the
  // sum of their p, by which eq. 16 divides, may be rounded to 0.

  void compute_weights(Tape& tape) const {
    Routing<Scalar>& routing = tape.routing;
    parallel_for_blocks(tape.p.rows(), block, function_work(routing.slots()),
                        [&](Index first, Index count) {
                          for (Index t = first; t < first + count; ++t) {
                            const Scalar* scores = detail::row_data(tape.scores, t);
                            const Index begin = routing.token_offsets[t];
                            const Index end = routing.token_offsets[t + 1];
                            if (begin == end) continue;
                            Scalar largest = scores[routing.expert[begin]];
                            for (Index s = begin; s < end; ++s) {
                              largest = std::max(largest, scores[routing.expert[s]]);
                            }
                            Scalar total{0};
                            for (Index s = begin; s < end; ++s) {
                              routing.weight[s] = std::exp(scores[routing.expert[s]] - largest);
                              total += routing.weight[s];
                            }
                            for (Index s = begin; s < end; ++s) routing.weight[s] /= total;
                          }
                        });
  }

  /// dscores += G ⊙ (g − Σ_i G_i·g_i) on the slots, g being dweight.
  void compute_weights_backward(std::span<const Scalar> dweight, Tape& tape) const {
    const Routing<Scalar>& routing = tape.routing;
    parallel_for_blocks(
        tape.p.rows(), block, function_work(routing.slots()), [&](Index first, Index count) {
          for (Index t = first; t < first + count; ++t) {
            const Range slots = routing.slots_of_token(tape.tokens.row_of(t));
            const Index end = slots.first + slots.count;
            const auto g = [&](Index s) { return dweight[detail::to_size(s)]; };
            Scalar mean{0};
            for (Index s = slots.first; s < end; ++s) mean += routing.weight[s] * g(s);
            for (Index s = slots.first; s < end; ++s) {
              tape.dscores(t, routing.expert[s]) += routing.weight[s] * (g(s) - mean);
            }
          }
        });
  }

  // L_batchwise [S17 eq. 20].

  /// Mthreshold − Mbatch and the loss of each token.
  void compute_difference(Tape& tape) const {
    const Index tokens = tape.p.rows();
    const Scalar* threshold = threshold_.value.data();
    detail::resize(tape.difference, tokens, experts());
    detail::resize(tape.token_loss, tokens);
    parallel_for_blocks(tokens, block, element_work(tape.p.size()), [&](Index first, Index count) {
      for (Index t = first; t < first + count; ++t) {
        const Scalar* p = detail::row_data(tape.p, t);
        Scalar* difference = detail::row_data(tape.difference, t);
        for (Index i = 0; i < experts(); ++i) {
          difference[i] = p[i] > threshold[i] ? Scalar{1} : Scalar{0};
        }
        for (Index s = tape.routing.token_offsets[t]; s < tape.routing.token_offsets[t + 1]; ++s) {
          difference[tape.routing.expert[s]] -= Scalar{1};
        }
        Scalar loss{0};
        for (Index i = 0; i < experts(); ++i) loss += difference[i] * (p[i] - threshold[i]);
        tape.token_loss[t] = loss;
      }
    });
  }

  /// Sets tape.dscores to the gradient of ∂L/∂p = w·(Mthreshold − Mbatch) through the softmax, and adds
  /// ∂L/∂threshold_i = −w·Σ_t (Mthreshold − Mbatch)_ti.
  void compute_loss_backward(Tape& tape) {
    const auto weight = static_cast<Scalar>(tape.loss_weights.threshold * tape.loss_scale);
    if (weight == Scalar{0}) {
      detail::resize_to_zero(tape.dscores, tape.p.rows(), experts());
      return;
    }
    detail::resize(tape.dscores, tape.p.rows(), experts());
    tape.dscores = weight * tape.difference;
    softmax_rows_backward(tape.p, tape.dscores);
    if (!threshold_.trained) return;
    const Scalar minus = -weight;
    detail::add_column_sums(GatheredRows<Scalar>(tape.difference), threshold_.gradient(),
                            {&minus, 0});
  }

  Config config_;
  Parameter<Scalar> weight_;     ///< W_g, D x E
  Parameter<Scalar> threshold_;  ///< 1 x E
};

}  // namespace moe
