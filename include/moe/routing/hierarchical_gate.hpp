#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "moe/routing/gate.hpp"
#include "moe/routing/noisy_top_k.hpp"

/// \file
/// The two-level gate of [S17 App. B]: a primary gate chooses groups, a secondary gate in each
/// group chooses experts.

namespace moe {

/// Hierarchical noisy top-k gating [S17 App. B] over a groups of b experts each, in one flat
/// routing over E = a·b experts, expert j of group i being i·b + j.
///
///     y = Σ_i Σ_j Gprimary_i(x) · G_i,j(x) · E_i,j(x)                                 [S17 eq. 12]
///     Importance_H[i,j] = Σ_x Gprimary_i(x) · G_i,j(x)                                [S17 eq. 13]
///     Load_H[i,j] = Loadprimary_i · Load_i(X_i)_j / |X_i|, 0 where X_i is empty       [S17 eq. 14]
///     loss = w_importance·CV²(Importance_H) + w_load·CV²(Load_H)
///
/// Both levels score as NoisyTopKGate does, with weights that start at zero. X_i are the tokens
/// that the primary gate sent to group i, which are all that its secondary gate sees; their number
/// |X_i| is a constant of the choice. Without noise, and in evaluation, the load is the count of
/// the slots and has no gradient. A token's noise depends on no other token. With active_groups = 1
/// the primary gate learns from the losses only, a secondary one with active = 1 from the load.
///
/// Scores cost O(T·D·(a + active_groups·b)) where those of a flat gate cost O(T·D·a·b), and so does
/// memory without the D: with 131,072 experts in groups of 256 a token has a thousand scores. A
/// group without tokens costs nothing but being walked over, in lazy updates too (Updates::lazy).
///
/// A token with NaN or infinity in x gets as many experts as any other, and weights that are NaN;
/// then the losses are NaN too.
template <class Scalar_ = float>
class HierarchicalGate {
 public:
  using Scalar = Scalar_;

  struct Config {
    Index width = 0;          ///< D; 0 inside a layer's configuration stands for the layer's width
    Index groups = 0;         ///< a
    Index group_experts = 0;  ///< b, experts of a group
    Index active_groups = 0;  ///< groups chosen for a token, 1 <= active_groups <= groups
    Index active = 0;         ///< experts chosen in each of them, 1 <= active <= group_experts
    bool noise = true;  ///< false: scores are clean in training too, and the load has no gradient
    double noise_floor = 0.01;       ///< s0 > 0, of all gates
    double importance_weight = 0.1;  ///< w_importance >= 0
    double load_weight = 0.1;        ///< w_load >= 0

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("groups", self.groups);
      visit("group_experts", self.group_experts);
      visit("active_groups", self.active_groups);
      visit("active", self.active);
      visit("noise", self.noise);
      visit("noise_floor", self.noise_floor);
      visit("importance_weight", self.importance_weight);
      visit("load_weight", self.load_weight);
    }
  };

  /// What the primary gate leaves, a row a token, or the secondary gates, a row a token and group,
  /// group after group, so R = T·active_groups rows.
  struct Level : detail::NoisyTopKTape<Scalar> {
    Routing<Scalar> routing;      ///< rows to groups, or to the experts inside of a group
    Vector<Scalar> load;          ///< a: Loadprimary, or E: Load_i(X_i), group after group
    Vector<Scalar> dload;         ///< the gradient by it
    std::vector<Scalar> dchoice;  ///< the gradient by routing.weight
  };

  struct Tape : GateTape<Scalar> {
    Level primary;
    Level secondary;
    std::vector<Index> group_tokens;  ///< a, |X_i|
    Vector<Scalar> dimportance;       ///< E
    Vector<Scalar> dload;             ///< E
    Matrix<Scalar> dx_rows;           ///< R x D, the secondary gates' shares of dx
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is the noise's.
  HierarchicalGate(const Config& config, std::uint64_t seed)
      : config_(checked(config)),
        primary_(
            {config.width, config.groups, config.active_groups, config.noise, config.noise_floor},
            derive_seed(seed, 0)) {
    secondary_.reserve(detail::to_size(config.groups));
    for (Index i = 0; i < config.groups; ++i) {
      secondary_.emplace_back(
          typename TopK::Config{config.width, config.group_experts, config.active, config.noise,
                                config.noise_floor},
          derive_seed(seed, static_cast<std::uint64_t>(i) + 1));
    }
    detail::track_gradients(secondary_);
  }

