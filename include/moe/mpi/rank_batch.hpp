#pragma once

#include <exception>
#include <span>
#include <stdexcept>

#include "moe/indexed_vector.hpp"
#include "moe/mpi/communicator.hpp"
#include "moe/routing/shared_batch.hpp"

/// \file
/// The batch that the ranks share, see SharedBatch.

namespace moe::mpi {

/// The number of rows of every rank, and of tokens among them.
struct RankBatch {
  IndexedVector<Index> rank_rows;    ///< R
  IndexedVector<Index> rank_tokens;  ///< R
  Index rows = 0;                    ///< of all ranks
  Index first_row = 0;               ///< this rank's first row among them
  Index tokens = 0;                  ///< rows of all ranks that are not padding
  Index first_token = 0;             ///< this rank's first token among them

  detail::SharedCalls calls{};  ///< the gate's calls of the batch; none if it does not name them
  std::size_t called = 0;       ///< the number of these calls that were made

  /// Whether the gate named its calls.
  bool names_calls() const { return calls[0].kind != detail::SharedCall::none; }
  /// The call in which the other ranks are, or which they make next, if this rank failed.
  detail::SharedCall next_call() const {
    return called < calls.size() ? calls[called] : detail::SharedCall{};
  }

  /// Makes room for `ranks` ranks.
  void resize(int ranks) {
    detail::resize(rank_rows, ranks);
    detail::resize(rank_tokens, ranks);
  }
  /// Sets all counts. `numbers` are the rows and the tokens of each rank, 2·R.
  void set(std::span<const Index> numbers, int rank) {
    rows = first_row = tokens = first_token = 0;
    for (std::size_t r = 0; r < rank_rows.size(); ++r) {
      if (static_cast<int>(r) == rank) {
        first_row = rows;
        first_token = tokens;
      }
      rows += rank_rows[r] = numbers[2 * r];
      tokens += rank_tokens[r] = numbers[2 * r + 1];
    }
  }
};

/// The name of the call in agree() after routing.
inline constexpr const char* gate_call = "the gate";

/// Takes part in the next of the calls that the gate named, to say that this rank failed, and throws the
/// Error that all ranks throw. Returns if the gate has made all its calls.
inline void fail_in_next_call(const Communicator& communicator, const RankBatch& batch,
                              const std::exception_ptr& failure) {
  const detail::SharedCall call = batch.next_call();
  const std::size_t numbers = detail::to_size(call.numbers);
  switch (call.kind) {
    case detail::SharedCall::none:
      return;
    case detail::SharedCall::sum_of_counts:
      communicator.fail_in_sum<Index>(numbers);
      break;
    case detail::SharedCall::sum_of_figures:
      communicator.fail_in_sum<double>(numbers);
      break;
    case detail::SharedCall::sum_and_prefix:
      communicator.fail_in_sum_and_prefix(numbers);
      break;
  }
  communicator.agree(gate_call, {}, failure);
}
/// Makes room for a call, and for failing in it.
inline void make_room(const Communicator& communicator, const detail::SharedCall& call) {
  const std::size_t numbers = detail::to_size(call.numbers);
  if (call.kind == detail::SharedCall::none) return;
  if (call.kind == detail::SharedCall::sum_of_figures) {
    communicator.make_room_to_fail<double>(numbers);
  } else {
    communicator.make_room_to_fail<Index>(numbers);
  }
}

/// A SharedBatch over the ranks of a communicator.
class SharedOverRanks final : public SharedBatch {
 public:
  /// Refers to both arguments, which must outlive it.
  SharedOverRanks(const Communicator& communicator, RankBatch& batch)
      : communicator_(communicator), batch_(batch) {}

  Index processes() const override { return communicator_.size(); }
  Index process() const override { return communicator_.rank(); }

  Index rows() const override { return batch_.rows; }
  Index first_row() const override { return batch_.first_row; }
  Index tokens() const override { return batch_.tokens; }
  Index first_token() const override { return batch_.first_token; }
  void sum(std::span<float> numbers) const override { communicator_.sum(numbers); }
  /// The same for doubles; see SharedBatch.
  void sum(std::span<double> numbers) const override {
    sum_as(detail::SharedCall::sum_of_figures, numbers);
  }
  /// The same for whole numbers; see SharedBatch.
  void sum(std::span<Index> numbers) const override {
    sum_as(detail::SharedCall::sum_of_counts, numbers);
  }
  void prefix(std::span<Index> numbers) const override { communicator_.prefix(numbers); }
  void sum_and_prefix(std::span<Index> numbers, std::span<Index> sums) const override {
    if (!is_named(detail::SharedCall::sum_and_prefix, numbers.size())) {
      return SharedBatch::sum_and_prefix(numbers, sums);
    }
    throw_if(communicator_.sum_and_prefix_or_fail(numbers, sums));
  }
  void gather_agreed(std::span<Index> numbers) const override {
    communicator_.gather_agreed(numbers);
  }
  void make_room_to_gather(Index numbers) const override {
    communicator_.make_room_to_gather(moe::detail::to_size(numbers));
  }
  /// See SharedBatch.
  void prefix_agreed(std::span<Index> numbers) const override {
    communicator_.prefix_agreed(numbers);
  }

 private:
  template <class Number>
  void sum_as(detail::SharedCall::Kind kind, std::span<Number> numbers) const {
    if (!is_named(kind, numbers.size())) return communicator_.sum(numbers);
    throw_if(communicator_.sum_or_fail(numbers));
  }

  /// Whether the gate names its calls. If it does, this call must be the next one.
  bool is_named(detail::SharedCall::Kind kind, std::size_t numbers) const {
    if (!batch_.names_calls()) return false;
    const detail::SharedCall call{kind, static_cast<Index>(numbers)};
    if (batch_.next_call() != call)
      throw std::logic_error("moe: a gate makes a call that its shared_calls() does not list");
    ++batch_.called;
    return true;
  }
  void throw_if(bool failed) const {
    if (failed) communicator_.agree(gate_call);
  }

  const Communicator& communicator_;
  RankBatch& batch_;
};

}  // namespace moe::mpi
