#pragma once

#include <algorithm>
#include <span>

#include "moe/experts/expert.hpp"
#include "moe/function_ref.hpp"
#include "moe/kernels/column_sums.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/dispatch.hpp"

/// \file
/// The experts' share of a pass: every expert over the rows it got, and their weighted sum.

namespace moe::detail {

/// The slots of a range of experts, a view of a part of a Dispatch. Its rows are these slots, counted
/// from the first.
template <class Scalar>
struct DispatchSlice {
  const Index* offsets;  ///< E + 1 of these experts; the first offset need not be 0
  Index experts;         ///< E of these
  Index tokens;          ///< T
  const Index* token;    ///< S of these, ascending for each expert
  const Scalar* weight;  ///< S of these

  /// Experts first, first + 1, ... of a dispatch of T tokens.
  DispatchSlice(const Dispatch<Scalar>& dispatch, Index token_count, Range of_experts)
      : offsets(dispatch.offsets.data() + of_experts.first),
        experts(of_experts.count),
        tokens(token_count),
        token(dispatch.token.data() + offsets[0]),
        weight(dispatch.weight.data() + offsets[0]) {}

  Index slots() const { return offsets[experts] - offsets[0]; }
  Index slots_of(Index e) const { return offsets[e + 1] - offsets[e]; }
  Index first_row(Index e) const { return offsets[e] - offsets[0]; }
};

/// What the experts save between forward and backward, and the scratch of their passes.
template <class Expert>
struct ExpertTape {
  using Scalar = typename Expert::Scalar;

  Matrix<Scalar> saved;   ///< S x saved_width or a little more, what the experts save
  Index saved_width = 0;  ///< Expert::tape_width() after a training pass, else 0

  /// A part of the work of a group of experts, see ExpertPass::for_each_group().
  struct Task {
    enum Kind { prepare, hidden, output, add_gradients } kind;
    Index block;  ///< the slice; not used by an output task
    Range rows;   ///< of the block, of the tokens in an output task, or of the gradients
    Range columns;
  };
  struct Slice {
    Index expert;
    Index first;  ///< row
    Index count;
    bool replaces = false;  ///< gradients are written over, not added to
  };
  Matrix<Scalar> group;  ///< rows of a group x Expert::scratch_width()
  IndexedVector<Slice> slices;
  IndexedVector<Task> tasks;
  IndexedVector<typename Expert::Scratch> scratch;  ///< one per worker
};

/// A pass of one or more experts over their slots. It refers to its arguments, which must outlive
/// it.
///
/// Experts run in groups, one group after the other: first the first halves of all slices of the
/// group, then the second halves, which add to the rows of the tokens. A group has as many rows as
/// the caches hold between the two halves; within a half the work is split over the workers by
/// slice, rows and columns. A task of a second half adds to its own columns of its own tokens, in
/// the order of the experts, so no output of a slot is stored and the bits do not depend on the
/// split.
template <class Expert>
class ExpertPass {
 public:
  using Scalar = typename Expert::Scalar;
  using Tape = ExpertTape<Expert>;

  ExpertPass(std::span<const Expert> experts, const DispatchSlice<Scalar>& slots, Tape& tape)
      : experts_(experts), slots_(slots), tape_(tape) {
    MOE_ASSERT(static_cast<Index>(experts.size()) == slots.experts);
    row_work_ = first_expert().row_work();
    workers_ = Expert::fused ? worker_count(Work{row_work_ * slots.slots()}) : worker_count();
  }

  /// Throws std::invalid_argument if a parameter of an expert with rows no longer has its original
  /// shape.
  void check_experts() const {
    for (Index e = 0; e < slots_.experts; ++e) {
      if (slots_.slots_of(e) > 0) check_shapes(experts_[to_size(e)], "MoELayer: an expert");
    }
  }

