#pragma once

#include <algorithm>
#include <vector>

#include "moe/experts/expert.hpp"
#include "moe/function_ref.hpp"
#include "moe/kernels/column_sums.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// The experts' share of a pass: every expert over the rows it got, and their weighted sum.

namespace moe::detail {

/// What the experts keep between forward and backward, and the scratch of their passes.
template <class Expert>
struct ExpertTape {
  using Scalar = typename Expert::Scalar;

  Matrix<Scalar> kept;             ///< S x kept_width or a little more, what the experts keep
  Index kept_width = 0;            ///< Expert::tape_width() after a training pass, else 0
  std::vector<Scalar> row_weight;  ///< S, the weights by row

  /// What the experts that are at work at the moment need, see ExpertPass::for_each_group().
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
  Matrix<Scalar> group;  ///< rows of a group x Expert::scratch_width()
  std::vector<Slice> slices;
  std::vector<Task> tasks;
  std::vector<Scalar> row_dweight;                ///< rows of a group
  std::vector<typename Expert::Scratch> scratch;  ///< one a worker
};

/// A pass of some experts, one or more, over the slots of a routing that group_by_expert() was
/// called on. It refers to all that it is given.
///
/// Experts run in groups, one group after the other: first the first halves of all its slices, then
/// the second halves, which add to the tokens. A group is as many rows as the caches hold between
/// the two halves; within a half the work is split over the workers by slice, rows and columns.
/// Tokens are added to by column, and by row in the order of the experts, so nothing is stored per
/// slot and the bits do not depend on how anything was split.
template <class Expert>
class ExpertPass {
 public:
  using Scalar = typename Expert::Scalar;
  using Tape = ExpertTape<Expert>;

  ExpertPass(const std::vector<Expert>& experts, const Routing<Scalar>& routing, Tape& tape)
      : experts_(experts), routing_(routing), tape_(tape) {
    MOE_ASSERT(static_cast<Index>(experts.size()) == routing.experts);
    // Each of an expert's weights is multiplied once with each of its rows.
    walk_parameters(first_expert(),
                    [&](const ParameterName&, const auto& p) { row_work_ += p.size(); });
    workers_ = Expert::fused ? worker_count(Work{row_work_ * routing.slots()}) : worker_count();
  }

  /// Throws std::invalid_argument where an expert with rows has another width, or another shape than
  /// the first one or than it was made with: somebody put another network or other weights there.
  void check_experts(Index width) const {
    for (Index e = 0; e < routing_.experts; ++e) {
      if (routing_.slots_of(e) == 0) continue;
      const Expert& expert = experts_[to_size(e)];
      const Expert& first = first_expert();
      require(expert.width() == width && expert.tape_width() == first.tape_width() &&
                  expert.scratch_width() == first.scratch_width() &&
                  expert.columns() == first.columns() &&
                  expert.gradient_rows() == first.gradient_rows(),
              "MoELayer: expert ", e, " is not of the layer's width ", width,
              " or has another shape than expert 0");
      check_shapes(expert, "MoELayer: an expert");
    }
  }

  /// sum += Σ over slots G·expert(x), x and sum being T x D. With `keeps`, leaves in the tape what
  /// run_backward() needs.
  void run(const MatrixRef<Scalar>& x, bool keeps, Matrix<Scalar>& sum) const {
    // Without, what an earlier pass kept may be of fewer slots.
    tape_.kept_width = keeps ? first_expert().tape_width() : 0;
    if (keeps) resize(tape_.kept, routing_.slots(), padded_stride<Scalar>(tape_.kept_width));
    if (routing_.slots() == 0) return;
    copy_weights();
    for_each_group([&] {
      plan_runs(true);
      perform([&](const Task& task, Scratch& scratch) {
        expert_of(task).run(block_of(x, task.block).slice(task.rows), task.columns, keeps, scratch,
                            expert_after(task));
      });
      tape_.tasks.clear();
      plan_combines(x.cols());
      perform([&](const Task& task, Scratch&) {
        for_each_slice_of(x, task.rows, [&](const Slice& slice, const Block& block) {
          experts_[to_size(slice.expert)].combine(block, task.columns, view(sum),
                                                  expert_after(slice));
        });
      });
    });
  }

