#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "moe/experts/expert.hpp"
#include "moe/experts/feed_forward.hpp"
#include "moe/kernels/activations.hpp"
#include "moe/layer/combine.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/noisy_top_k_gate.hpp"

/// \file
/// The sparsely-gated mixture-of-experts layer: dispatch, run, combine.

namespace moe {

/// y_t = act(Σ over the slots of t of G·E_i(x_t)) [S17 eq. 1]: a gate sends every token to a few
/// experts, each expert runs over the rows it got, and the results are added up by weight. No token
/// is dropped, and nothing is computed or back-propagated for an expert that got none.
///
///     moe::MoELayer<moe::Expert<moe::FeedForward>> layer({.width = 128,
///                                                         .expert = {.hidden = 256},
///                                                         .gate = {.experts = 64, .active = 4},
///                                                         .seed = 1});
///     decltype(layer)::Tape tape;
///     const auto& y = layer.forward(x, tape, {.step = step});   // x is T x 128
///     const auto& dx = layer.backward(dy, tape);                // gradients are in the parameters
///     auto served = layer.evaluate(x);                          // no noise, no tape
///
/// The layer knows neither what a network computes nor how a gate chose. A const layer may be used
/// from several threads at once, each with its own tape. The same seed, input and step give the
/// same bits on any number of threads, and a token's y does not depend on the other rows of x.
/// After a first call with the same shapes nothing is allocated, except what evaluate() without a
/// tape returns.
template <class Expert, class Gate_ = NoisyTopKGate<typename Expert::Scalar>>
requires Gate<Gate_> && std::same_as<typename Expert::Scalar, typename Gate_::Scalar>
class MoELayer {
 public:
  using Scalar = typename Expert::Scalar;

  struct Config {
    Index width = 0;                           ///< D
    typename Expert::Config expert{};          ///< of every expert
    typename Gate_::Config gate{};             ///< says how many experts there are
    Activation output = Activation::identity;  ///< [S17 App. C.1] has a sigmoid here
    std::uint64_t seed = 0;                    ///< of the experts' start and the gate's noise
  };

  /// What a pass leaves behind: a gate's tape (x, routing, balance, dx) and more. One tape belongs
  /// to one pass at a time; several passes in flight take several tapes.
  struct Tape : Gate_::Tape {
    Matrix<Scalar> y;  ///< T x D, the result

    Matrix<Scalar> kept;              ///< S x Expert::tape_width(), what the experts keep
    Matrix<Scalar> rows;              ///< S x D, outputs of the experts, or their dx
    Matrix<Scalar> combined;          ///< T x D, y before the output activation, if there is one
    Matrix<Scalar> dcombined;         ///< T x D
    std::vector<Scalar> row_weight;   ///< S, the weights by row
    std::vector<Scalar> row_dweight;  ///< S, their gradients by row
    std::vector<Scalar> dweight;      ///< S, the same by slot

    struct Task {
      Index expert;
      Index first;  ///< row
      Index count;
    };
    std::vector<Task> tasks;
    std::vector<typename Expert::Scratch> scratch;  ///< one a worker
  };

  /// Throws std::invalid_argument for a configuration out of range.
  explicit MoELayer(const Config& config)
      : config_(completed(config)), gate_(config_.gate, derive_seed(config.seed, 0)) {
    detail::require(gate_.experts() >= 1, "MoELayer: the gate has ", gate_.experts(),
                    " experts, must be at least 1");
    experts_.reserve(detail::to_size(gate_.experts()));
    for (Index e = 0; e < gate_.experts(); ++e) {
      experts_.emplace_back(config_.expert,
                            derive_seed(config.seed, static_cast<std::uint64_t>(e) + 1));
    }
  }

  const Config& config() const { return config_; }
  const Gate_& gate() const { return gate_; }
  Gate_& gate() { return gate_; }
  const std::vector<Expert>& experts() const { return experts_; }
  std::vector<Expert>& experts() { return experts_; }

  /// Training pass over x (T x D); returns tape.y (T x D). The losses and the figures to watch are
  /// in tape.balance. Give every update its own key.step: the same key draws the same noise.
  /// O(T·D·E) for the gate and O(S·D·H) for the experts. Throws std::invalid_argument when x is not
  /// D wide, and when a gate contradicts itself, which leaves the tape unusable.
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape,
                                const NoiseKey& key = {}) const {
    check_width(x, "x");
    tape.trained = false;
    gate_.forward(x, tape, key);
    tape.trained = false;  // until the experts have run too
    detail::require(tape.x.rows() == x.rows() && tape.x.cols() == config_.width,
                    "MoELayer: the gate left a tape.x of ", tape.x.rows(), " x ", tape.x.cols(),
                    " for an x of ", x.rows(), " x ", config_.width);
    dispatch(tape, x.rows());
    const Index slots = tape.routing.slots();
    tape.kept.resize(slots, experts_.front().tape_width());
    const GatheredRows<Scalar> rows(tape.x, tape.routing.row_token.data(), slots);
    run(tape, [&](const Task& task, Scratch& scratch) {
      experts_[detail::to_size(task.expert)].forward(
          rows.slice(task.first, task.count), rows_of(tape.kept, task.first, task.count),
          rows_of(tape.rows, task.first, task.count), scratch);
    });
    tape.trained = true;
    return combine(tape);
  }