  const Config& config() const { return config_; }
  Index experts() const { return config_.groups * config_.group_experts; }

  /// Training pass over x (T x D). Give every update its own key.step: the same key draws the same
  /// noise. Throws std::invalid_argument when x is not D wide.
  const Routing<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape,
                                 const NoiseKey& key) const {
    detail::check_gate_input(*this, "HierarchicalGate", x);
    tape.trained = false;
    route(x, config_.noise, key, tape);
    tape.trained = true;
    return tape.routing;
  }

  /// Routing without noise, and its balance, the load being the count. Leaves nothing that
  /// backward() could use.
  const Routing<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    detail::check_gate_input(*this, "HierarchicalGate", x);
    tape.trained = false;
    route(x, false, {.step = 0}, tape);
    return tape.routing;
  }
  Routing<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    return evaluate(x, tape);
  }

  /// Takes the x of forward() and dweight, the gradient of the loss with respect to the weight of
  /// each slot (S), and adds the balance losses' share once. Adds to the gradients of the gates, and
  /// to dx (T x D). At fixed noise and choice this is the exact derivative, that of the loads through
  /// their thresholds included. Throws std::invalid_argument when an argument does not belong to the
  /// tape.
  void backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                Matrix<Scalar>& dx) {
    check_tape(tape);
    detail::check_gate_backward("HierarchicalGate::backward", config_.width, x, dweight, tape, dx);
    detail::balance_loss_backward(tape.balance, config_.importance_weight, config_.load_weight,
                                  tape.dimportance, tape.dload);
    combine_load_backward(tape);
    combine_backward(dweight, tape);
    detail::resize_to_zero(tape.dx_rows, tape.primary.routing.slots(), config_.width);
    primary_.prepare_backward(tape.primary);
    secondary_.front().prepare_backward(tape.secondary);
    primary_.backward(GatheredRows<Scalar>(x), 0, tape.primary.dchoice.data(),
                      tape.primary.dload.data(), tape.primary, tape.primary.routing, view(dx));
    for_each_group(tape, [&](Index i, Range rows) {
      Level& level = tape.secondary;
      secondary_[detail::to_size(i)].backward(
          gathered(x, rows, tape), rows.first, level.dchoice.data(),
          level.dload.data() + i * config_.group_experts, level, level.routing,
          rows_of(tape.dx_rows, rows.first, rows.count));
    });
    add_rows_to_tokens(tape, dx);
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of such a gate, and
  /// its parameters have the shapes that it made.
  void check_tape(const Tape& tape) const {
    detail::require(tape.trained, "HierarchicalGate::backward without a forward pass on this tape");
    const Index tokens = tape.routing.tokens();
    detail::require(tape.primary.clean.cols() == config_.groups &&
                        tape.secondary.clean.cols() == config_.group_experts &&
                        tape.primary.routing.slots() == tokens * config_.active_groups &&
                        tape.routing.slots() == tokens * active(),
                    "HierarchicalGate::backward: the tape is another gate's, of ",
                    tape.primary.clean.cols(), " groups of ", tape.secondary.clean.cols(),
                    " experts");
    detail::check_shapes(*this, "HierarchicalGate");
  }

  /// "primary.weight", "primary.noise_weight", "secondary.0.weight", "secondary.0.noise_weight",
  /// ...
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("primary", self.primary_);
    visit("secondary", self.secondary_);
  }

 private:
  using TopK = detail::NoisyTopK<Scalar>;

  static const Config& checked(const Config& config) {
    using detail::require;
    require(config.width >= 1, "HierarchicalGate::Config.width = ", config.width,
            ", must be at least 1");
    require(config.groups >= 1, "HierarchicalGate::Config.groups = ", config.groups,
            ", must be at least 1");
    require(config.group_experts >= 1,
            "HierarchicalGate::Config.group_experts = ", config.group_experts,
            ", must be at least 1");
    require(config.active_groups >= 1 && config.active_groups <= config.groups,
            "HierarchicalGate::Config.active_groups = ", config.active_groups,
            ", must be from 1 to groups = ", config.groups);
    require(config.active >= 1 && config.active <= config.group_experts,
            "HierarchicalGate::Config.active = ", config.active,
            ", must be from 1 to group_experts = ", config.group_experts);
    detail::check_noise_floor("HierarchicalGate", config.noise_floor);
    detail::check_balance_weights("HierarchicalGate", config.importance_weight, config.load_weight);
    return config;
  }

  /// Slots of a token.
  Index active() const { return config_.active_groups * config_.active; }

  /// Fills tape.routing and tape.balance.
  void route(const MatrixRef<Scalar>& x, bool noise, const NoiseKey& key, Tape& tape) const {
    Level& groups = tape.primary;
    primary_.prepare(x.rows(), noise, groups, groups.routing);
    primary_.forward(GatheredRows<Scalar>(x), nullptr, key, 0, groups, groups.routing);
    group_by_expert(groups.routing);
    Level& level = tape.secondary;
    secondary_.front().prepare(groups.routing.slots(), noise, level, level.routing);
    for_each_group(tape, [&](Index i, Range rows) {
      secondary_[detail::to_size(i)].forward(gathered(x, rows, tape), tokens_of(rows, tape), key,
                                             rows.first, level, level.routing);
    });
    combine(tape);
    detail::measure_importance(tape.routing, tape.batch, tape.balance);
    if (noise) {
      measure_loads(tape);
      combine_load(tape);
    } else {
      detail::count_load(tape.routing, tape.batch, tape.balance);
    }
    tape.balance.loss =
        detail::balance_loss(tape.balance, config_.importance_weight, config_.load_weight);
  }

  // The weight of slot (t, i, j) is Gprimary_i · G_i,j. The slots of a token are in the order of
  // its groups, and of the experts in each, so their flat numbers ascend.

  void combine(Tape& tape) const {
    const Routing<Scalar>& groups = tape.primary.routing;
    const Routing<Scalar>& members = tape.secondary.routing;
    Routing<Scalar>& routing = tape.routing;
    routing.experts = experts();
    detail::resize(routing.token_offsets, groups.tokens() + 1);
    for (Index t = 0; t <= groups.tokens(); ++t) {
      routing.token_offsets[detail::to_size(t)] = t * active();
    }
    detail::resize(routing.expert, members.slots());
    detail::resize(routing.weight, members.slots());
    for_each_slot(tape, [&](std::size_t slot, std::size_t group_slot, std::size_t member_slot) {
      routing.expert[slot] =
          groups.expert[group_slot] * config_.group_experts + members.expert[member_slot];
      routing.weight[slot] = groups.weight[group_slot] * members.weight[member_slot];
    });
  }

  /// With g the gradient by the weight of a slot, importance's share included:
  /// dGprimary_i = Σ_j g·G_i,j and dG_i,j = g·Gprimary_i.
  void combine_backward(std::span<const Scalar> dweight, Tape& tape) const {
    const Routing<Scalar>& groups = tape.primary.routing;
    const Routing<Scalar>& members = tape.secondary.routing;
    detail::assign(tape.primary.dchoice, groups.slots(), Scalar{0});
    detail::resize(tape.secondary.dchoice, members.slots());
    for_each_slot(tape, [&](std::size_t slot, std::size_t group_slot, std::size_t member_slot) {
      const Scalar g = dweight[slot] + tape.dimportance[tape.routing.expert[slot]];
      tape.primary.dchoice[group_slot] += g * members.weight[member_slot];
      tape.secondary.dchoice[member_slot] = g * groups.weight[group_slot];
    });
  }

  /// Calls f(slot, slot of the primary gate's routing, slot of the secondary gates') in order.
  template <class F>
  void for_each_slot(const Tape& tape, F&& f) const {
    const Routing<Scalar>& groups = tape.primary.routing;
    std::size_t slot = 0;
    for (std::size_t group_slot = 0; group_slot < groups.expert.size(); ++group_slot) {
      const Index first = groups.slot_row[group_slot] * config_.active;
      for (Index k = 0; k < config_.active; ++k) f(slot++, group_slot, detail::to_size(first + k));
    }
  }

  // Load_H[i,j] = Loadprimary_i · Load_i(X_i)_j / |X_i|.

  /// Loadprimary_i, Load_i(X_i)_j and |X_i|; where X_i is empty its loads are left as they are,
  /// unless other processes may have tokens of it.
  void measure_loads(Tape& tape) const {
    Level& groups = tape.primary;
    Level& level = tape.secondary;
    detail::resize(groups.load, config_.groups);
    detail::resize(level.load, experts());
    if (tape.batch != nullptr) level.load.setZero();
    primary_.compute_load(0, groups.routing.tokens(), groups, groups.load.data());
    for_each_group(tape, [&](Index i, Range rows) {
      secondary_[detail::to_size(i)].compute_load(rows.first, rows.count, level,
                                                  level.load.data() + i * config_.group_experts);
    });
    detail::resize(tape.group_tokens, config_.groups);
    for (Index i = 0; i < config_.groups; ++i) {
      tape.group_tokens[detail::to_size(i)] = groups.routing.slots_of(i);
    }
    if (tape.batch == nullptr) return;
    detail::sum_over_batch(tape.batch, config_.groups, groups.load.data());
    detail::sum_over_batch(tape.batch, experts(), level.load.data());
    tape.batch->sum(std::span<Index>(tape.group_tokens));
  }

  void combine_load(Tape& tape) const {
    detail::resize_to_zero(tape.balance.load, experts());
    for (Index i = 0; i < config_.groups; ++i) {
      const Index tokens = tape.group_tokens[detail::to_size(i)];
      if (tokens == 0) continue;
      const Scalar share = tape.primary.load[i] / static_cast<Scalar>(tokens);
      const Index first = i * config_.group_experts;
      for (Index j = first; j < first + config_.group_experts; ++j) {
        tape.balance.load[j] = share * tape.secondary.load[j];
      }
    }
  }

  /// With l = ∂L/∂Load_H: dLoadprimary_i = Σ_j l_ij·Load_i(X_i)_j / |X_i| and
  /// dLoad_i(X_i)_j = l_ij·Loadprimary_i / |X_i|.
  void combine_load_backward(Tape& tape) const {
    Level& groups = tape.primary;
    Level& level = tape.secondary;
    detail::resize_to_zero(groups.dload, config_.groups);
    detail::resize_to_zero(level.dload, experts());
    if (!groups.has_noise || config_.load_weight == 0) return;  // 0 times a NaN load is no 0
    for (Index i = 0; i < config_.groups; ++i) {
      if (tape.group_tokens[detail::to_size(i)] == 0) continue;
      const Index first = i * config_.group_experts;
      const auto size = static_cast<Scalar>(tape.group_tokens[detail::to_size(i)]);
      const Scalar share = groups.load[i] / size;
      groups.dload[i] =
          detail::dot(config_.group_experts, tape.dload.data() + first, level.load.data() + first) /
          size;
      for (Index j = 0; j < config_.group_experts; ++j) {
        level.dload[first + j] = share * tape.dload[first + j];
      }
    }
  }

  /// dx += the rows of tape.dx_rows, by token in the order of its groups.
  void add_rows_to_tokens(const Tape& tape, Matrix<Scalar>& dx) const {
    parallel_for_blocks(
        dx.rows(), 64, element_work(tape.dx_rows.size()), [&](Index first, Index count) {
          for (Index slot = first * config_.active_groups;
               slot < (first + count) * config_.active_groups; ++slot) {
            const Index row = tape.primary.routing.slot_row[detail::to_size(slot)];
            detail::add_scaled(config_.width, Scalar{1}, detail::row_data(tape.dx_rows, row),
                               detail::row_data(dx, slot / config_.active_groups));
          }
        });
  }

  const Index* tokens_of(Range rows, const Tape& tape) const {
    return tape.primary.routing.row_token.data() + rows.first;
  }
  GatheredRows<Scalar> gathered(const MatrixRef<Scalar>& x, Range rows, const Tape& tape) const {
    return {x.data(), x.outerStride(), rows.count, x.cols(), tokens_of(rows, tape)};
  }

  /// Calls f(i, rows) for every group that has any. A group that is more than a worker's share of
  /// the rows comes alone and splits its work itself; the others go side by side.
  template <class F>
  void for_each_group(const Tape& tape, F&& f) const {
    const Routing<Scalar>& groups = tape.primary.routing;
    const Work work{2 * groups.slots() * config_.width * config_.group_experts};
    const Index workers = worker_count(work);
    const auto is_large = [&](Index count) { return 4 * workers * count > groups.slots(); };
    const auto visit = [&](Index i, bool large) {
      const Index count = groups.slots_of(i);
      if (count == 0 || is_large(count) != large) return;
      f(i, Range{groups.expert_offsets[detail::to_size(i)], count});
    };
    for (Index i = 0; i < config_.groups; ++i) visit(i, true);
    parallel_for(config_.groups, work, [&](Index i, Index) { visit(i, false); });
  }

  Config config_;
  TopK primary_;
  std::vector<TopK> secondary_;
};

}  // namespace moe