  /// After run() with `keeps` on the same tape: takes dy, the gradient by the sum (T x D); fills
  /// dweight (S), the gradients by the slots' weights, and adds to dx (T x D) and to the gradients
  /// of the experts, which must be those of run().
  void run_backward(std::vector<Expert>& experts, const MatrixRef<Scalar>& x,
                    const MatrixRef<Scalar>& dy, std::vector<Scalar>& dweight,
                    Matrix<Scalar>& dx) const {
    MOE_ASSERT(&experts == &experts_);
    resize(dweight, routing_.slots());
    if (routing_.slots() == 0) return;
    for_each_group([&] {
      if (!Expert::fused) mark_group(experts);
      // A plain network adds to its gradients in the first half, so its rows stay together.
      plan_runs(Expert::fused);
      perform([&](const Task& task, Scratch& scratch) {
        expert_of(experts, task)
            .run_backward(block_of(x, task.block).slice(task.rows), dy, task.columns, scratch);
      });
      tape_.tasks.clear();
      if (Expert::fused) mark_group(experts);
      plan_gradients();
      plan_combines(x.cols());
      perform([&](const Task& task, Scratch&) {
        if (task.kind == Task::add_gradients) {
          expert_of(experts, task)
              .add_gradients(block_of(x, task.block), dy, task.rows,
                             tape_.slices[to_size(task.block)].replaces);
          return;
        }
        for_each_slice_of(x, task.rows, [&](const Slice& slice, const Block& block) {
          experts_[to_size(slice.expert)].combine_backward(block, task.columns, view(dx));
        });
      });
      const Work work = element_work(group_rows() * x.cols());
      parallel_for(static_cast<Index>(tape_.slices.size()), work, [&](Index i, Index) {
        const Slice& slice = tape_.slices[to_size(i)];
        Scalar* row_dweight = tape_.row_dweight.data() + (slice.first - tape_.slices.front().first);
        experts_[to_size(slice.expert)].weight_gradients(block_of(x, i), dy, row_dweight);
        for (Index row = 0; row < slice.count; ++row) {
          dweight[to_size(routing_.row_slot[to_size(slice.first + row)])] = row_dweight[row];
        }
      });
    });
  }

 private:
  using Task = typename Tape::Task;
  using Slice = typename Tape::Slice;
  using Scratch = typename Expert::Scratch;
  using Block = ExpertBlock<Scalar>;

  void copy_weights() const {
    resize(tape_.row_weight, routing_.slots());
    for (Index row = 0; row < routing_.slots(); ++row) {
      tape_.row_weight[to_size(row)] = routing_.weight[to_size(routing_.row_slot[to_size(row)])];
    }
  }

  /// Right before they are added to, so that an exception leaves none that is old and seems new.
  void mark_group(std::vector<Expert>& experts) const {
    for (Slice& slice : tape_.slices) {
      slice.replaces = accumulate(experts[to_size(slice.expert)], Expert::fused);
    }
  }

  /// Calls f() with tape_.slices being those of each group in turn.
  void for_each_group(FunctionRef<void()> f) const {
    // What a worker's rows need between the halves should stay near it. A slice goes in one piece
    // where it can, since every piece reads the expert's weights anew.
    constexpr auto cached = static_cast<Index>((std::size_t{1} << 20) / sizeof(Scalar));
    const Index width = first_expert().scratch_width();
    const Index rows = std::min(routing_.slots(), std::max(task_rows, workers_ * cached / width));
    resize(tape_.group, rows, width);
    resize(tape_.row_dweight, rows);
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
    for (Index e = 0; e < routing_.experts; ++e) {
      const Index start = routing_.expert_offsets[to_size(e)];
      const Index slots = routing_.expert_offsets[to_size(e) + 1] - start;
      const auto add = [&](Index first, Index count) {
        // Slices of one expert never share a group, since both would add to its gradients at once.
        if (first > 0 || filled + count > rows) flush();
        tape_.slices.push_back({e, start + first, count, false});
        filled += count;
      };
      if (slots == 0) continue;
      if constexpr (Expert::fused) {
        // Whole blocks of those rows whose sum is made at once, whatever the number of workers.
        const Index blocks = (slots + summed_rows - 1) / summed_rows;
        for_each_tile(
            blocks, std::max<Index>(1, rows / summed_rows), [&](Index first, Index count) {
              add(first * summed_rows, std::min(count * summed_rows, slots - first * summed_rows));
            });
      } else {
        // A plain network is handed the same rows together on any number of workers.
        const Index most =
            std::max(expert_block_rows, rows / expert_block_rows * expert_block_rows);
        for (Index first = 0; first < slots; first += most) {
          add(first, std::min(most, slots - first));
        }
      }
    }
    flush();
  }

  // Plans append tasks. On one worker a task is as large as can be, since each reads its weights
  // and rows anew; on several there are some for each worker, in proportion to the work in a slice.

  Index group_rows() const {
    return tape_.slices.back().first + tape_.slices.back().count - tape_.slices.front().first;
  }

  /// How many of the pieces that a group is cut into should come from `rows` of its rows.
  Index pieces_of(Index rows) const {
    if (workers_ == 1) return 1;
    return (8 * workers_ * rows + group_rows() - 1) / group_rows();
  }

  /// Cuts [0, count) into at most `pieces` ranges that start at multiples of `unit`, as even as can
  /// be, the larger ones first, so that what is left over at the end of a plan is small.
  static void cut(Index count, Index pieces, Index unit, FunctionRef<void(Range)> f) {
    const Index units = (count + unit - 1) / unit;
    for_each_part(units, std::min(pieces, units), [&](Index first, Index size) {
      f(Range{first * unit, std::min(size * unit, count - first * unit)});
    });
  }

