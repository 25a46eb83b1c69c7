#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "moe/experts/expert.hpp"
#include "moe/experts/feed_forward.hpp"
#include "moe/function_ref.hpp"
#include "moe/kernels/activations.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/noisy_top_k_gate.hpp"

/// \file
/// The sparsely-gated mixture-of-experts layer: dispatch, run, combine.

namespace moe {

/// y_t = act(Σ over the slots of t of G·E_i(x_t)) [S17 eq. 1]: a gate sends every token to a few
/// experts, each expert runs over the rows it got, and the results are added up by weight. The layer
/// drops no token, and computes and back-propagates nothing for an expert that got none. A token that
/// a gate gave no slot (some do, see docs/gates.md) has a y of act(0).
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
/// same bits on any number of threads, and a token's y does not depend on the other rows of x unless
/// the gate's choice does. After a first call with the same shapes and number of slots nothing is
/// allocated, except what evaluate() without a tape returns.
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

    Matrix<Scalar> kept;             ///< S x kept_width or a little more, what the experts keep
    Index kept_width = 0;            ///< Expert::tape_width()
    Matrix<Scalar> combined;         ///< T x D, y before the output activation, if there is one
    Matrix<Scalar> dcombined;        ///< T x D
    Matrix<Scalar> dexperts;         ///< T x D, the experts' share of dx
    std::vector<Scalar> row_weight;  ///< S, the weights by row
    std::vector<Scalar> dweight;     ///< S, the gradients of the weights by slot

