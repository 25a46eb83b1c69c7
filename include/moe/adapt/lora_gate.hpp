#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/adapt/lora_config.hpp"
#include "moe/adapt/low_rank.hpp"
#include "moe/gates/gate.hpp"
#include "moe/routing/config_checks.hpp"

/// \file
/// A gate whose weights are frozen, with low-rank adapters that are trained.

namespace moe {

/// Any gate with weights W_g + factor·A·B instead of W_g (D x N). In NoisyTopKGate these are the weights of
/// the clean scores, N = E; in HierarchicalGate those of the primary and of every secondary gate, N = groups
/// or group_experts; in ProductKeyGate those of both kinds of keys, N = row_keys or column_keys. Noise,
/// losses and the choice are those of the gate. With rank 0 it gives the same bits as the gate.
///
/// A pass computes the sum in its tape, O(r·D·N). While W_g is frozen, backward computes the gradients of A
/// and B from x and from the gradient of the scores, and not that of the sum, D x N. If W_g is trained, or
/// the gate does not use linear_scores_backward(), it computes the gradient of the sum, and those of A and B
/// from it.
///
/// Parameters: those of the gate with their names, with `trained` false unless the gate was given
/// to the constructor; and for each "weight" a "lora_A.weight" (A, D x r) and a "lora_B.weight" (B,
/// r x N), with the same prefix. A user may set `trained` of any of them. Experts cannot be added,
/// copied or removed before merged().
template <class Gate_>
class LoraGate {
 public:
  using Adapted = Gate_;                                              ///< the gate that is adapted
  using Scalar = typename Adapted::Scalar;                            ///< float or double
  using LossWeights = typename detail::LossWeightsOf<Adapted>::type;  ///< the gate's

  /// The configuration; the constructor checks it.
  struct Config {
    Index width = 0;  ///< D; 0 inside a layer's configuration stands for the layer's
    typename Adapted::Config gate{};  ///< its width is 0 or D
    LoraGateConfig lora{};            ///< of the adapters

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("gate", self.gate);
      visit("lora", self.lora);
    }
  };

  /// The gate's tape, and the gate whose weights are the sums.
  struct Tape : Adapted::Tape {
    /// Memory kept from pass to pass for one adapter; add() computes the adapter's gradients.
    struct Sum final : detail::GradientFactors<Scalar> {
      Matrix<Scalar> gradient;  ///< D x N, of W_g + factor·A·B, where a gate computes it
      Matrix<Scalar> scaled_a;  ///< D x r, factor·A
      Matrix<Scalar> t_a;       ///< T x r, see add_low_rank_gradients()
      Matrix<Scalar> t_b;       ///< T x r, likewise
      detail::LowRank<Scalar>* adapter = nullptr;  ///< of the call of backward()
      bool is_whole = false;  ///< whether W_g is trained too, which needs `gradient`

      /// Adds to the gradients of A and B what x and the gradient of the scores give.
      void add(const GatheredRows<Scalar>& x, const GatheredRows<Scalar>& dy) override {
        const Index rank = adapter->rank();
        detail::resize(t_a, x.count(), rank);
        detail::resize(t_b, x.count(), rank);
        if (adapter->b.trained) detail::multiply_by_a(*adapter, x, view(t_a));
        if (adapter->a.trained) detail::multiply_by_b(*adapter, dy, view(t_b));
        const bool replace = detail::accumulate(*adapter, true);
        detail::add_low_rank_gradients(*adapter, x, dy, view(t_a), view(t_b),
                                       {0, adapter->gradient_rows()}, detail::start_of(replace));
      }
    };
    std::optional<Adapted> gate;                   ///< a copy whose weights are the sums
    std::vector<Sum> sums{};                       ///< one per adapter
    std::vector<Parameter<Scalar>*> parameters{};  ///< those of `gate`
  };

  /// A fresh gate with fresh adapters. Throws std::invalid_argument for a configuration out of range.
  LoraGate(const Config& config, std::uint64_t seed)
      : LoraGate(Adapted(completed(config).gate, derive_seed(seed, 0)), config.lora,
                 derive_seed(seed, 1)) {
    detail::walk_parameters(gate_, [](const ParameterName&, auto& p) { p.trained = false; });
  }