  void plan_runs(bool splits_rows) const {
    for (Index i = 0; i < static_cast<Index>(tape_.slices.size()); ++i) {
      const Index count = tape_.slices[to_size(i)].count;
      const Index columns = first_expert().columns();
      const Index pieces = pieces_of(count);
      const Index panels = (columns + panel_columns<Scalar> - 1) / panel_columns<Scalar>;
      const Index row_pieces = (pieces + panels - 1) / panels;
      // A plain network is handed its rows in the same pieces on any number of workers.
      const Index unit = !splits_rows ? count : Expert::fused ? Index{32} : expert_block_rows;
      cut(count, std::max((count + task_rows - 1) / task_rows, row_pieces), unit, [&](Range rows) {
        cut(columns, (pieces + row_pieces - 1) / row_pieces, panel_columns<Scalar>,
            [&](Range range) {
              tape_.tasks.push_back({Task::run, i, rows, range});
            });
      });
    }
  }

  /// An even piece for each worker: columns while they are a tile wide, then rows too, with which a
  /// few pieces more may come out. They are not cut finer, since each piece of rows reads the
  /// weights anew.
  void plan_combines(Index width) const {
    const Index strips = std::clamp<Index>(width / tile_columns<Scalar>, 1, workers_);
    cut(routing_.tokens(), (workers_ + strips - 1) / strips, 1, [&](Range rows) {
      cut(width, strips, cache_line<Scalar>, [&](Range columns) {
        tape_.tasks.push_back({Task::combine, 0, rows, columns});
      });
    });
  }

  void plan_gradients() const {
    for (Index i = 0; i < static_cast<Index>(tape_.slices.size()); ++i) {
      if (!is_trained(experts_[to_size(tape_.slices[to_size(i)].expert)])) continue;
      cut(first_expert().gradient_rows(), pieces_of(tape_.slices[to_size(i)].count), 64,
          [&](Range rows) {
            tape_.tasks.push_back({Task::add_gradients, i, rows, {}});
          });
    }
  }

  /// At most so many tasks come from a group: each kind makes one of every slice and for rows of
  /// it, and its share of the pieces, rounded up.
  Index most_tasks(Index rows) const { return 4 * rows + 64 * workers_ + 32; }

  /// Which all experts are like.
  const Expert& first_expert() const { return experts_.front(); }
  const Expert& expert_of(const Task& task) const {
    return experts_[to_size(tape_.slices[to_size(task.block)].expert)];
  }
  Expert& expert_of(std::vector<Expert>& experts, const Task& task) const {
    return experts[to_size(tape_.slices[to_size(task.block)].expert)];
  }

  // Whose turn it is after a slice or a task, if that is known: another worker may get the next
  // task.

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
    const Slice& slice = tape_.slices[to_size(index)];
    const Index* token = routing_.row_token.data() + slice.first;
    const Index stride = tape_.kept_width > 0 ? tape_.kept.cols() : 0;
    return {GatheredRows<Scalar>(x.data(), x.outerStride(), slice.count, x.cols(), token), token,
            tape_.row_weight.data() + slice.first,
            MatrixView<Scalar>(tape_.kept.data() + slice.first * stride, slice.count,
                               tape_.kept_width, Eigen::OuterStride<>(stride)),
            rows_of(tape_.group, slice.first - tape_.slices.front().first, slice.count)};
  }

  /// Calls f(slice, block) for the slices of the group in the order of the experts, a block being
  /// the rows whose tokens are among `tokens`.
  void for_each_slice_of(const MatrixRef<Scalar>& x, Range tokens,
                         FunctionRef<void(const Slice&, const Block&)> f) const {
    for (Index i = 0; i < static_cast<Index>(tape_.slices.size()); ++i) {
      const Slice& slice = tape_.slices[to_size(i)];
      const Index* begin = routing_.row_token.data() + slice.first;
      const Index first = std::lower_bound(begin, begin + slice.count, tokens.first) - begin;
      const Index last =
          std::lower_bound(begin, begin + slice.count, tokens.first + tokens.count) - begin;
      if (first < last) f(slice, block_of(x, i).slice({first, last - first}));
    }
  }

  /// Calls f(task, scratch) for every task. In a parallel region even if there is one task only
  /// where a network may use Eigen's own products: outside of one, Eigen would split them over
  /// threads, with other bits for each number.
  void perform(FunctionRef<void(const Task&, Scratch&)> f) const {
    const auto count = static_cast<Index>(tape_.tasks.size());
    const auto call = [&](Index i, Index worker) {
      if (i < count) f(tape_.tasks[to_size(i)], tape_.scratch[to_size(worker)]);
    };
    if constexpr (Expert::fused) {
      const Work work{workers_ > 1 ? row_work_ * group_rows() : 0};
      parallel_for(count, work, call);
    } else {
      parallel_for(std::max<Index>(2, count), call);
    }
  }

  const std::vector<Expert>& experts_;
  const Routing<Scalar>& routing_;
  Tape& tape_;
  Index row_work_ = 0;  ///< multiply-adds that a row takes in a pass
  Index workers_ = 1;   ///< of the pass
};

}  // namespace moe::detail