  /// sum += Σ over slots G·expert(x), x and sum being T x D. With `save`, leaves in the tape what
  /// backward() needs.
  void forward(const MatrixRef<Scalar>& x, bool save, Matrix<Scalar>& sum) const {
    // 0 without `save`: what an earlier pass saved may be of fewer slots.
    tape_.saved_width = save ? first_expert().tape_width() : 0;
    if (save) resize(tape_.saved, slots_.slots(), padded_stride<Scalar>(tape_.saved_width));
    if (slots_.slots() == 0) return;
    for_each_group([&] {
      prepare(x, [](const auto& network, const Block& block) { network.prepare_hidden(block); });
      plan_hidden(true);
      perform([&](const Task& task, Scratch& scratch) {
        expert_of(task).hidden(block_of(x, task.block).slice(task.rows), task.columns, save,
                               scratch, expert_after(task));
      });
      tape_.tasks.clear();
      prepare(x, [](const auto& network, const Block& block) { network.prepare_output(block); });
      plan_output(x.cols());
      perform([&](const Task& task, Scratch&) {
        for_each_slice_of(x, task.rows, [&](const Slice& slice, const Block& block) {
          experts_[to_size(slice.expert)].output(block, task.columns, view(sum),
                                                 expert_after(slice));
        });
      });
    });
  }

  /// After forward() with `save` on the same tape: takes dy, the gradient w.r.t. the sum (T x D);
  /// fills dweight (S), the gradients w.r.t. the slots' weights, and adds to dx (T x D) and to the
  /// gradients of the experts, which must be those of forward().
  void backward(std::span<Expert> experts, const MatrixRef<Scalar>& x, const MatrixRef<Scalar>& dy,
                Scalar* dweight, Matrix<Scalar>& dx) const {
    MOE_ASSERT(experts.data() == experts_.data());
    if (slots_.slots() == 0) return;
    for_each_group([&] {
      if (!Expert::fused) mark_group(experts);
      prepare(x, [&](const auto& network, const Block& block) {
        network.prepare_hidden_backward(block, dy);
      });
      // A plain network adds to its gradients in the first half, so its rows stay together.
      plan_hidden(Expert::fused);
      perform([&](const Task& task, Scratch& scratch) {
        expert_of(experts, task)
            .hidden_backward(block_of(x, task.block).slice(task.rows), dy, task.columns, scratch);
      });
      tape_.tasks.clear();
      if (Expert::fused) mark_group(experts);
      prepare(x, [](const auto& network, const Block& block) {
        network.prepare_output_backward(block);
      });
      plan_gradients();
      plan_output(x.cols());
      perform([&](const Task& task, Scratch&) {
        if (task.kind == Task::add_gradients) {
          expert_of(experts, task)
              .add_gradients(block_of(x, task.block), dy, task.rows,
                             tape_.slices[task.block].replaces);
          return;
        }
        for_each_slice_of(x, task.rows, [&](const Slice& slice, const Block& block) {
          experts_[to_size(slice.expert)].output_backward(block, task.columns, view(dx));
        });
      });
      const Work work = element_work(group_rows() * x.cols());
      parallel_for(static_cast<Index>(tape_.slices.size()), work, [&](Index i, Index) {
        const Slice& slice = tape_.slices[i];
        experts_[to_size(slice.expert)].weight_gradients(block_of(x, i), dy, dweight + slice.first);
      });
    });
  }

 private:
  using Task = typename Tape::Task;
  using Slice = typename Tape::Slice;
  using Scratch = typename Expert::Scratch;
  using Block = ExpertBlock<Scalar>;

  /// Marks the gradients just before adding to them, so that an exception cannot expose stale ones.
  void mark_group(std::span<Expert> experts) const {
    for (Slice& slice : tape_.slices) {
      slice.replaces = accumulate(experts[to_size(slice.expert)], Expert::fused);
    }
  }

