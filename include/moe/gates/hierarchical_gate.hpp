#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "moe/gates/gate.hpp"
#include "moe/routing/dispatch.hpp"
#include "moe/routing/hierarchical_load.hpp"
#include "moe/routing/noisy_top_k.hpp"

/// \file
/// The two-level gate of [S17 App. B]: a primary gate chooses groups, a secondary gate in each
/// group chooses experts.

namespace moe {

/// Hierarchical noisy top-k gating [S17 App. B] over `a` groups of `b` experts each, in one flat
/// routing over E = a·b experts, expert j of group i being i·b + j.
///
///     y = Σ_i Σ_j Gprimary_i(x) · G_i,j(x) · E_i,j(x)                                 [S17 eq. 12]
///     Importance_H[i,j] = Σ_x Gprimary_i(x) · G_i,j(x)                                [S17 eq. 13]
///     Load_H[i,j] = Loadprimary_i · Load_i(X_i)_j / |X_i|, 0 where X_i is empty       [S17 eq. 14]
///     loss = w_importance·CV²(Importance_H) + w_load·CV²(Load_H)
///
/// Both levels compute scores as NoisyTopKGate does, with weights that are zero initially. X_i are the
/// tokens that the primary gate sent to group i; the secondary gate of the group computes only these.
/// Their number |X_i| has no gradient. Without noise, and in evaluation, the load is the count of the
/// slots and has no gradient. A token's noise depends on no other token. With top_k_groups = 1 the
/// primary gate has a gradient from the load loss only, and so has a secondary gate with top_k = 1.
///
/// Scores cost O(T·D·(a + top_k_groups·b)) time and O(T·(a + top_k_groups·b)) memory; those of a flat
/// gate O(T·D·a·b) and O(T·a·b). With 131,072 experts in groups of 256 and top_k_groups = 2 a token has
/// 1,024 scores. A group without tokens takes almost no time, in lazy updates too (Updates::lazy).
///
/// A token with NaN or infinity in x gets as many experts as any other, but its weights, the
/// importance loss and, with noise, the load loss are NaN.
///
/// It has the functions forward(), evaluate() and backward() of the concept Gate.
template <class Scalar_ = float>
class HierarchicalGate : public detail::GateBase<HierarchicalGate<Scalar_>, Scalar_> {
  using Base = detail::GateBase<HierarchicalGate<Scalar_>, Scalar_>;
  friend Base;

 public:
  using Scalar = typename Base::Scalar;                    ///< float or double
  static constexpr const char* name = "HierarchicalGate";  ///< in messages and files

  /// The configuration; the constructor checks it.
  struct Config {
    Index width = 0;          ///< D; 0 inside a layer's configuration stands for the layer's width
    Index groups = 0;         ///< a
    Index group_experts = 0;  ///< b, experts of a group
    Index top_k_groups = 0;   ///< groups chosen for a token, 1 <= top_k_groups <= groups
    Index top_k = 0;          ///< experts chosen in each of them, 1 <= top_k <= group_experts
    bool noise = true;  ///< false: scores are clean in training too, and the load has no gradient
    double noise_floor = 0.01;       ///< s0 > 0, of all gates
    double importance_weight = 0.1;  ///< w_importance >= 0
    double load_weight = 0.1;        ///< w_load >= 0

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("groups", self.groups);
      visit("group_experts", self.group_experts);
      visit("top_k_groups", self.top_k_groups);
      visit("top_k", self.top_k);
      visit("noise", self.noise);
      visit("noise_floor", self.noise_floor);
      visit("importance_weight", self.importance_weight);
      visit("load_weight", self.load_weight);
    }
  };

  /// The weights of the gate's losses, see Config.
  using LossWeights = BalanceLossWeights;

  /// The scores of one level. The primary gate has a row for each token, N. The secondary gates have a
  /// row for each token and chosen group, R = N·top_k_groups, those of group 0 first.
  struct Level : detail::NoisyTopKTape<Scalar> {
    Routing<Scalar> routing;       ///< rows to groups, or to the experts within a group
    Vector<Scalar> load;           ///< a: Loadprimary, or E: Load_i(X_i), that of group 0 first
    Vector<Scalar> dload;          ///< the gradient w.r.t. the load
    IndexedVector<Scalar> dscore;  ///< the gradient w.r.t. routing.weight, then the chosen scores
  };

