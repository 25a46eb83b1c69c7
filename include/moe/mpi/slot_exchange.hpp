#pragma once

#include <algorithm>
#include <exception>
#include <numeric>
#include <span>
#include <vector>

#include "moe/layer/expert_pass.hpp"
#include "moe/mpi/communicator.hpp"
#include "moe/mpi/gradients.hpp"
#include "moe/mpi/placement.hpp"
#include "moe/mpi/rank_batch.hpp"
#include "moe/mpi/row_exchange.hpp"
#include "moe/routing/dispatch.hpp"

/// \file
/// The slots that leave their rank: how many there are, their way to the experts, and the answers' way
/// back.

namespace moe::mpi {

/// What a pass of a layer over ranks needs beside the layer's own tape.
template <class Expert>
struct RankTape {
  using Scalar = typename Expert::Scalar;

  RankBatch batch;          ///< how many rows and tokens each rank has
  std::uint64_t step = 0;   ///< of the pass
  std::int64_t number = 0;  ///< numbers the passes of a communicator

  // A rank's slots that leave it, L of them, are in the order of the dispatch; those that come to
  // it, N of them, are numbered by rank, and by expert and token in each.
  IndexedVector<Index> sent;         ///< R + 1, which of the L go to which rank
  IndexedVector<Index> received;     ///< R + 1, which of the N come from which rank
  IndexedVector<Index> sent_counts;  ///< E + R, slots of this rank for each rank's experts, a flag
  IndexedVector<Index>
      received_counts;      ///< R x (experts of this rank + 1), the same from each rank
  Matrix<Scalar> returned;  ///< L x D, what leaves, then its y or dx

  // Of the slots of other ranks' tokens, each a row of its own.
  Routing<Scalar> others;
  Dispatch<Scalar> others_dispatch;
  moe::detail::ExpertTape<Expert> others_experts;
  Matrix<Scalar> received_x;             ///< N x D
  Matrix<Scalar> received_dy;            ///< N x D
  Matrix<Scalar> answer;                 ///< N x D, y or dx of what came
  IndexedVector<Scalar> sorted_dweight;  ///< N, by expert
  IndexedVector<Scalar> dweight;         ///< N

  std::vector<Index> failed_here;   ///< R times whether this rank's experts failed
  std::vector<Index> failed_there;  ///< R, whether those of each rank did
  GradientSum gate_gradients;
};

/// Both ways of a pass: rows of tokens go to where their experts are, answers come back. It refers to
/// all that it is given, the dispatch being that of this rank's tokens.
template <class Expert>
class SlotExchange {
 public:
  using Scalar = typename Expert::Scalar;

  SlotExchange(const Communicator& communicator, const Placement& placement,
               Dispatch<Scalar>& dispatch, RankTape<Expert>& tape)
      : communicator_(communicator), placement_(placement), dispatch_(dispatch), tape_(tape) {}

  // These are local, and make room.

  /// Before the gate routes, so that a rank that fails there can tell the others.
  void prepare_counts() const {
    const Index ranks = communicator_.size();
    moe::detail::resize(tape_.sent, ranks + 1);
    moe::detail::resize(tape_.received, ranks + 1);
    moe::detail::resize(tape_.sent_counts, placement_.experts() + ranks);
    moe::detail::resize(tape_.received_counts, ranks * received_of_rank());
    communicator_.make_room_for_exchange(tape_.sent_counts.size() + tape_.received_counts.size());
  }
  /// How many slots leave for each rank, from the dispatch, and whether this rank failed.
  void count_sent(bool has_failed) const {
    std::fill(tape_.sent_counts.begin(), tape_.sent_counts.end(), Index{0});
    tape_.sent[0] = 0;
    for (int r = 0; r < communicator_.size(); ++r) {
      const Index first = placement_.first(r);
      tape_.sent_counts[first + placement_.count(r) + r] = has_failed ? 1 : 0;
      if (has_failed) continue;
      for (Index e = first; e < first + placement_.count(r); ++e) {
        tape_.sent_counts[e + r] = dispatch_.slots_of(e);
      }
      const Index slots = r == communicator_.rank() ? 0 : first_slot(r + 1) - first_slot(r);
      tape_.sent[r + 1] = tape_.sent[r] + slots;
    }
  }

  /// From received_counts, whether a rank failed.
  bool has_any_failed() const {
    bool has_failed = false;
    for (int r = 0; r < communicator_.size(); ++r) {
      has_failed = has_failed || tape_.received_counts[(r + 1) * received_of_rank() - 1] != 0;
    }
    return has_failed;
  }

  /// From received_counts, the dispatch of what comes, a token of one slot for each row, and room for
  /// it.
  void prepare_forward(Index width) const {
    const Index here = placement_.count(communicator_.rank());
    auto& others = tape_.others;
    others.experts = here;
    others.expert.clear();
    tape_.received[0] = 0;
    for (int r = 0; r < communicator_.size(); ++r) {
      for (Index e = 0; e < here && r != communicator_.rank(); ++e) {
        others.expert.insert(
            others.expert.end(),
            moe::detail::to_size(tape_.received_counts[r * received_of_rank() + e]), e);
      }
      tape_.received[r + 1] = others.slots();
    }
    moe::detail::resize(others.weight, others.slots());
    moe::detail::resize(others.token_offsets, others.slots() + 1);
    std::iota(others.token_offsets.begin(), others.token_offsets.end(), Index{0});
    sort_by_expert(others, tape_.others_dispatch);
    moe::detail::resize(tape_.received_x, others.slots(), width);
    prepare_answers(width);
  }
  void prepare_backward(Index width) const {
    moe::detail::resize(tape_.received_dy, tape_.received.back(), width);
    moe::detail::resize(tape_.sorted_dweight, tape_.received.back());
    moe::detail::resize(tape_.dweight, tape_.received.back());
    prepare_answers(width);
  }