  /// Calls f() with tape_.slices being those of each group in turn.
  void for_each_group(FunctionRef<void()> f) const {
    // A worker's rows should stay in its L2 between the halves. A slice is one piece if possible,
    // since every piece reads the expert's weights again.
    constexpr auto cached = static_cast<Index>((std::size_t{1} << 20) / sizeof(Scalar));
    const Index width = first_expert().scratch_width();
    const Index rows = std::min(slots_.slots(), std::max(task_rows, workers_ * cached / width));
    resize(tape_.group, rows, width);
    reserve(tape_.slices, rows);
    reserve(tape_.tasks, most_tasks(rows));
    if (static_cast<Index>(tape_.scratch.size()) < workers_) resize(tape_.scratch, workers_);
    for (Scratch& scratch : tape_.scratch) first_expert().reserve(scratch);

    tape_.slices.clear();
    tape_.tasks.clear();
    Index filled = 0;
    const auto flush = [&] {
      if (filled > 0) f();
      tape_.slices.clear();
      tape_.tasks.clear();
      filled = 0;
    };
    for (Index e = 0; e < slots_.experts; ++e) {
      const Index start = slots_.first_row(e);
      const Index slots = slots_.slots_of(e);
      const auto add = [&](Index first, Index count) {
        // Slices of one expert never share a group, since both would add to its gradients at once.
        if (first > 0 || filled + count > rows) flush();
        tape_.slices.push_back({e, start + first, count, false});
        filled += count;
      };
      if (slots == 0) continue;
      if constexpr (Expert::fused) {
        // Cut at blocks of summed_rows, over which gradients are summed, so that the cuts do not
        // depend on the number of workers.
        const Index blocks = (slots + summed_rows - 1) / summed_rows;
        for_each_tile(
            blocks, std::max<Index>(1, rows / summed_rows), [&](Index first, Index count) {
              add(first * summed_rows, std::min(count * summed_rows, slots - first * summed_rows));
            });
      } else {
        // The cuts for a plain network must not depend on the number of workers.
        const Index most =
            std::max(expert_block_rows, rows / expert_block_rows * expert_block_rows);
        for (Index first = 0; first < slots; first += most) {
          add(first, std::min(most, slots - first));
        }
      }
    }
    flush();
  }

  // These append tasks. On one worker a task is as large as possible (rows of a first half are
  // still cut at task_rows, if they may be cut), since each reads its weights and rows again; on
  // several workers the number of tasks of a slice is in proportion to its rows.

  Index group_rows() const {
    return tape_.slices.back().first + tape_.slices.back().count - tape_.slices.front().first;
  }

  /// The number of tasks that `rows` of the group's rows should be cut into.
  Index pieces_of(Index rows) const {
    if (workers_ == 1) return 1;
    return (8 * workers_ * rows + group_rows() - 1) / group_rows();
  }

  /// Cuts [0, count) into at most `pieces` ranges of about equal size that start at multiples of
  /// `unit`. The larger ones come first, so that workers wait for small ones at the end.
  static void cut(Index count, Index pieces, Index unit, FunctionRef<void(Range)> f) {
    const Index units = (count + unit - 1) / unit;
    for_each_part(units, std::min(pieces, units), [&](Index first, Index size) {
      f(Range{first * unit, std::min(size * unit, count - first * unit)});
    });
  }

  void plan_hidden(bool splits_rows) const {
    for (Index i = 0; i < static_cast<Index>(tape_.slices.size()); ++i) {
      const Index count = tape_.slices[i].count;
      const Index columns = first_expert().columns();
      const Index pieces = pieces_of(count);
      const Index panels = (columns + panel_columns<Scalar> - 1) / panel_columns<Scalar>;
      const Index row_pieces = (pieces + panels - 1) / panels;
      // The pieces of a plain network must not depend on the number of workers.
      const Index unit = !splits_rows ? count : Expert::fused ? Index{32} : expert_block_rows;
      cut(count, std::max((count + task_rows - 1) / task_rows, row_pieces), unit, [&](Range rows) {
        cut(columns, (pieces + row_pieces - 1) / row_pieces, panel_columns<Scalar>,
            [&](Range range) {
              tape_.tasks.push_back({Task::hidden, i, rows, range});
            });
      });
    }
  }

  /// A task for each worker: columns are cut as long as the pieces are at least a tile wide, then rows too,
  /// which can give a few more tasks than workers. There are no smaller tasks, since each piece of
  /// rows reads the weights again.
  void plan_output(Index width) const {
    const Index strips = std::clamp<Index>(width / tile_columns<Scalar>, 1, workers_);
    cut(slots_.tokens, (workers_ + strips - 1) / strips, 1, [&](Range rows) {
      cut(width, strips, cache_line<Scalar>, [&](Range columns) {
        tape_.tasks.push_back({Task::output, 0, rows, columns});
      });
    });
  }

  void plan_gradients() const {
    for (Index i = 0; i < static_cast<Index>(tape_.slices.size()); ++i) {
      const Expert& expert = experts_[to_size(tape_.slices[i].expert)];
      if (!is_trained(expert)) continue;
      cut(expert.gradient_rows(), pieces_of(tape_.slices[i].count), gradient_block_rows,
          [&](Range rows) {
            tape_.tasks.push_back({Task::add_gradients, i, rows, {}});
          });
    }
  }