  /// What backward needs of both levels, of the N valid tokens.
  struct Tape : GateTape<Scalar> {
    LossWeights loss_weights;        ///< of the pass
    Level primary;                   ///< N rows
    Dispatch<Scalar> groups;         ///< the primary gate's slots by group
    IndexedVector<Index> group_row;  ///< R, for each row the row of x; empty where x has no padding
    Level secondary;                 ///< R rows
    IndexedVector<Index> group_tokens;  ///< a, |X_i|
    Vector<Scalar> dimportance;         ///< E
    Vector<Scalar> dload;               ///< E
    Matrix<Scalar> dx_rows;             ///< R x D, the secondary gates' shares of dx
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is that of the noise.
  HierarchicalGate(const Config& config, std::uint64_t seed)
      : config_(checked(config)),
        seed_(seed),
        primary_(
            {config.width, config.groups, config.top_k_groups, config.noise, config.noise_floor},
            derive_seed(seed, 0)) {
    secondary_.reserve(detail::to_size(config.groups));
    for (Index i = 0; i < config.groups; ++i) {
      secondary_.push_back(make_secondary(config, seed, i));
    }
    detail::track_gradients(secondary_);
  }

  /// The configuration as it is now.
  const Config& config() const { return config_; }
  Index experts() const { return config_.groups * config_.group_experts; }  ///< E = a·b

  /// The number of experts of a group, which should be on one rank: a token's slots of a group are
  /// sent together.
  Index experts_together() const { return config_.group_experts; }
  /// The number of values of Pass::noise for a row of x: n of each group, then of each expert (those of
  /// groups that are not chosen are not read); 0 without Config.noise.
  Index noise_columns() const { return config_.noise ? config_.groups + experts() : 0; }

  /// The calls of a SharedBatch that a pass makes, for mpi::RankDispatch.
  detail::SharedCalls shared_calls(bool training, Index, Index) const {
    const Index loads = training && config_.noise ? 2 * config_.groups : 0;
    return detail::shared_calls({}, detail::balance_figures(experts()) + loads);
  }

  /// Changes the weights of the losses from the next pass on. Throws std::invalid_argument for one
  /// out of range.
  void set_loss_weights(const LossWeights& weights) {
    detail::set_balance_weights(name, weights, config_);
  }

  /// Adds, copies and removes groups of experts, see Gate: fresh weights are zero, as initially. W_g of a
  /// copied group, and the group's column in the primary gate, get noise of this standard deviation.
  /// Returns where the parameters come from. Throws std::invalid_argument, with nothing changed,
  /// unless whole groups are added, copied and removed and Config stays in range.
  std::vector<ParameterSource> change_experts(const ExpertSources& sources, std::uint64_t seed,
                                              double noise_stddev) {
    const ExpertSources groups = detail::sources_of_groups("HierarchicalGate::change_experts",
                                                           sources, config_.group_experts);
    Config config = config_;
    config.groups = groups.experts();
    checked(config);
    std::vector<TopK> secondary;
    secondary.reserve(detail::to_size(config.groups));
    std::vector<ParameterSource> from{{0, groups.list()}, {1, groups.list()}};
    for (Index i = 0; i < config.groups; ++i) {
      const bool is_fresh = groups.is_fresh(i);
      secondary.push_back(make_secondary(config, seed_, i));
      if (!is_fresh) secondary.back().take_weights(secondary_[detail::to_size(groups[i])]);
      if (groups.is_copy(i)) {
        secondary.back().add_noise(noise_stddev,
                                   derive_seed(seed, static_cast<std::uint64_t>(i) + 1));
      }
      for (const Index part : {2, 3}) {
        from.push_back({is_fresh ? fresh_source : part + 2 * groups[i]});
      }
    }
    detail::track_gradients(secondary);
    primary_.change_experts(groups, config.top_k_groups, derive_seed(seed, 0), noise_stddev);
    secondary_.swap(secondary);
    config_ = config;
    return from;
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of a gate like this
  /// one, and the parameters have their original shapes.
  void check_tape(const Tape& tape) const {
    detail::require(tape.trained, "HierarchicalGate::backward without a forward pass on this tape");
    const Index tokens = tape.tokens.count;
    detail::require(tape.primary.clean.cols() == config_.groups &&
                        tape.secondary.clean.cols() == config_.group_experts &&
                        tape.primary.routing.slots() == tokens * config_.top_k_groups &&
                        tape.routing.slots() == tokens * top_k(),
                    "HierarchicalGate::backward: the tape is another gate's, of ",
                    tape.primary.clean.cols(), " groups of ", tape.secondary.clean.cols(),
                    " experts");
    detail::check_shapes(*this, "HierarchicalGate");
  }

  /// "primary.weight", "primary.noise_weight", "secondary.0.weight", "secondary.0.noise_weight", ...
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("primary", self.primary_);
    visit("secondary", self.secondary_);
  }