  /// Takes dy, the gradient of the loss by y (T x D), after forward() on the same tape. Adds to
  /// every parameter's gradient, the balance losses' included once; returns the gradient of the
  /// loss by x (T x D), which is tape.dx. The parameters must be those of the forward pass. Throws
  /// std::invalid_argument when dy has another shape than y or the tape is not of a forward pass of
  /// such a layer, before anything is changed.
  const Matrix<Scalar>& backward(const MatrixRef<Scalar>& dy, Tape& tape) {
    detail::require(tape.trained, "MoELayer::backward without a forward pass on this tape");
    check_width(dy, "dy");
    const Index tokens = tape.x.rows();
    const Index slots = tape.routing.slots();
    detail::require(dy.rows() == tokens, "MoELayer: dy has ", dy.rows(), " rows, y has ", tokens);
    detail::require(tape.routing.experts == gate_.experts() && tape.x.cols() == config_.width &&
                        tape.kept.cols() == experts_.front().tape_width(),
                    "MoELayer::backward: the tape is another layer's, of ", tape.routing.experts,
                    " experts and width ", tape.x.cols());
    const GatheredRows<Scalar> x(tape.x, tape.routing.row_token.data(), slots);
    const MatrixRef<Scalar> dsum = output_backward(dy, tape);
    const GatheredRows<Scalar> dy_rows(dsum, tape.routing.row_token.data(), slots);
    detail::resize(tape.row_dweight, slots);
    run_whole_experts(tape, [&](const Task& task, Scratch& scratch) {
      experts_[detail::to_size(task.expert)].backward(
          x.slice(task.first, task.count),
          rows_of(std::as_const(tape.kept), task.first, task.count),
          dy_rows.slice(task.first, task.count), tape.row_weight.data() + task.first,
          rows_of(tape.rows, task.first, task.count), tape.row_dweight.data() + task.first,
          scratch);
    });
    detail::resize(tape.dweight, slots);
    for (Index row = 0; row < slots; ++row) {
      tape.dweight[detail::to_size(tape.routing.row_slot[detail::to_size(row)])] =
          tape.row_dweight[detail::to_size(row)];
    }
    tape.dx.setZero(tokens, config_.width);
    gate_.backward(std::span<const Scalar>(tape.dweight), tape);
    detail::require(tape.dx.rows() == tokens && tape.dx.cols() == config_.width,
                    "MoELayer: the gate left a tape.dx of ", tape.dx.rows(), " x ", tape.dx.cols(),
                    " for an x of ", tokens, " x ", config_.width);
    detail::combine<Scalar>(tape.routing, {}, tape.rows, tape.dx);
    return tape.dx;
  }