  /// An upper bound of the number of tasks of a group of `rows` rows, see the plan_ functions.
  Index most_tasks(Index rows) const { return 4 * rows + 64 * workers_ + 32; }

  /// All experts have the same shape.
  const Expert& first_expert() const { return experts_.front(); }
  const Expert& expert_of(const Task& task) const {
    return experts_[to_size(tape_.slices[task.block].expert)];
  }
  Expert& expert_of(std::span<Expert> experts, const Task& task) const {
    return experts[to_size(tape_.slices[task.block].expert)];
  }

  // The expert that is computed after a slice or a task, null if that is not known: another worker may
  // get the next task.

  const Expert* expert_after(const Slice& slice) const {
    const bool known = &slice != &tape_.slices.back();
    return known ? &experts_[to_size((&slice + 1)->expert)] : nullptr;
  }
  const Expert* expert_after(const Task& task) const {
    const bool known = workers_ == 1 && &task != &tape_.tasks.back();
    return known ? &expert_of(*(&task + 1)) : nullptr;
  }

  /// The rows of a slice of the group.
  Block block_of(const MatrixRef<Scalar>& x, Index index) const {
    const Slice& slice = tape_.slices[index];
    const Index* token = slots_.token + slice.first;
    const Index stride = tape_.saved_width > 0 ? tape_.saved.cols() : 0;
    return {GatheredRows<Scalar>(x.data(), x.outerStride(), slice.count, x.cols(), token), token,
            slots_.weight + slice.first,
            MatrixView<Scalar>(tape_.saved.data() + slice.first * stride, slice.count,
                               tape_.saved_width, Eigen::OuterStride<>(stride)),
            rows_of(tape_.group, slice.first - tape_.slices.front().first, slice.count)};
  }

  /// Calls f(slice, block) for the slices of the group in the order of the experts, a block being
  /// the rows whose tokens are among `tokens`.
  void for_each_slice_of(const MatrixRef<Scalar>& x, Range tokens,
                         FunctionRef<void(const Slice&, const Block&)> f) const {
    for (Index i = 0; i < static_cast<Index>(tape_.slices.size()); ++i) {
      const Slice& slice = tape_.slices[i];
      const Index* begin = slots_.token + slice.first;
      const Index first = std::lower_bound(begin, begin + slice.count, tokens.first) - begin;
      const Index last =
          std::lower_bound(begin, begin + slice.count, tokens.first + tokens.count) - begin;
      if (first < last) f(slice, block_of(x, i).slice({first, last - first}));
    }
  }

  /// Calls f(network, block) for all rows of the group, if the networks prepare.
  template <class F>
  void prepare([[maybe_unused]] const MatrixRef<Scalar>& x, [[maybe_unused]] F&& f) const {
    if constexpr (PreparedNetwork<typename Expert::Network>) {
      if (!first_expert().network().prepares()) return;
      for (Index i = 0; i < static_cast<Index>(tape_.slices.size()); ++i) {
        const Index count = tape_.slices[i].count;
        cut(count, pieces_of(count), 16, [&](Range rows) {
          tape_.tasks.push_back({Task::prepare, i, rows, {}});
        });
      }
      perform([&](const Task& task, Scratch&) {
        f(expert_of(task).network(), block_of(x, task.block).slice(task.rows));
      });
      tape_.tasks.clear();
    }
  }

  /// Calls f(task, scratch) for every task. Plain networks may use Eigen's own products, so they run in
  /// a parallel region even if there is only one task: outside of one, Eigen would split its products
  /// over threads, and the bits would depend on the number of threads.
  void perform(FunctionRef<void(const Task&, Scratch&)> f) const {
    const auto count = static_cast<Index>(tape_.tasks.size());
    const auto call = [&](Index i, Index worker) {
      if (i < count) f(tape_.tasks[i], tape_.scratch[worker]);
    };
    if constexpr (Expert::fused) {
      const Work work{workers_ > 1 ? row_work_ * group_rows() : 0};
      parallel_for(count, work, call);
    } else {
      parallel_for(std::max<Index>(2, count), call);
    }
  }

  std::span<const Expert> experts_;
  DispatchSlice<Scalar> slots_;
  Tape& tape_;
  Index row_work_ = 0;  ///< multiply-adds that a row takes in a pass
  Index workers_ = 1;   ///< of the pass
};

}  // namespace moe::detail