  /// A copy of a gate with fresh adapters. Its parameters stay trained or frozen as they are.
  /// Throws std::invalid_argument for a configuration out of range, or if rank > 0 and the gate has no
  /// parameter to adapt.
  LoraGate(Adapted gate, const LoraGateConfig& lora, std::uint64_t seed)
      : config_{gate.config().width, gate.config(),
                detail::checked_lora<Scalar>("LoraGateConfig", lora)},
        gate_(std::move(gate)) {
    Index number = 0;
    detail::walk_parameters(gate_, [&](const ParameterName& name, const auto& p) {
      const Index place = number++;
      const std::string text = name.string();
      if (text != last_part && !text.ends_with(".weight")) return;
      // Without the dot in front of it.
      const std::size_t end = text.size() - std::min(text.size(), last_part.size() + 1);
      adapters_.push_back({place,
                           text.substr(0, end),
                           {p.value.rows(), p.value.cols(), lora.rank, detail::lora_factor(lora),
                            derive_seed(seed, static_cast<std::uint64_t>(place))}});
      // So that lazy updates skip the same parts of the gate as without adapters.
      if (p.stored.state != detail::GradientState::untracked) {
        detail::track_gradients(adapters_.back().low_rank);
      }
    });
    detail::require(lora.rank == 0 || !adapters_.empty(),
                    "LoraGate: LoraGateConfig.rank = ", lora.rank,
                    ", but the gate has no parameter named weight");
  }

  /// The configuration as it is now.
  const Config& config() const { return config_; }
  Index experts() const { return gate_.experts(); }  ///< E
  /// The gate without adapters.
  const Adapted& gate() const { return gate_; }

  /// The gate that computes the same, with weights W_g + factor·A·B. It trains the parameters that
  /// gate() trains. Throws std::invalid_argument if a parameter no longer has its original shape.
  Adapted merged() const {
    detail::check_shapes(*this, "LoraGate");
    Adapted gate = gate_;
    Matrix<Scalar> scaled;
    for_each_adapted(gate, [&](std::size_t i, Parameter<Scalar>& weight) {
      detail::add_low_rank(adapters_[i].low_rank, scaled, weight.value);
    });
    return gate;
  }