 private:
  using TopK = detail::NoisyTopK<Scalar>;

  static const Config& checked(const Config& config) {
    detail::check_at_least_one(name, "width", config.width);
    detail::check_at_least_one(name, "groups", config.groups);
    detail::check_at_least_one(name, "group_experts", config.group_experts);
    detail::check_product(name, "groups", config.groups, "group_experts", config.group_experts);
    detail::check_choice(name, "top_k_groups", config.top_k_groups, "groups", config.groups);
    detail::check_choice(name, "top_k", config.top_k, "group_experts", config.group_experts);
    detail::check_noise_floor(name, config.noise_floor);
    detail::check_balance_weights(name, config);
    return config;
  }

  static TopK make_secondary(const Config& config, std::uint64_t seed, Index group) {
    return TopK(
        {config.width, config.group_experts, config.top_k, config.noise, config.noise_floor},
        derive_seed(seed, static_cast<std::uint64_t>(group) + 1));
  }

  /// Slots of a token.
  Index top_k() const { return config_.top_k_groups * config_.top_k; }

  void route(const MatrixRef<Scalar>& x, const Pass& pass, Tape& tape) const {
    route(x, config_.noise, detail::noise_source(pass, noise_columns()), pass.batch, tape);
  }
  void route(const MatrixRef<Scalar>& x, const EvaluationPass& pass, Tape& tape) const {
    route(x, false, {.key = {.step = 0}}, pass.batch, tape);
  }
  void route(const MatrixRef<Scalar>& x, bool has_noise, const detail::NoiseSource& noise,
             const SharedBatch* batch, Tape& tape) const {
    Level& groups = tape.primary;
    primary_.prepare(tape.tokens.count, has_noise, groups, groups.routing);
    primary_.forward(tape.tokens.rows_of(x), tape.tokens.row_list(), noise, 0, groups,
                     groups.routing);
    sort_by_expert(groups.routing, tape.groups);
    list_group_rows(tape);
    Level& level = tape.secondary;
    secondary_.front().prepare(groups.routing.slots(), has_noise, level, level.routing);
    for_each_group(tape, [&](Index i, Range rows) {
      detail::NoiseSource of_group = noise;
      if (noise.given != nullptr) of_group.given += config_.groups + i * config_.group_experts;
      secondary_[detail::to_size(i)].forward(gathered(x, rows, tape), rows_of_x(rows, tape),
                                             of_group, rows.first, level, level.routing);
    });
    combine(tape);
    detail::BatchSum sum(batch);
    if (has_noise) {
      measure_loads(sum, tape);
      detail::measure_importance(tape.routing, sum, tape.balance);
      detail::hierarchical_load(tape.primary.load, tape.secondary.load, tape.group_tokens,
                                tape.balance.load);
    } else {
      detail::measure_balance(tape.routing, tape.routing.expert, sum, tape.balance);
    }
    tape.loss_weights = detail::balance_weights_of(config_);
    detail::measure_balance_loss(tape.loss_weights, tape.loss_scale, tape.balance);
    detail::insert_padding(tape.tokens, tape.routing);
  }