  /// y (T x D) without noise. Leaves tape.routing and tape.balance too, so a served or validated
  /// batch can be watched, but nothing that backward() could use.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    check_width(x, "x");
    tape.trained = false;
    gate_.evaluate(x, tape);
    tape.trained = false;
    dispatch(tape, x.rows());
    const Index slots = tape.routing.slots();
    const GatheredRows<Scalar> rows(x, tape.routing.row_token.data(), slots);
    run(tape, [&](const Task& task, Scratch& scratch) {
      experts_[detail::to_size(task.expert)].evaluate(
          rows.slice(task.first, task.count), rows_of(tape.rows, task.first, task.count), scratch);
    });
    return combine(tape);
  }
  Matrix<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    return evaluate(x, tape);
  }

  /// "gate.weight", "gate.noise_weight", "experts.0.up.weight", ...
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("gate", self.gate_);
    visit("experts", self.experts_);
  }

 private:
  using Task = typename Tape::Task;
  using Scratch = typename Expert::Scratch;

  static Config completed(Config config) {
    detail::require(config.width >= 1, "MoELayer::Config.width = ", config.width,
                    ", must be at least 1");
    if (config.expert.width == 0) config.expert.width = config.width;
    if (config.gate.width == 0) config.gate.width = config.width;
    detail::require(config.expert.width == config.width,
                    "MoELayer::Config.expert.width = ", config.expert.width,
                    ", must be 0 or Config.width = ", config.width);
    detail::require(config.gate.width == config.width,
                    "MoELayer::Config.gate.width = ", config.gate.width,
                    ", must be 0 or Config.width = ", config.width);
    detail::require_activation("MoELayer::Config.output", config.output);
    return config;
  }

  void check_width(const MatrixRef<Scalar>& matrix, const char* name) const {
    detail::require(matrix.cols() == config_.width, "MoELayer: ", name, " has ", matrix.cols(),
                    " columns, Config.width = ", config_.width);
  }

  /// Sorts the slots by expert and readies the memory for the experts' rows, as much as any
  /// routing of so many slots can need.
  void dispatch(Tape& tape, Index tokens) const {
    const Index experts = gate_.experts();
    detail::require(tape.routing.experts == experts, "MoELayer: the gate's routing has ",
                    tape.routing.experts, " experts, the layer has ", experts);
    detail::require(tape.routing.tokens() == tokens, "MoELayer: the gate's routing has ",
                    tape.routing.tokens(), " tokens, x has ", tokens);
    group_by_expert(tape.routing);
    const Index slots = tape.routing.slots();
    tape.tasks.reserve(detail::to_size(experts + slots / expert_block_rows));
    tape.rows.resize(slots, config_.width);
    detail::resize(tape.row_weight, slots);
    for (Index row = 0; row < slots; ++row) {
      tape.row_weight[detail::to_size(row)] =
          tape.routing.weight[detail::to_size(tape.routing.row_slot[detail::to_size(row)])];
    }
    reserve_scratch(tape);
  }

  /// One scratch a worker of the pass at hand, since forward and backward may run on different
  /// numbers of threads. None is given back: a pass inside somebody's parallel region has one worker.
  void reserve_scratch(Tape& tape) const {
    const auto workers = detail::to_size(worker_count());
    if (tape.scratch.size() < workers) tape.scratch.resize(workers);
    for (Scratch& scratch : tape.scratch) experts_.front().reserve(scratch);
  }

  /// Calls f(task, scratch) for blocks of rows, which are independent in a forward pass.
  template <class F>
  void run(Tape& tape, F&& f) const {
    tape.tasks.clear();
    for (Index e = 0; e < tape.routing.experts; ++e) {
      const Index end = tape.routing.expert_offsets[detail::to_size(e) + 1];
      for (Index first = tape.routing.expert_offsets[detail::to_size(e)]; first < end;
           first += expert_block_rows) {
        tape.tasks.push_back({e, first, std::min(expert_block_rows, end - first)});
      }
    }
    run_tasks(tape, f);
  }

  /// Calls f(task, scratch) for whole slices, since the rows of an expert add up in its gradient.
  /// An expert with so many rows that the other workers would wait for it goes first and alone, its
  /// products being split over the workers instead; that changes no bit.
  template <class F>
  void run_whole_experts(Tape& tape, F&& f) const {
    const bool splits = Expert::splits_products && worker_count() > 1;
    const Index alone = splits ? tape.routing.slots() / (2 * worker_count()) : tape.routing.slots();
    reserve_scratch(tape);
    tape.tasks.clear();
    for (Index e = 0; e < tape.routing.experts; ++e) {
      const Task task{e, tape.routing.expert_offsets[detail::to_size(e)], tape.routing.slots_of(e)};
      if (task.count > alone) {
        f(task, tape.scratch.front());
      } else if (task.count > 0) {
        tape.tasks.push_back(task);
      }
    }
    run_tasks(tape, f);
  }

  /// In a parallel region even if there is one task only where a network may use Eigen's own
  /// products: outside of one, Eigen would split them over threads, with other bits for each number.
  template <class F>
  static void run_tasks(Tape& tape, F&& f) {
    const auto count = static_cast<Index>(tape.tasks.size());
    const Index calls = Expert::splits_products ? count : std::max<Index>(2, count);
    parallel_for(calls, [&](Index i, Index worker) {
      if (i < count) f(tape.tasks[detail::to_size(i)], tape.scratch[detail::to_size(worker)]);
    });
  }

  /// y = act(Σ G·rows).
  const Matrix<Scalar>& combine(Tape& tape) const {
    const bool plain = config_.output == Activation::identity;
    Matrix<Scalar>& sum = plain ? tape.y : tape.combined;
    sum.setZero(tape.routing.tokens(), config_.width);
    detail::combine<Scalar>(tape.routing, tape.routing.weight, tape.rows, sum);
    if (!plain) {
      tape.y.resize(sum.rows(), sum.cols());
      parallel_for_blocks(sum.size(), Index{1} << 14, [&](Index first, Index count) {
        detail::activate(config_.output, count, sum.data() + first, tape.y.data() + first);
      });
    }
    return tape.y;
  }

  /// dy ⊙ act'(Σ G·rows); dy itself without an output activation.
  MatrixRef<Scalar> output_backward(const MatrixRef<Scalar>& dy, Tape& tape) const {
    if (config_.output == Activation::identity) return dy;
    tape.dcombined = dy;
    parallel_for_blocks(dy.size(), Index{1} << 14, [&](Index first, Index count) {
      Scalar* d = tape.dcombined.data() + first;
      detail::activate_backward(config_.output, count, tape.combined.data() + first, d, d);
    });
    return tape.dcombined;
  }

  Config config_;
  Gate_ gate_;
  std::vector<Expert> experts_;
};

}  // namespace moe
