#pragma once

#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/mpi/agreed_calls.hpp"
#include "moe/mpi/agreement.hpp"
#include "moe/mpi/channel.hpp"

/// \file
/// Communication between the ranks of a program, in which no rank waits for one that failed.

namespace moe::mpi {

/// A group of processes that train together. A copy refers to the same group.
///
/// Calls are collective unless stated otherwise: all ranks make the same calls in the same order. Each
/// begins with agree(), in which a rank that failed takes part too, to tell the others; so no rank waits
/// in a call that another will never make. Only one thread of a process at a time may use it.
///
/// If a rank stopped, the others wait for it until `timeout`. Then they throw std::runtime_error, and so
/// does every later call, at once. The communicator cannot be used any more and the results of the call
/// are undefined: the program can only end. The buffers of the call are not freed, since MPI may still
/// use them, and MPI_Finalize() ends the processes of all ranks (MPI_Abort()) instead of waiting for
/// ever.
class Communicator : public AgreedCalls {
 public:
  /// The ranks of `communicator`, which is duplicated, so that messages of others do not interfere.
  /// `timeout`, in seconds, must be longer than any rank computes between two calls; 0 is no timeout.
  /// Throws std::invalid_argument for a timeout below 0, std::logic_error before MPI is started
  /// (Environment), and std::runtime_error after the timeout. Collective.
  explicit Communicator(MPI_Comm communicator = MPI_COMM_WORLD, double timeout = 600)
      : AgreedCalls(open(communicator, timeout)),
        shared_(std::make_shared<Shared>(Agreement(shared_channel(), rank(), size()))) {}

  // Moving copies, so that an object that was moved from can still take part in a call to report an error.
  /// Refers to the same ranks.
  Communicator(const Communicator&) = default;
  /// Refers to the same ranks.
  Communicator& operator=(const Communicator&) = default;

  /// 1, 2, 3, ... in successive calls, the same on all ranks if all call it equally often. Local.
  std::int64_t next_number() const { return ++shared_->numbers; }

  /// Calls f(rank) for each other rank. Every rank begins with the next one, so that they do not all send
  /// to rank 0 first. Local.
  template <class F>
  void for_each_other_rank(F&& f) const {
    for (int i = 1; i < size(); ++i) f((rank() + i) % size());
  }

  /// Returns when all ranks made the same call with the same facts and none failed. Otherwise
  /// throws Error on all ranks, with the first 64 KiB of the message of a rank that failed, or with
  /// two ranks that disagree and the fact in which they do. At most 7 facts; the texts of `call`
  /// and of the facts' names must never be freed.
  void agree(const char* call, std::initializer_list<Fact> facts = {},
             const std::exception_ptr& failure = nullptr) const {
    agree_and_gather(call, facts, {}, failure);
  }

  /// agree() that also returns numbers of every rank: 2 of each, those of rank 0 first. `numbers` are at
  /// most 2, each of them at least 0. The result is valid until the next call.
  std::span<const Index> agree_and_gather(const char* call, std::initializer_list<Fact> facts,
                                          std::initializer_list<Index> numbers,
                                          const std::exception_ptr& failure = nullptr) const {
    return shared_->agreement.gather(call, facts, numbers, failure);
  }

  /// Calls f() and then agree(): an exception of f() on one rank is thrown on all, as an Error.
  template <class F>
  void attempt(const char* call, std::initializer_list<Fact> facts, F&& f) const {
    attempt_gather(call, facts, {}, std::forward<F>(f));
  }
  /// The same with agree_and_gather().
  template <class F>
  std::span<const Index> attempt_gather(const char* call, std::initializer_list<Fact> facts,
                                        std::initializer_list<Index> numbers, F&& f) const {
    return agree_and_gather(call, facts, numbers, failure_of(std::forward<F>(f)));
  }
  /// The same without facts.
  template <class F>
  void attempt(const char* call, F&& f) const {
    attempt(call, {}, std::forward<F>(f));
  }

  /// Calls f() and returns its exception, for agree(), or null. It rethrows exceptions that need
  /// not or cannot be reported: an Error, which all ranks throw, and any after a time-out. Local.
  template <class F>
  std::exception_ptr failure_of(F&& f) const {
    const std::int64_t errors = shared_->agreement.errors();
    try {
      f();
    } catch (...) {
      if (shared_->agreement.errors() > errors || !channel().is_usable()) throw;
      return std::current_exception();
    }
    return nullptr;
  }

  /// Replaces each number by its sum over the ranks, with the same bits on all of them.
  template <class Number>
  void sum(std::span<Number> numbers) const {
    attempt("sum", {{"the count of the numbers", static_cast<std::int64_t>(numbers.size())}},
            [&] { room_for_sum<Number>(numbers.size()); });
    sum_agreed(numbers);
  }

