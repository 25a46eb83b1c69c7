#pragma once

#include <mpi.h>

#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>

#include "moe/matrix.hpp"
#include "moe/mpi/ending.hpp"

/// \file
/// Waiting for other ranks no longer than a timeout, and what can be done with MPI after a time-out.

namespace moe::mpi {

/// What this rank sent, and how long it waited for others, sending and receiving included.
struct Traffic {
  double seconds = 0;          ///< waited
  std::int64_t row_bytes = 0;  ///< of the rows of tokens that went to other ranks
  /// Of other numbers sent to single ranks: counts, weights, moved experts, checkpoints.
  std::int64_t other_bytes = 0;
  std::int64_t collectives = 0;  ///< calls of MPI in which all ranks took part
};

/// Adds the time from its construction to its destruction to a Traffic.
class Stopwatch {
 public:
  /// Starts it.
  explicit Stopwatch(Traffic& traffic) : traffic_(traffic) {}
  ~Stopwatch() { traffic_.seconds += std::chrono::duration<double>(Clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  using Clock = std::chrono::steady_clock;

  Traffic& traffic_;
  Clock::time_point start_ = Clock::now();
};

/// What the copies of a Communicator share: a duplicate of an MPI communicator, and buffers for its
/// collective calls.
///
/// After a time-out MPI may still write to the buffers of the call at any time. So the buffers
/// belong to the channel and not to the caller, and are never freed after a time-out. MPI cannot be
/// finalized either, since that would wait for the call: MPI_Finalize() then ends the processes of
/// all ranks.
class Channel {
 public:
  /// Duplicates a communicator, and allocates `bytes` of room. `timeout` is in seconds, 0 for none.
  /// Collective; throws std::runtime_error after the timeout.
  static std::shared_ptr<Channel> open(MPI_Comm communicator, double timeout, std::size_t bytes) {
    std::shared_ptr<Channel> channel(new Channel(timeout), [](Channel* unused) {
      if (!unused->is_pending_) delete unused;
    });
    channel->room<std::byte>(bytes);
    MPI_Comm_rank(communicator, &channel->rank_);
    channel->complete("Communicator::Communicator", [&](MPI_Request* request) {
      MPI_Comm_idup(communicator, &channel->handle_, request);
    });
    MPI_Comm_set_errhandler(channel->handle_, MPI_ERRORS_ARE_FATAL);  // nothing here reads codes
    return channel;
  }
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  /// The duplicate, for calls of MPI.
  MPI_Comm handle() const { return handle_; }
  /// What this rank has sent, and how long it has waited, so far.
  Traffic& traffic() { return traffic_; }

  /// The buffer for calls of MPI, with room for `count` numbers. Every call returns the same memory. If it
  /// must grow its contents are lost, and it may throw std::bad_alloc.
  template <class Number>
  Number* room(std::size_t count) {
    static_assert(std::is_trivially_copyable_v<Number>);
    if (count * sizeof(Number) > room_bytes_) {
      const std::size_t bytes = std::bit_ceil(count * sizeof(Number));
      room_ = std::make_unique<std::byte[]>(bytes);
      room_bytes_ = bytes;
    }
    return reinterpret_cast<Number*>(room_.get());
  }

  bool is_usable() const { return refusal_ == nullptr; }  ///< false after a time-out or refuse()
  /// Throws std::runtime_error once a call timed out, or after refuse().
  void check() const {
    if (!is_usable()) throw std::runtime_error(refusal_);
  }
  /// Makes check() throw from now on, unless it does already. The text must never be freed.
  void refuse(const char* why) {
    if (is_usable()) refusal_ = why;
  }

  /// Calls start(request), which starts a call of MPI whose only buffer is room(), and returns when that
  /// call is done. Throws as wait_for() does.
  template <class Start>
  void complete(const char* call, Start&& start) {
    check();
    ++traffic_.collectives;
    MPI_Request request = MPI_REQUEST_NULL;
    start(&request);
    wait_for(std::span<MPI_Request>(&request, 1), call);
  }

  /// Returns when all requests are done. Throws std::runtime_error after the timeout; then the channel
  /// cannot be used any more, and the buffers of the requests must never be freed.
  void wait_for(std::span<MPI_Request> requests, const char* call) {
    check();
    const Stopwatch stopwatch(traffic_);
    const auto start = Clock::now();
    for (Index turns = 0;; ++turns) {
      int done = 0;
      MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE);
      if (done != 0) return;
      if (turns % 64 != 63) continue;
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (timeout_ > 0 && seconds > timeout_) {
        give_up();
        throw std::runtime_error("moe: rank " + std::to_string(rank_) + " waited for " +
                                 std::to_string(timeout_) + " s in \"" + call +
                                 "\" for a rank that never came");
      }
      // There may be more ranks than cores, so a rank that waits for long yields its core.
      if (seconds > 0.001) std::this_thread::yield();
    }
  }

 private:
  using Clock = std::chrono::steady_clock;

  explicit Channel(double timeout) : timeout_(timeout) {}
  ~Channel() {
    int finalized = 0;
    MPI_Finalized(&finalized);
    // Freeing is collective, so it is left out while an exception unwinds the stack of this rank
    // alone.
    const bool unwinds = std::uncaught_exceptions() > exceptions_;
    if (handle_ != MPI_COMM_NULL && finalized == 0 && !unwinds && is_usable()) {
      MPI_Comm_free(&handle_);
    }
  }

  void give_up() {
    refuse("moe: a call of this communicator timed out before");
    if (is_pending_) return;
    is_pending_ = true;
    // MPI_Finalize() begins by deleting what is attached to MPI_COMM_SELF.
    int key = MPI_KEYVAL_INVALID;
    MPI_Comm_create_keyval(
        MPI_COMM_NULL_COPY_FN,
        [](MPI_Comm, int, void*, void*) -> int {
          std::fputs("moe: a call timed out, so MPI cannot be finalized: all ranks end\n", stderr);
          end_all_ranks();
          return MPI_SUCCESS;
        },
        &key, nullptr);
    MPI_Comm_set_attr(MPI_COMM_SELF, key, nullptr);
    MPI_Comm_free_keyval(&key);
  }

  double timeout_;
  int rank_ = 0;
  MPI_Comm handle_ = MPI_COMM_NULL;
  Traffic traffic_;
  std::unique_ptr<std::byte[]> room_;
  std::size_t room_bytes_ = 0;
  int exceptions_ = std::uncaught_exceptions();  ///< when the channel was made
  const char* refusal_ = nullptr;
  bool is_pending_ = false;  ///< a call did not end, and may never
};

}  // namespace moe::mpi
