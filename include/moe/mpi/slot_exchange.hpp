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
/// The slots whose experts are on another rank: their counts, the rows sent to the experts, and the
/// answers (rows of y or dx) sent back.

namespace moe::mpi {

/// What a pass of a layer over ranks needs besides the rest of the layer's tape.
template <class Expert>
struct RankTape {
  using Scalar = typename Expert::Scalar;  ///< float or double

  RankBatch batch;          ///< the rows and tokens of each rank
  std::uint64_t step = 0;   ///< of the pass
  std::int64_t number = 0;  ///< of the pass, among those of the communicator

  // L slots leave this rank; they are in the order of the dispatch. N slots come to it; they are sorted by
  // rank, those of a rank by expert, and those of an expert by token.
  IndexedVector<Index> sent;         ///< R + 1, offsets of each rank's slots among the L
  IndexedVector<Index> received;     ///< R + 1, offsets of each rank's slots among the N
  IndexedVector<Index> sent_counts;  ///< E + R, for each rank its experts' slots here, then a flag
  IndexedVector<Index>
      received_counts;      ///< R x (experts of this rank + 1), the same from each rank
  Matrix<Scalar> returned;  ///< L x D, the rows that leave, then their y or dx

  // The slots of other ranks' tokens. Each has a row of its own.
  Routing<Scalar> others;                          ///< N rows of one slot
  Dispatch<Scalar> others_dispatch;                ///< by expert
  moe::detail::ExpertTape<Expert> others_experts;  ///< of the experts of this rank
  Matrix<Scalar> received_x;                       ///< N x D
  Matrix<Scalar> received_dy;                      ///< N x D
  Matrix<Scalar> answer;                           ///< N x D, y or dx of the rows that came
  IndexedVector<Scalar> sorted_dweight;            ///< N, by expert
  IndexedVector<Scalar> dweight;                   ///< N

  std::vector<Index> failed_here;   ///< R equal flags: whether this rank's experts failed
  std::vector<Index> failed_there;  ///< R flags: whether the experts of each rank failed
  GradientSum gate_gradients;       ///< for the sum over the ranks
};

/// The exchanges of a pass: rows of tokens are sent to the ranks of their experts, and answers are sent
/// back. `dispatch` is that of this rank's tokens.
template <class Expert>
class SlotExchange {
 public:
  using Scalar = typename Expert::Scalar;  ///< float or double

  /// Refers to its arguments, which must outlive it.
  SlotExchange(const Communicator& communicator, const Placement& placement,
               Dispatch<Scalar>& dispatch, RankTape<Expert>& tape)
      : communicator_(communicator), placement_(placement), dispatch_(dispatch), tape_(tape) {}

  // Local functions, which make room.

  /// Makes room for the counts, before the gate routes, so that a rank that fails there can tell the
  /// others.
  void prepare_counts() const {
    const Index ranks = communicator_.size();
    moe::detail::resize(tape_.sent, ranks + 1);
    moe::detail::resize(tape_.received, ranks + 1);
    moe::detail::resize(tape_.sent_counts, placement_.experts() + ranks);
    moe::detail::resize(tape_.received_counts, ranks * received_of_rank());
    communicator_.make_room_for_exchange(tape_.sent_counts.size() + tape_.received_counts.size());
  }
  /// Sets sent_counts and sent: the slots that leave for each rank, and whether this rank failed.
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

  /// Whether a rank failed, from received_counts.
  bool has_any_failed() const {
    bool has_failed = false;
    for (int r = 0; r < communicator_.size(); ++r) {
      has_failed = has_failed || tape_.received_counts[(r + 1) * received_of_rank() - 1] != 0;
    }
    return has_failed;
  }

  /// Makes the dispatch of the slots that come, from received_counts, and room for their rows. Each counts
  /// as a token with one slot.
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
  /// Makes room for the gradients of the slots that came.
  void prepare_backward(Index width) const {
    moe::detail::resize(tape_.received_dy, tape_.received.back(), width);
    moe::detail::resize(tape_.sorted_dweight, tape_.received.back());
    moe::detail::resize(tape_.dweight, tape_.received.back());
    prepare_answers(width);
  }

  // Functions that start messages. They cannot fail on one rank alone.

  /// Sends the rows of a T x D matrix that leave, and receives rows. The sent rows are packed into the
  /// buffer that later receives the answers. An MPI datatype that lists the rows would make packing
  /// unnecessary, but was 2 to 6 times slower, since MPI then neither copies directly between processes
  /// nor lets a network read the memory.
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
  /// Sends the weights of the slots that leave, and receives those of the slots that come in
  /// tape.others.weight.
  void send_weights(RowExchange& exchange) const {
    communicator_.for_each_other_rank([&](int r) {
      exchange.receive(tape_.others.weight, tape_.received[r], came_from(r), r);
      exchange.send(dispatch_.weight, first_slot(r), leave_for(r), r);
    });
  }
  /// Sends the answers back. Every rank also tells every other whether its experts failed, so that
  /// no agree() is needed: the answers of a rank that failed are undefined.
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
  /// Sends tape.dweight back, to dweight (S, in the order of the dispatch).
  void return_dweight(IndexedVector<Scalar>& dweight, RowExchange& exchange) const {
    communicator_.for_each_other_rank([&](int r) {
      exchange.receive(dweight, first_slot(r), leave_for(r), r);
      exchange.send(tape_.dweight, tape_.received[r], came_from(r), r);
    });
  }

  /// Waits for the answers. Throws Error on all ranks if the experts of one rank failed.
  void finish(const char* call, const std::exception_ptr& failure, RowExchange& exchange) const {
    exchange.wait();
    const bool all_well = std::all_of(tape_.failed_there.begin(), tape_.failed_there.end(),
                                      [](Index failed) { return failed == 0; });
    if (!all_well || failure != nullptr) communicator_.agree(call, {}, failure);
  }
  /// to.row(token) += the answers of the token's slots, in the order of their experts.
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
  /// The number of values of each rank in received_counts.
  Index received_of_rank() const { return placement_.count(communicator_.rank()) + 1; }

  void prepare_answers(Index width) const {
    moe::detail::resize(tape_.returned, tape_.sent.back(), width);
    moe::detail::resize_to_zero(tape_.answer, tape_.received.back(), width);
    tape_.failed_here.assign(moe::detail::to_size(communicator_.size()), 0);
    tape_.failed_there.assign(moe::detail::to_size(communicator_.size()), 0);
  }

  /// The position in the dispatch of the first slot of a rank's experts.
  Index first_slot(int rank) const { return dispatch_.offsets[placement_.first(rank)]; }
  /// The position in the dispatch of slot i of those that leave.
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
