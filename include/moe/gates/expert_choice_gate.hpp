#pragma once

#include <cmath>
#include <span>

#include "moe/gates/gate.hpp"
#include "moe/random.hpp"
#include "moe/routing/choose_tokens.hpp"
#include "moe/routing/linear_scores.hpp"

/// \file
/// Experts that choose their tokens.

namespace moe {

/// Expert choice: Y. Zhou, T. Lei, H. Liu, N. Du, Y. Huang, V. Zhao, A. Dai, Z. Chen, Q. Le,
/// J. Laudon, "Mixture-of-Experts with Expert Choice Routing", NeurIPS 2022 (arXiv 2202.09368),
/// section 3.2.
///
///     p = softmax(x·W_g)     over all experts     T x E
///     each expert takes the C tokens that are largest in its column of p, C = capacity_factor·T/E
///     the weight of a slot is its p
///
/// Ties go to the lower token. C is rounded down, but is at least 1. All experts get the same number
/// of tokens, so there is no balance loss. A token may have any number of experts, also none (then a
/// layer's y for it is its output activation of 0), and its weights need not add up to one.
///
/// A token's experts depend on the other tokens of the batch, those of later time steps included. So
/// in training a causal model gets information about the future that it does not have when it
/// generates. evaluate() chooses in the same way among the tokens of its batch: a token has other
/// experts in another batch, and alone it has all of them. BalancedGate is similar, but its inference
/// does not depend on the batch.
///
/// W_g is uniform in ±1/√D initially: zeros would tie all tokens and give every expert the same ones.
/// A token with NaN or infinity in x has p = NaN for every expert and comes last; the weight of an
/// expert that takes it is NaN.
///
/// It has the functions forward(), evaluate() and backward() of the concept Gate.
template <class Scalar_ = float>
class ExpertChoiceGate : public detail::GateBase<ExpertChoiceGate<Scalar_>, Scalar_> {
  using Base = detail::GateBase<ExpertChoiceGate<Scalar_>, Scalar_>;
  friend Base;

 public:
  using Scalar = typename Base::Scalar;                    ///< float or double
  static constexpr const char* name = "ExpertChoiceGate";  ///< in messages and files

  /// The configuration; the constructor checks it.
  struct Config {
    Index width = 0;    ///< D; 0 inside a layer's configuration stands for the layer's width
    Index experts = 0;  ///< E
    double capacity_factor = 2;  ///< experts of a token on average, above 0 and at most E

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("experts", self.experts);
      visit("capacity_factor", self.capacity_factor);
    }
  };

  /// What backward needs of the N valid tokens, and scratch.
  struct Tape : GateTape<Scalar> {
    Matrix<Scalar> p;                    ///< N x E
    Matrix<Scalar> dscores;              ///< N x E
    detail::TokenChoice<Scalar> choice;  ///< scratch
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is that of the initial W_g.
  ExpertChoiceGate(const Config& config, std::uint64_t seed)
      : config_(checked(config)), weight_(config.width, config.experts) {
    fill_uniform(weight_.value, Scalar{1} / std::sqrt(static_cast<Scalar>(config.width)), seed);
  }

  /// The configuration as it is now.
  const Config& config() const { return config_; }
  Index experts() const { return config_.experts; }  ///< E

  /// The calls of a SharedBatch that a pass makes, for mpi::RankDispatch.
  detail::SharedCalls shared_calls(bool, Index, Index) const {
    return detail::shared_calls(detail::SharedSelection<Scalar>::first_call(experts()),
                                detail::balance_figures(experts()));
  }

  /// Adds, copies and removes experts, see Gate: fresh columns get new initial values. Copies of
  /// W_g's columns get noise of this standard deviation. Returns where the parameters come from.
  /// Throws std::invalid_argument, with nothing changed, if Config would be out of range.
  std::vector<ParameterSource> change_experts(const ExpertSources& sources, std::uint64_t seed,
                                              double noise_stddev) {
    Config config = config_;
    config.experts = sources.experts();
    checked(config);
    const ExpertChoiceGate start(config, derive_seed(seed, 0));
    detail::change_columns(sources, weight_, start.weight_.value, noise_stddev,
                           derive_seed(seed, 1));
    config_ = config;
    return {{0, sources.list()}};
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of a gate like this
  /// one, and the parameters have their original shapes.
  void check_tape(const Tape& tape) const {
    detail::require(tape.trained, "ExpertChoiceGate::backward without a forward pass on this tape");
    detail::require(tape.p.cols() == experts() && tape.p.rows() == tape.tokens.count &&
                        (tape.tokens.batch_count != tape.tokens.count ||
                         tape.routing.slots() == experts() * capacity(tape.p.rows())),
                    "ExpertChoiceGate::backward: the tape is another gate's, of ", tape.p.cols(),
                    " experts and ", tape.routing.slots(), " slots of ", tape.p.rows(), " tokens");
    detail::check_shapes(*this, "ExpertChoiceGate");
  }

  /// "weight" (W_g).
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight_);
  }

 private:
  static const Config& checked(const Config& config) {
    using detail::require;
    detail::check_at_least_one(name, "width", config.width);
    detail::check_at_least_one(name, "experts", config.experts);
    require(
        config.capacity_factor > 0 && config.capacity_factor <= static_cast<double>(config.experts),
        "ExpertChoiceGate::Config.capacity_factor = ", config.capacity_factor,
        ", must be above 0 and at most experts = ", config.experts);
    return config;
  }

  /// C, the number of tokens that an expert takes.
  Index capacity(Index tokens) const {
    return detail::tokens_to_take(config_.capacity_factor, tokens, experts());
  }

  /// Calls f(t, slot) for every slot of each of the N tokens.
  template <class F>
  static void for_each_slot(const Tape& tape, F&& f) {
    for (Index t = 0; t < tape.tokens.count; ++t) {
      const Range slots = tape.routing.slots_of_token(tape.tokens.row_of(t));
      for (Index s = slots.first; s < slots.first + slots.count; ++s) f(t, s);
    }
  }

  /// The choice is the same in training and in evaluation.
  template <class AnyPass>
  void route(const MatrixRef<Scalar>& x, const AnyPass& pass, Tape& tape) const {
    linear_scores(tape.tokens.rows_of(x), weight_, tape.p);
    softmax_rows(tape.p, tape.p);
    Routing<Scalar>& routing = tape.routing;
    detail::choose_tokens(tape.p, capacity(tape.tokens.batch_count), pass.batch, tape.choice,
                          routing);
    detail::insert_padding(tape.tokens, routing);
    for_each_slot(tape,
                  [&](Index t, Index s) { routing.weight[s] = tape.p(t, routing.expert[s]); });
    detail::BatchSum sum(pass.batch);
    detail::measure_balance(routing, routing.expert, sum, tape.balance);
    tape.balance.losses = {};
    tape.balance.loss = Scalar{0};
  }

  void route_backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                      Matrix<Scalar>& dx) {
    detail::resize_to_zero(tape.dscores, tape.p.rows(), experts());
    for_each_slot(tape, [&](Index t, Index s) {
      tape.dscores(t, tape.routing.expert[s]) = dweight[detail::to_size(s)];
    });
    softmax_rows_backward(tape.p, tape.dscores);
    linear_scores_backward(tape.tokens.rows_of(x), tape.dscores, weight_, tape.tokens.rows_of(dx));
  }

  Config config_;
  Parameter<Scalar> weight_;  ///< W_g, D x E
};

}  // namespace moe
