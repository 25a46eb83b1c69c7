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
/// What the ranks of a program say to each other, such that none of them waits for one that failed.

namespace moe::mpi {

/// Some processes that train together. A copy refers to the same ones.
///
/// Calls that do not say otherwise are collective: all ranks make the same ones in the same order.
/// Each begins with agree(), in which a rank that failed still takes part, to say so; so none is
/// left waiting in a call that another will never make. Of the threads of a process only one at a
/// time may use it.
///
/// A rank that stopped is waited for as long as `timeout` says, wherever it stopped. Then whoever
/// waits throws std::runtime_error, as does every later call, at once: the communicator is of no
/// more use, what the call was to fill holds anything, and all that is left is to end the program.
/// What the call sends and receives stays allocated, since MPI may still use it, and MPI_Finalize()
/// ends the processes of all ranks (MPI_Abort()) instead of waiting for ever.
class Communicator : public AgreedCalls {
 public:
  /// The ranks of `communicator`, which is duplicated, so messages of others do not get in the way.
  /// `timeout` is in seconds and no less than any other rank is late by, at work of its own; 0
  /// stands for ever. Throws std::invalid_argument for one below 0, std::logic_error before MPI is
  /// started (Environment), and std::runtime_error after the timeout. Collective.
  explicit Communicator(MPI_Comm communicator = MPI_COMM_WORLD, double timeout = 600)
      : AgreedCalls(open(communicator, timeout)),
        shared_(std::make_shared<Shared>(Agreement(shared_channel(), rank(), size()))) {}

  // Moving copies, so that what was moved from can still tell the other ranks that it is of no use.
  Communicator(const Communicator&) = default;
  Communicator& operator=(const Communicator&) = default;

  // These are local, not collective.

  /// 1, 2, ...: the same on all ranks if it is asked for after the same calls.
  std::int64_t next_number() const { return ++shared_->numbers; }

  /// Calls f(rank) for each other rank. Every rank begins with its neighbour, so that not all of them
  /// send to rank 0 first. Local.
  template <class F>
  void for_each_other_rank(F&& f) const {
    for (int i = 1; i < size(); ++i) f((rank() + i) % size());
  }

  /// Returns when all ranks made the same call with the same facts and none failed, else throws
  /// Error on all: what a rank says that failed (its first 64 KiB), or who disagrees on what. At
  /// most 6 facts; `call` and the names are text that lives on.
  void agree(const char* call, std::initializer_list<Fact> facts = {},
             std::exception_ptr failure = nullptr) const {
    agree_and_gather(call, facts, {}, failure);
  }

  /// The same, and returns the numbers, at least 0 and at most 2, of every rank, those of rank 0 first:
  /// 2 of each. Valid until the next call.
  std::span<const Index> agree_and_gather(const char* call, std::initializer_list<Fact> facts,
                                          std::initializer_list<Index> numbers,
                                          std::exception_ptr failure = nullptr) const {
    return shared_->agreement.gather(call, facts, numbers, failure);
  }

  /// Calls f() and then agree(): what it throws on one rank, all throw as an Error.
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
  template <class F>
  void attempt(const char* call, F&& f) const {
    attempt(call, {}, std::forward<F>(f));
  }

  /// Calls f() and returns what it throws, of which the others are to be told, or null. What all
  /// ranks throw already, or no rank can be told any more, it throws. Local.
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

  /// The numbers of all ranks one behind the other; rank r has counts[r] of them.
  template <class Number>
  void gather(std::span<const Number> numbers, std::span<const Index> counts,
              std::span<Number> all) const {
    MOE_ASSERT(static_cast<Index>(numbers.size()) == counts[detail::to_size(rank())]);
    Blocks blocks;
    attempt("gather", {{"the count of all numbers", static_cast<std::int64_t>(all.size())}}, [&] {
      blocks.resize(size());
      room_for<Number>(all.size());
    });
    // As many numbers of each rank at a time as there is room for.
    Number* const room = room_for<Number>(all.size());
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

  /// One number of each rank.
  std::vector<Index> gather(Index number) const {
    std::vector<Index> all(detail::to_size(size()));
    const std::vector<Index> ones(detail::to_size(size()), 1);
    gather(std::span<const Index>(&number, 1), std::span<const Index>(ones), std::span<Index>(all));
    return all;
  }

  /// Sends some numbers to each rank and receives some from each, `sent` and `received` being their
  /// counts by rank; the numbers stand by rank too. For few numbers, such as counts of others.
  void exchange(std::span<const Index> numbers, std::span<const Index> sent,
                std::span<Index> received_numbers, std::span<const Index> received) const {
    attempt("exchange", [&] { make_room_for_exchange(numbers.size() + received_numbers.size()); });
    exchange_agreed(numbers, sent, received_numbers, received);
  }

  /// Rank `root`'s numbers, for all.
  template <class Number>
  void broadcast(std::span<Number> numbers, int root) const {
    attempt("broadcast", {{"the count of the numbers", static_cast<std::int64_t>(numbers.size())}},
            [&] { room_for<Number>(numbers.size()); });
    Number* const room = room_for<Number>(numbers.size());
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