  // These start messages, which nothing can keep from being sent on this rank alone.

  /// Rows are packed into what the answers will come to later. An MPI datatype that lists them
  /// would spare that, but was 2 to 6 times slower, since MPI then neither copies from process to
  /// process nor lets a network read the memory.
  void send_tokens(const MatrixRef<Scalar>& matrix, Matrix<Scalar>& received,
                   RowExchange& exchange) const {
    auto& packed = tape_.returned;
    parallel_for_blocks(packed.rows(), 64, element_work(packed.size()),
                        [&](Index first, Index count) {
                          for (Index i = first; i < first + count; ++i) {
                            const Index token = dispatch_.token[position_of(i)];
                            std::copy_n(moe::detail::row_data(matrix, token), matrix.cols(),
                                        moe::detail::row_data(packed, i));
                          }
                        });
    communicator_.for_each_other_rank([&](int r) {
      exchange.receive(received, tape_.received[r], came_from(r), r);
      exchange.send(packed, tape_.sent[r], leave_for(r), r);
    });
  }
  /// To tape.others.weight.
  void send_weights(RowExchange& exchange) const {
    communicator_.for_each_other_rank([&](int r) {
      exchange.receive(tape_.others.weight, tape_.received[r], came_from(r), r);
      exchange.send(dispatch_.weight, first_slot(r), leave_for(r), r);
    });
  }
  /// Every rank tells every other whether its experts failed, so that none has to ask: the answers of
  /// one that did are anything.
  void return_answers(const std::exception_ptr& failure, RowExchange& exchange) const {
    const Index failed = failure != nullptr ? 1 : 0;
    std::fill(tape_.failed_here.begin(), tape_.failed_here.end(), failed);
    communicator_.for_each_other_rank([&](int r) {
      exchange.receive(tape_.failed_there, r, 1, r);
      exchange.send(tape_.failed_here, r, 1, r);
      exchange.receive(tape_.returned, tape_.sent[r], leave_for(r), r);
      exchange.send(tape_.answer, tape_.received[r], came_from(r), r);
    });
  }
  /// From tape.dweight to dweight (S, in the order of the dispatch).
  void return_dweight(IndexedVector<Scalar>& dweight, RowExchange& exchange) const {
    communicator_.for_each_other_rank([&](int r) {
      exchange.receive(dweight, first_slot(r), leave_for(r), r);
      exchange.send(tape_.dweight, tape_.received[r], came_from(r), r);
    });
  }

  /// Waits for the answers. Throws Error on all ranks if the experts of one failed.
  void finish(const char* call, const std::exception_ptr& failure, RowExchange& exchange) const {
    exchange.wait();
    const bool all_well = std::all_of(tape_.failed_there.begin(), tape_.failed_there.end(),
                                      [](Index failed) { return failed == 0; });
    if (!all_well || failure != nullptr) communicator_.agree(call, {}, failure);
  }
  /// to.row(token) += the answers of its slots, in the order of their experts.
  void add_answers(Matrix<Scalar>& to) const {
    parallel_for_blocks(
        to.cols(), 64, element_work(tape_.returned.size()), [&](Index first, Index count) {
          for (Index i = 0; i < tape_.returned.rows(); ++i) {
            const Index token = dispatch_.token[position_of(i)];
            moe::detail::add_scaled(count, Scalar{1},
                                    moe::detail::row_data(tape_.returned, i) + first,
                                    moe::detail::row_data(to, token) + first);
          }
        });
  }

 private:
  /// Numbers of each rank in received_counts.
  Index received_of_rank() const { return placement_.count(communicator_.rank()) + 1; }

  void prepare_answers(Index width) const {
    moe::detail::resize(tape_.returned, tape_.sent.back(), width);
    moe::detail::resize_to_zero(tape_.answer, tape_.received.back(), width);
    tape_.failed_here.assign(moe::detail::to_size(communicator_.size()), 0);
    tape_.failed_there.assign(moe::detail::to_size(communicator_.size()), 0);
  }

  /// The position in the dispatch of the first slot of a rank's experts.
  Index first_slot(int rank) const { return dispatch_.offsets[placement_.first(rank)]; }
  /// That of row i of those that leave.
  Index position_of(Index i) const {
    const Index own = first_slot(communicator_.rank());
    return i < own ? i : i + first_slot(communicator_.rank() + 1) - own;
  }
  Index leave_for(int rank) const { return tape_.sent[rank + 1] - tape_.sent[rank]; }
  Index came_from(int rank) const { return tape_.received[rank + 1] - tape_.received[rank]; }

  const Communicator& communicator_;
  const Placement& placement_;
  Dispatch<Scalar>& dispatch_;
  RankTape<Expert>& tape_;
};

}  // namespace moe::mpi