    /// What the experts that are at work at the moment need, see MoELayer::for_each_group().
    struct Task {
      enum Kind { run, combine, add_gradients } kind;
      Index block;  ///< of a run or gradients
      Range rows;   ///< of the block in a run, of the tokens in a combine, or of the gradients
      Range columns;
    };
    struct Slice {
      Index expert;
      Index first;  ///< row
      Index count;
      bool replaces = false;  ///< gradients are written over, not added to
    };
    Matrix<Scalar> group;              ///< rows of a group x Expert::scratch_width()
    std::vector<Slice> slices;
    std::vector<Task> tasks;
    std::vector<Scalar> row_dweight;   ///< rows of a group
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
  /// O(S·D·H), and what the gate costs. Throws std::invalid_argument when x is not D wide, and when a
  /// gate contradicts itself, which leaves the tape unusable.
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
    tape.kept_width = experts_.front().tape_width();
    tape.kept.resize(tape.routing.slots(), detail::spread_width<Scalar>(tape.kept_width));
    run_experts(tape.x, tape, true);
    tape.trained = true;
    return tape.y;
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
                        tape.kept_width == experts_.front().tape_width(),
                    "MoELayer::backward: the tape is another layer's, of ", tape.routing.experts,
                    " experts and width ", tape.x.cols());
    if constexpr (requires { gate_.check_tape(tape); }) gate_.check_tape(tape);
    const MatrixRef<Scalar> dsum = output_backward(dy, tape);
    detail::resize_to_zero(tape.dexperts, tokens, config_.width);
    detail::resize(tape.dweight, slots);
    run_experts_backward(dsum, tape);
    detail::resize_to_zero(tape.dx, tokens, config_.width);
    gate_.backward(std::span<const Scalar>(tape.dweight), tape);
    detail::require(tape.dx.rows() == tokens && tape.dx.cols() == config_.width,
                    "MoELayer: the gate left a tape.dx of ", tape.dx.rows(), " x ", tape.dx.cols(),
                    " for an x of ", tokens, " x ", config_.width);
    detail::add_scaled(tape.dx.size(), Scalar{1}, tape.dexperts.data(), tape.dx.data());
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
    tape.kept_width = 0;  // what an earlier pass kept may be of fewer slots
    run_experts(x, tape, false);
    return tape.y;
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
  using Slice = typename Tape::Slice;
  using Scratch = typename Expert::Scratch;
  using Block = ExpertBlock<Scalar>;

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

  /// Sorts the slots by expert.
  void dispatch(Tape& tape, Index tokens) const {
    const Index experts = gate_.experts();
    detail::require(tape.routing.experts == experts, "MoELayer: the gate's routing has ",
                    tape.routing.experts, " experts, the layer has ", experts);
    detail::require(tape.routing.tokens() == tokens, "MoELayer: the gate's routing has ",
                    tape.routing.tokens(), " tokens, x has ", tokens);
    group_by_expert(tape.routing);
    const Index slots = tape.routing.slots();
    detail::resize(tape.row_weight, slots);
    for (Index row = 0; row < slots; ++row) {
      tape.row_weight[detail::to_size(row)] =
          tape.routing.weight[detail::to_size(tape.routing.row_slot[detail::to_size(row)])];
    }
  }

  // Experts run in groups, one group after the other: first the first halves of all its slices, then
  // the second halves, which add to the tokens. A group is as many rows as the caches hold between
  // the two halves; within a half the work is split over the workers by slice, rows and columns.
  // Tokens are added to by column, and by row in the order of the experts, so nothing is stored per
  // slot and the bits do not depend on how anything was split.

  /// y = act(Σ G·experts(x)), x being T x D.
  void run_experts(const MatrixRef<Scalar>& x, Tape& tape, bool keeps) const {
    const bool plain = config_.output == Activation::identity;
    Matrix<Scalar>& sum = plain ? tape.y : tape.combined;
    detail::resize_to_zero(sum, x.rows(), config_.width);
    for_each_group(tape, [&] {
      plan_runs(tape, true);
      perform(tape, [&](const Task& task, Scratch& scratch) {
        expert_of(tape, task).run(block_of(x, tape, task.block).slice(task.rows), task.columns,
                                  keeps, scratch);
      });
      tape.tasks.clear();
      plan_combines(tape);
      perform(tape, [&](const Task& task, Scratch&) {
        for_each_slice_of(x, tape, task.rows, [&](const Slice& slice, const Block& block) {
          experts_[detail::to_size(slice.expert)].combine(block, task.columns, view(sum));
        });
      });
    });
    if (!plain) {
      tape.y.resize(sum.rows(), sum.cols());
      parallel_for_blocks(sum.size(), Index{1} << 14, [&](Index first, Index count) {
        detail::activate(config_.output, count, sum.data() + first, tape.y.data() + first);
      });
    }
  }

  /// Fills tape.dweight, adds to tape.dexperts and to the experts' gradients.
  void run_experts_backward(const MatrixRef<Scalar>& dy, Tape& tape) {
    const MatrixRef<Scalar> x(tape.x);
    for_each_group(tape, [&] {
      if (!Expert::fused) mark_gradients(tape);
      // A plain network adds to its gradients in the first half, so its rows stay together.
      plan_runs(tape, Expert::fused);
      perform(tape, [&](const Task& task, Scratch& scratch) {
        expert_of(tape, task).run_backward(block_of(x, tape, task.block).slice(task.rows), dy,
                                           task.columns, scratch);
      });
      tape.tasks.clear();
      if (Expert::fused) mark_gradients(tape);
      plan_gradients(tape);
      plan_combines(tape);
      perform(tape, [&](const Task& task, Scratch&) {
        if (task.kind == Task::add_gradients) {
          expert_of(tape, task).add_gradients(block_of(x, tape, task.block), dy, task.rows,
                                              tape.slices[detail::to_size(task.block)].replaces);
          return;
        }
        for_each_slice_of(x, tape, task.rows, [&](const Slice& slice, const Block& block) {
          experts_[detail::to_size(slice.expert)].combine_backward(block, task.columns,
                                                                   view(tape.dexperts));
        });
      });
      parallel_for(static_cast<Index>(tape.slices.size()), [&](Index i, Index) {
        const Slice& slice = tape.slices[detail::to_size(i)];
        Scalar* dweight = tape.row_dweight.data() + (slice.first - tape.slices.front().first);
        experts_[detail::to_size(slice.expert)].weight_gradients(block_of(x, tape, i), dy, dweight);
        for (Index row = 0; row < slice.count; ++row) {
          tape.dweight[detail::to_size(
              tape.routing.row_slot[detail::to_size(slice.first + row)])] = dweight[row];
        }
      });
    });
  }

  /// Right before they are added to, so that an exception leaves none that is old and seems new.
  void mark_gradients(Tape& tape) {
    for (Slice& slice : tape.slices) {
      Expert& expert = experts_[detail::to_size(slice.expert)];
      slice.replaces = detail::mark_gradients(expert, Expert::fused);
    }
  }

  /// Calls f() with tape.slices being those of each group in turn.
  void for_each_group(Tape& tape, detail::FunctionRef<void()> f) const {
    // What a worker's rows need between the halves should stay near it. A slice goes in one piece
    // where it can, since every piece reads the expert's weights anew.
    constexpr auto cached = static_cast<Index>((std::size_t{1} << 21) / sizeof(Scalar));
    const Index workers = worker_count();
    const Index width = experts_.front().scratch_width();
    const Index rows = std::min(tape.routing.slots(),
                                std::max(detail::task_rows, workers * cached / width));
    tape.group.resize(rows, width);
    detail::resize(tape.row_dweight, rows);
    tape.slices.reserve(detail::to_size(rows));
    tape.tasks.reserve(detail::to_size(most_tasks(rows)));
    if (static_cast<Index>(tape.scratch.size()) < workers) detail::resize(tape.scratch, workers);
    for (Scratch& scratch : tape.scratch) experts_.front().reserve(scratch);

    tape.slices.clear();
    tape.tasks.clear();
    Index filled = 0;
    const auto flush = [&] {
      if (filled > 0) f();
      tape.slices.clear();
      tape.tasks.clear();
      filled = 0;
    };
    for (Index e = 0; e < tape.routing.experts; ++e) {
      const Index start = tape.routing.expert_offsets[detail::to_size(e)];
      const Index slots = tape.routing.expert_offsets[detail::to_size(e) + 1] - start;
      const auto add = [&](Index first, Index count) {
        // Slices of one expert never share a group, since both would add to its gradients at once.
        if (first > 0 || filled + count > rows) flush();
        tape.slices.push_back({e, start + first, count, false});
        filled += count;
      };
      if (slots == 0) continue;
      if constexpr (Expert::fused) {
        detail::for_each_tile(slots, rows, add);
      } else {
        // A plain network is handed the same rows together on any number of workers.
        const Index most = std::max(expert_block_rows, rows / expert_block_rows * expert_block_rows);
        for (Index first = 0; first < slots; first += most) {
          add(first, std::min(most, slots - first));
        }
      }
    }
    flush();
  }

  // Plans append tasks. On one worker a task is as large as can be, since each reads its weights and
  // rows anew; on several there are some for each worker, in proportion to the work in a slice.

  Index group_rows(const Tape& tape) const {
    return tape.slices.back().first + tape.slices.back().count - tape.slices.front().first;
  }

  /// How many of the pieces that a group is cut into should come from `rows` of its rows.
  Index pieces_of(const Tape& tape, Index rows) const {
    const Index workers = worker_count();
    if (workers == 1) return 1;
    return (4 * workers * rows + group_rows(tape) - 1) / group_rows(tape);
  }

  /// Cuts [0, count) into at most `pieces` ranges whose lengths are multiples of `unit`.
  static void cut(Index count, Index pieces, Index unit, detail::FunctionRef<void(Range)> f) {
    const Index units = (count + unit - 1) / unit;
    const Index parts = std::max<Index>(1, std::min(pieces, units));
    const Index size = (units + parts - 1) / parts * unit;
    for (Index first = 0; first < count; first += size) {
      f(Range{first, std::min(size, count - first)});
    }
  }

  void plan_runs(Tape& tape, bool splits_rows) const {
    for (Index i = 0; i < static_cast<Index>(tape.slices.size()); ++i) {
      const Index count = tape.slices[detail::to_size(i)].count;
      const Index columns = experts_.front().columns();
      const Index pieces = pieces_of(tape, count);
      const Index panels =
          (columns + detail::panel_columns<Scalar> - 1) / detail::panel_columns<Scalar>;
      const Index row_pieces = (pieces + panels - 1) / panels;
      // A plain network is handed its rows in the same pieces on any number of workers.
      const Index unit = !splits_rows ? count : Expert::fused ? Index{32} : expert_block_rows;
      cut(count, std::max((count + detail::task_rows - 1) / detail::task_rows, row_pieces), unit,
          [&](Range rows) {
            cut(columns, (pieces + row_pieces - 1) / row_pieces, detail::panel_columns<Scalar>,
                [&](Range range) { tape.tasks.push_back({Task::run, i, rows, range}); });
          });
    }
  }

  void plan_combines(Tape& tape) const {
    const Index tokens = tape.routing.tokens();
    const Index pieces = worker_count() == 1 ? 1 : 2 * worker_count();
    const Index strips =
        (config_.width + detail::tile_columns<Scalar> - 1) / detail::tile_columns<Scalar>;
    cut(tokens, (pieces + strips - 1) / strips, 1, [&](Range rows) {
      cut(config_.width, pieces, detail::tile_columns<Scalar>, [&](Range columns) {
        tape.tasks.push_back({Task::combine, 0, rows, columns});
      });
    });
  }

  void plan_gradients(Tape& tape) const {
    for (Index i = 0; i < static_cast<Index>(tape.slices.size()); ++i) {
      cut(experts_.front().gradient_rows(), pieces_of(tape, tape.slices[detail::to_size(i)].count),
          64, [&](Range rows) { tape.tasks.push_back({Task::add_gradients, i, rows, {}}); });
    }
  }

  /// At most so many tasks come from a group: each kind makes one of every slice and for rows of it,
  /// and its share of the pieces, rounded up.
  Index most_tasks(Index rows) const { return 4 * rows + 32 * worker_count() + 32; }

  const Expert& expert_of(const Tape& tape, const Task& task) const {
    return experts_[detail::to_size(tape.slices[detail::to_size(task.block)].expert)];
  }
  Expert& expert_of(const Tape& tape, const Task& task) {
    return experts_[detail::to_size(tape.slices[detail::to_size(task.block)].expert)];
  }

  /// The rows of a slice of the group.
  Block block_of(const MatrixRef<Scalar>& x, Tape& tape, Index index) const {
    const Slice& slice = tape.slices[detail::to_size(index)];
    const Index* token = tape.routing.row_token.data() + slice.first;
    const Index stride = tape.kept_width > 0 ? tape.kept.cols() : 0;
    return {GatheredRows<Scalar>(x.data(), x.outerStride(), slice.count, x.cols(), token),
            token,
            tape.row_weight.data() + slice.first,
            MatrixView<Scalar>(tape.kept.data() + slice.first * stride, slice.count, tape.kept_width,
                               Eigen::OuterStride<>(stride)),
            rows_of(tape.group, slice.first - tape.slices.front().first, slice.count)};
  }

  /// Calls f(slice, block) for the slices of the group in the order of the experts, a block being
  /// the rows whose tokens are among `tokens`.
  void for_each_slice_of(const MatrixRef<Scalar>& x, Tape& tape, Range tokens,
                         detail::FunctionRef<void(const Slice&, const Block&)> f) const {
    for (Index i = 0; i < static_cast<Index>(tape.slices.size()); ++i) {
      const Slice& slice = tape.slices[detail::to_size(i)];
      const Index* begin = tape.routing.row_token.data() + slice.first;
      const Index first = std::lower_bound(begin, begin + slice.count, tokens.first) - begin;
      const Index last =
          std::lower_bound(begin, begin + slice.count, tokens.first + tokens.count) - begin;
      if (first < last) f(slice, block_of(x, tape, i).slice({first, last - first}));
    }
  }

  /// Calls f(task, scratch) for every task. In a parallel region even if there is one task only where
  /// a network may use Eigen's own products: outside of one, Eigen would split them over threads,
  /// with other bits for each number.
  static void perform(Tape& tape, detail::FunctionRef<void(const Task&, Scratch&)> f) {
    const auto count = static_cast<Index>(tape.tasks.size());
    const Index calls = Expert::fused ? count : std::max<Index>(2, count);
    parallel_for(calls, [&](Index i, Index worker) {
      if (i < count) f(tape.tasks[detail::to_size(i)], tape.scratch[detail::to_size(worker)]);
    });
  }

  /// dy ⊙ act'(Σ G·rows); dy itself without an output activation.
  MatrixRef<Scalar> output_backward(const MatrixRef<Scalar>& dy, Tape& tape) const {
    if (config_.output == Activation::identity) return dy;
    detail::copy_matrix(dy, tape.dcombined);
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