  /// The gradient of the loads includes the part that goes through their thresholds.
  void route_backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                      Matrix<Scalar>& dx) {
    detail::balance_loss_backward(tape.balance, tape.loss_weights, tape.loss_scale,
                                  tape.dimportance, tape.dload);
    combine_load_backward(tape);
    combine_backward(dweight, tape);
    detail::resize_to_zero(tape.dx_rows, tape.primary.routing.slots(), config_.width);
    primary_.prepare_backward(tape.primary);
    secondary_.front().prepare_backward(tape.secondary);
    primary_.backward(tape.tokens.rows_of(x), 0, tape.primary.dscore.data(),
                      tape.primary.dload.data(), tape.primary, tape.primary.routing,
                      tape.tokens.rows_of(dx));
    for_each_group(tape, [&](Index i, Range rows) {
      Level& level = tape.secondary;
      secondary_[detail::to_size(i)].backward(
          gathered(x, rows, tape), rows.first, level.dscore.data(),
          level.dload.data() + i * config_.group_experts, level, level.routing,
          ScatteredRows<Scalar>(rows_of(tape.dx_rows, rows.first, rows.count)));
    });
    add_rows_to_tokens(tape, dx);
  }

  // The weight of slot (t, i, j) is Gprimary_i · G_i,j. The slots of a token are in the order of
  // its groups, and of the experts in each, so their flat numbers ascend.

  void combine(Tape& tape) const {
    const Routing<Scalar>& groups = tape.primary.routing;
    const Routing<Scalar>& members = tape.secondary.routing;
    Routing<Scalar>& routing = tape.routing;
    routing.experts = experts();
    detail::resize(routing.token_offsets, groups.tokens() + 1);
    for (Index t = 0; t <= groups.tokens(); ++t) routing.token_offsets[t] = t * top_k();
    detail::resize(routing.expert, members.slots());
    detail::resize(routing.weight, members.slots());
    for_each_slot(tape, [&](std::size_t slot, std::size_t group_slot, std::size_t member_slot) {
      routing.expert[slot] =
          groups.expert[group_slot] * config_.group_experts + members.expert[member_slot];
      routing.weight[slot] = groups.weight[group_slot] * members.weight[member_slot];
    });
  }

  /// With g the gradient with respect to the weight of a slot, importance's share included:
  /// dGprimary_i = Σ_j g·G_i,j and dG_i,j = g·Gprimary_i.
  void combine_backward(std::span<const Scalar> dweight, Tape& tape) const {
    const Routing<Scalar>& groups = tape.primary.routing;
    const Routing<Scalar>& members = tape.secondary.routing;
    detail::assign(tape.primary.dscore, groups.slots(), Scalar{0});
    detail::resize(tape.secondary.dscore, members.slots());
    for_each_slot(tape, [&](std::size_t slot, std::size_t group_slot, std::size_t member_slot) {
      const Scalar g = dweight[slot] + tape.dimportance[tape.routing.expert[slot]];
      tape.primary.dscore[group_slot] += g * members.weight[member_slot];
      tape.secondary.dscore[member_slot] = g * groups.weight[group_slot];
    });
    detail::softmax_of_chosen_backward(groups, config_.top_k_groups, tape.primary.dscore);
    detail::softmax_of_chosen_backward(tape.secondary.routing, config_.top_k,
                                       tape.secondary.dscore);
  }

  /// Calls f(slot, slot of the primary gate's routing, slot of the secondary gates') in order.
  template <class F>
  void for_each_slot(const Tape& tape, F&& f) const {
    const Routing<Scalar>& groups = tape.primary.routing;
    std::size_t slot = 0;
    for (std::size_t group_slot = 0; group_slot < groups.expert.size(); ++group_slot) {
      const Index first = tape.groups.sorted_position[group_slot] * config_.top_k;
      for (Index k = 0; k < config_.top_k; ++k) f(slot++, group_slot, detail::to_size(first + k));
    }
  }