  /// As the gate's. Throws std::invalid_argument, with the tape unchanged, when x is not D wide,
  /// the pass does not fit x, or a parameter no longer has its original shape.
  const Routing<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape, const Pass& pass) const {
    detail::check_gate_forward(*this, "LoraGate", x, pass);
    tape.trained = false;
    prepare(tape);
    tape.gate->forward(x, static_cast<typename Adapted::Tape&>(tape), pass);
    return tape.routing;
  }
  /// As the gate's.
  const Routing<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape,
                                  const EvaluationPass& pass = {}) const {
    detail::check_gate_evaluate(*this, "LoraGate", x, pass);
    tape.trained = false;
    prepare(tape);
    tape.gate->evaluate(x, static_cast<typename Adapted::Tape&>(tape), pass);
    return tape.routing;
  }

  /// As the gate's, with the gradients of A and B; that of W_g is computed only if W_g is trained.
  /// The parameters must have the values that they had in forward().
  void backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                Matrix<Scalar>& dx) {
    check_tape(tape);
    zero_gradients(*tape.gate);
    for_each_adapted(gate_, [&](std::size_t i, const Parameter<Scalar>& weight) {
      tape.sums[i].is_whole = weight.trained;
      tape.sums[i].adapter = &adapters_[i].low_rank;
    });
    for_each_adapted(*tape.gate, [&](std::size_t i, Parameter<Scalar>& weight) {
      weight.stored.factors = tape.sums[i].is_whole ? nullptr : &tape.sums[i];
    });
    tape.gate->backward(x, dweight, static_cast<typename Adapted::Tape&>(tape), dx);
    add_own_gradients(tape);
    for_each_adapted(*tape.gate, [&](std::size_t i, Parameter<Scalar>& weight) {
      if (weight.stored.memory.size() > 0 && !detail::is_idle(weight, Updates::lazy)) {
        low_rank_backward(weight.gradient(), adapters_[i].low_rank);
      }
    });
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of a gate like
  /// this one, and the parameters have their original shapes.
  void check_tape(const Tape& tape) const {
    detail::require(tape.gate.has_value() && tape.trained,
                    "LoraGate::backward without a forward pass on this tape");
    detail::require(tape.sums.size() == adapters_.size(),
                    "LoraGate::backward: the tape is another gate's, of ", tape.sums.size(),
                    " adapters, this one has ", adapters_.size());
    detail::check_shapes(*this, "LoraGate");
    if constexpr (requires { gate_.check_tape(tape); }) gate_.check_tape(tape);
  }

  // Each of the following exists only if the gate has it.

  /// As the gate's.
  void check_forward(const MatrixRef<Scalar>& x, const Pass& pass) const requires
      requires(const Adapted& gate) {
    gate.check_forward(x, pass);
  }
  { gate_.check_forward(x, pass); }
  /// As the gate's.
  void check_evaluate(const MatrixRef<Scalar>& x, const EvaluationPass& pass) const requires
      requires(const Adapted& gate) {
    gate.check_evaluate(x, pass);
  }
  { gate_.check_evaluate(x, pass); }
  /// As the gate's.
  void set_loss_weights(const LossWeights& weights) requires requires(Adapted& gate) {
    gate.set_loss_weights(weights);
  }
  {
    gate_.set_loss_weights(weights);
    config_.gate = gate_.config();
  }
  /// As the gate's.
  void update_selection_bias(const Tape& tape) requires requires(Adapted& gate) {
    gate.update_selection_bias(tape);
  }
  { gate_.update_selection_bias(tape); }
  /// As the gate's, given a load (E) that was summed over several passes.
  void update_selection_bias(const Vector<Scalar>& load) requires requires(Adapted& gate) {
    gate.update_selection_bias(load);
  }
  { gate_.update_selection_bias(load); }
  /// As the gate's.
  Index noise_columns() const requires requires(const Adapted& gate) { gate.noise_columns(); }
  { return gate_.noise_columns(); }
  /// As the gate's.
  Index experts_together() const requires requires(const Adapted& gate) { gate.experts_together(); }
  { return gate_.experts_together(); }
  /// As the gate's.
  Index shared_experts() const requires requires(const Adapted& gate) { gate.shared_experts(); }
  { return gate_.shared_experts(); }

  /// The parameters named above.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Adapted::visit_parameters(self.gate_, visit);
    visit_adapters(self, [&](std::string_view part, auto& low_rank) {
      if (part.empty()) {
        detail::LowRank<Scalar>::visit_parameters(low_rank, visit);
      } else {
        visit(part, low_rank);
      }
    });
  }
  /// visit(part, adapter) for every adapter: `part` is the name of its weight in the gate without
  /// ".weight", or empty for "weight".
  template <class Self, class Visitor>
  static void visit_adapters(Self& self, Visitor visit) {
    for (auto& adapter : self.adapters_) visit(std::string_view(adapter.part), adapter.low_rank);
  }

 private:
  static constexpr std::string_view last_part = "weight";

  struct Adapter {
    Index place;       ///< of its weight among the gate's parameters
    std::string part;  ///< what is in front of ".weight", or empty
    detail::LowRank<Scalar> low_rank;
  };

  static Config completed(Config config) {
    if (config.width == 0) config.width = config.gate.width;
    detail::complete_width("LoraGate", "gate", config.width, config.gate.width);
    return config;
  }

  /// Calls f(i, weight) for every adapter i and the weight of `gate` that it is added to.
  template <class F>
  void for_each_adapted(Adapted& gate, F&& f) const {
    Index number = 0;
    std::size_t next = 0;
    detail::walk_parameters(gate, [&](const ParameterName&, Parameter<Scalar>& p) {
      const Index place = number++;
      if (next < adapters_.size() && adapters_[next].place == place) f(next++, p);
    });
  }

  /// Makes the tape's gate: a copy of the gate as it is now, its loss weights and its selection
  /// bias included, with the adapters added to its weights. Only the memory of the gradients is
  /// reused.
  void prepare(Tape& tape) const {
    tape.sums.resize(adapters_.size());
    if (tape.gate.has_value()) {
      for_each_adapted(*tape.gate, [&](std::size_t i, Parameter<Scalar>& weight) {
        weight.stored.memory.swap(tape.sums[i].gradient);
      });
    }
    tape.gate = gate_;
    for_each_adapted(*tape.gate, [&](std::size_t i, Parameter<Scalar>& weight) {
      Matrix<Scalar>& memory = weight.stored.memory;
      memory.swap(tape.sums[i].gradient);
      // The tape may have been another gate's.
      if (memory.rows() != weight.value.rows() || memory.cols() != weight.value.cols()) {
        memory.resize(0, 0);
      }
      const detail::LowRank<Scalar>& adapter = adapters_[i].low_rank;
      if (adapter.rank() > 0 && (adapter.a.trained || adapter.b.trained)) weight.trained = true;
      detail::add_low_rank(adapter, tape.sums[i].scaled_a, weight.value);
    });
  }

  /// dA += factor·G·Bᵀ and dB += factor·Aᵀ·G; G is scaled.
  static void low_rank_backward(Matrix<Scalar>& g, detail::LowRank<Scalar>& w) {
    if (w.rank() == 0) return;
    detail::scale_rows(w.factor, view(g));
    if (w.a.trained) {
      const bool replace = detail::accumulate(w.a, true);
      detail::gemm(GemmNT<Scalar>{
          .a = g, .b = w.b.value, .c = w.a.gradient(), .start = detail::start_of(replace)});
    }
    if (w.b.trained) {
      const bool replace = detail::accumulate(w.b, true);
      detail::gemm(GemmTN<Scalar>{
          .a = w.a.value, .b = g, .c = view(w.b.gradient()), .start = detail::start_of(replace)});
    }
  }

  /// Adds the gradients of those parameters of gate() that are trained.
  void add_own_gradients(Tape& tape) {
    detail::walk_together(gate_, *tape.gate, tape.parameters, [](auto& p, auto& of_sum) {
      if (!p.trained || detail::is_idle(of_sum, Updates::lazy)) return;
      if (detail::accumulate(p, true)) {
        p.gradient() = of_sum.gradient();
      } else {
        p.gradient() += of_sum.gradient();
      }
    });
  }

  Config config_;
  Adapted gate_;
  std::vector<Adapter> adapters_;
};

}  // namespace moe