  /// Replaces each number by its sum over the ranks before this one, 0 on rank 0.
  void prefix(std::span<Index> numbers) const {
    attempt("prefix", {{"the count of the numbers", static_cast<std::int64_t>(numbers.size())}},
            [&] { room_for<Index>(numbers.size()); });
    prefix_agreed(numbers);
  }

  /// Sets `all` to the numbers of all ranks, those of rank 0 first; rank r has counts[r] of them.
  template <class Number>
  void gather(std::span<const Number> numbers, std::span<const Index> counts,
              std::span<Number> all) const {
    MOE_ASSERT(static_cast<Index>(numbers.size()) == counts[detail::to_size(rank())]);
    Blocks blocks;
    attempt("gather", {{"the count of all numbers", static_cast<std::int64_t>(all.size())}}, [&] {
      blocks.resize(size());
      room_for<Number>(all.size());
    });
    // The numbers of each rank are gathered in pieces, as many numbers at a time as there is room
    // for.
    auto* const room = room_for<Number>(all.size());
    const Index most = std::max<Index>(1, static_cast<Index>(most_numbers<Number>()) / size());
    const Index longest = *std::max_element(counts.begin(), counts.end());
    for (Index first = 0; first < longest; first += most) {
      const auto part = [&](Index count) { return std::clamp<Index>(count - first, 0, most); };
      blocks.assign(counts, part);
      const int own = blocks.counts[detail::to_size(rank())];
      if (own > 0) {
        std::copy_n(numbers.data() + first, own, room + blocks.offsets[detail::to_size(rank())]);
      }
      channel().complete("gather", [&](MPI_Request* request) {
        MPI_Iallgatherv(MPI_IN_PLACE, 0, type_of<Number>(), room, blocks.counts.data(),
                        blocks.offsets.data(), type_of<Number>(), handle(), request);
      });
      const Number* from = room;
      Number* of_rank = all.data();
      for (const Index count : counts) {
        if (part(count) > 0) std::copy_n(from, part(count), of_rank + first);
        from += part(count);
        of_rank += count;
      }
    }
  }

  /// The numbers that the ranks passed, by rank.
  std::vector<Index> gather(Index number) const {
    std::vector<Index> all(detail::to_size(size()));
    const std::vector<Index> ones(detail::to_size(size()), 1);
    gather(std::span<const Index>(&number, 1), std::span<const Index>(ones), std::span<Index>(all));
    return all;
  }

  /// Sends numbers to each rank and receives numbers from each. `sent` and `received` are their counts by
  /// rank; the numbers are in the order of the ranks. For few numbers, such as counts; rows are
  /// sent with RowExchange.
  void exchange(std::span<const Index> numbers, std::span<const Index> sent,
                std::span<Index> received_numbers, std::span<const Index> received) const {
    attempt("exchange", [&] { make_room_for_exchange(numbers.size() + received_numbers.size()); });
    exchange_agreed(numbers, sent, received_numbers, received);
  }

  /// Sets the numbers to those of rank `root`, which must be from 0 to size() - 1 and the same on all
  /// ranks: otherwise throws Error on all of them, with nothing changed.
  template <class Number>
  void broadcast(std::span<Number> numbers, int root) const {
    attempt(
        "broadcast",
        {{"root", root}, {"the count of the numbers", static_cast<std::int64_t>(numbers.size())}},
        [&] {
          detail::require(root >= 0 && root < size(), "broadcast: root = ", root,
                          ", must be one of ", size(), " ranks");
          room_for<Number>(numbers.size());
        });
    auto* const room = room_for<Number>(numbers.size());
    for_each_piece<Number>(numbers.size(), [&](std::size_t first, int count) {
      if (rank() == root) std::copy_n(numbers.data() + first, count, room);
      broadcast_room(room, count, root, "broadcast");
      if (rank() != root) std::copy_n(room, count, numbers.data() + first);
    });
  }

 private:
  struct Shared {
    explicit Shared(Agreement on_calls) : agreement(std::move(on_calls)) {}
    Agreement agreement;
    std::int64_t numbers = 0;
  };

  static AgreedCalls open(MPI_Comm communicator, double timeout) {
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (initialized == 0) {
      throw std::logic_error("moe: Communicator before MPI is started, see mpi::Environment");
    }
    detail::require(timeout >= 0, "Communicator: timeout = ", timeout, ", must be at least 0");
    int rank = 0;
    int size = 1;
    MPI_Comm_rank(communicator, &rank);
    MPI_Comm_size(communicator, &size);
    return {Channel::open(communicator, timeout, Agreement::room_bytes(size)), rank, size};
  }

  std::shared_ptr<Shared> shared_;
};

}  // namespace moe::mpi