  /// Loadprimary_i, Load_i(X_i)_j and |X_i|, which are added to `sum`; loads are 0 if X_i is empty.
  void measure_loads(detail::BatchSum& sum, Tape& tape) const {
    Level& groups = tape.primary;
    Level& level = tape.secondary;
    detail::resize(groups.load, config_.groups);
    detail::resize_to_zero(level.load, experts());
    primary_.compute_load(0, groups.routing.tokens(), groups, groups.load.data());
    for_each_group(tape, [&](Index i, Range rows) {
      secondary_[detail::to_size(i)].compute_load(rows.first, rows.count, level,
                                                  level.load.data() + i * config_.group_experts);
    });
    detail::resize(tape.group_tokens, config_.groups);
    for (Index i = 0; i < config_.groups; ++i) {
      tape.group_tokens[i] = tape.groups.slots_of(i);
    }
    sum.add(groups.load.data(), config_.groups);
    sum.add(level.load.data(), experts());
    sum.add(tape.group_tokens.data(), config_.groups);
  }

  void combine_load_backward(Tape& tape) const {
    Level& groups = tape.primary;
    Level& level = tape.secondary;
    detail::resize_to_zero(groups.dload, config_.groups);
    detail::resize_to_zero(level.dload, experts());
    // 0 times a NaN load would be NaN.
    if (!groups.has_noise || tape.loss_weights.load * tape.loss_scale == 0) return;
    detail::hierarchical_load_backward(groups.load, level.load, tape.group_tokens, tape.dload,
                                       groups.dload, level.dload);
  }

  /// dx += the rows of tape.dx_rows, by token in the order of its groups.
  void add_rows_to_tokens(const Tape& tape, Matrix<Scalar>& dx) const {
    parallel_for_blocks(
        tape.tokens.count, 64, element_work(tape.dx_rows.size()), [&](Index first, Index count) {
          for (Index slot = first * config_.top_k_groups;
               slot < (first + count) * config_.top_k_groups; ++slot) {
            const Index from = tape.groups.sorted_position[slot];
            const Index to = tape.tokens.row_of(slot / config_.top_k_groups);
            detail::add_scaled(config_.width, Scalar{1}, detail::row_data(tape.dx_rows, from),
                               detail::row_data(dx, to));
          }
        });
  }

  /// tape.group_row, from the tokens by group.
  void list_group_rows(Tape& tape) const {
    if (tape.tokens.all) {
      tape.group_row.clear();
      return;
    }
    detail::resize(tape.group_row, tape.groups.slots());
    for (Index i = 0; i < tape.groups.slots(); ++i) {
      tape.group_row[i] = tape.tokens.row_of(tape.groups.token[i]);
    }
  }
  const Index* rows_of_x(Range rows, const Tape& tape) const {
    return (tape.tokens.all ? tape.groups.token : tape.group_row).data() + rows.first;
  }
  GatheredRows<Scalar> gathered(const MatrixRef<Scalar>& x, Range rows, const Tape& tape) const {
    return {x.data(), x.outerStride(), rows.count, x.cols(), rows_of_x(rows, tape)};
  }

  /// Calls f(i, rows) for every group that has rows. A group with more rows than a quarter of a
  /// worker's share is computed alone, and its own loops use all workers; the other groups are
  /// computed in parallel.
  template <class F>
  void for_each_group(const Tape& tape, F&& f) const {
    const Dispatch<Scalar>& groups = tape.groups;
    const Work work{2 * groups.slots() * config_.width * config_.group_experts};
    const Index workers = worker_count(work);
    const auto is_large = [&](Index count) { return 4 * workers * count > groups.slots(); };
    const auto visit = [&](Index i, bool large) {
      const Index count = groups.slots_of(i);
      if (count == 0 || is_large(count) != large) return;
      f(i, Range{groups.offsets[i], count});
    };
    for (Index i = 0; i < config_.groups; ++i) visit(i, true);
    parallel_for(config_.groups, work, [&](Index i, Index) { visit(i, false); });
  }

  Config config_;
  std::uint64_t seed_;
  TopK primary_;
  std::vector<TopK> secondary_;
};

}  // namespace moe
