#pragma once

#include <mpi.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/mpi/error.hpp"

/// \file
/// What the ranks of a program say to each other, such that none of them waits for one that failed.

namespace moe::mpi {

/// What was sent, and how long this rank waited for others, sending and receiving included.
struct Traffic {
  double seconds = 0;
  std::int64_t row_bytes = 0;    ///< of the rows of tokens that went to other ranks
  std::int64_t other_bytes = 0;  ///< of counts and of weights, with them
};

/// A number that must be the same on all ranks, for Communicator::agree().
struct Fact {
  const char* name;
  std::int64_t value;
};

/// Some processes that train together. A copy refers to the same ones.
///
/// Calls that do not say otherwise are collective: all ranks make the same ones in the same order.
/// Each begins with agree(), in which a rank that failed still takes part, to say so; so none is
/// left waiting in a call that another will never make. One that makes no call at all is waited for
/// as long as `timeout` says, there and in exchanges of rows. Of the threads of a process only one
/// at a time may use it.
class Communicator {
 public:
  /// The ranks of `communicator`, which is duplicated, so messages of others do not get in the way.
  /// After `timeout` seconds in which not all ranks made the same call, those that did throw
  /// std::runtime_error, and can do no more with it; 0 stands for ever. Throws
  /// std::invalid_argument for a timeout below 0, and std::logic_error before MPI is started
  /// (Environment).
  explicit Communicator(MPI_Comm communicator = MPI_COMM_WORLD, double timeout = 600) {
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (initialized == 0) {
      throw std::logic_error("moe: Communicator before MPI is started, see mpi::Environment");
    }
    detail::require(timeout >= 0, "Communicator: timeout = ", timeout, ", must be at least 0");
    shared_ = std::make_shared<Shared>();
    MPI_Comm_dup(communicator, &shared_->handle);
    MPI_Comm_set_errhandler(shared_->handle, MPI_ERRORS_ARE_FATAL);  // nothing here reads codes
    MPI_Comm_rank(shared_->handle, &rank_);
    MPI_Comm_size(shared_->handle, &size_);
    timeout_ = timeout;
  }

  // Of these no other rank knows.

  int rank() const { return rank_; }
  int size() const { return size_; }
  MPI_Comm handle() const { return shared_->handle; }
  Traffic& traffic() const { return shared_->traffic; }
  /// 1, 2, ...: the same on all ranks if it is asked for after the same calls.
  std::int64_t next_number() const { return ++shared_->numbers; }

  /// Returns when all ranks made the same call with the same facts and none failed, else throws
  /// Error on all: what a rank says that failed, or who disagrees on what. At most 6 facts; `call`
  /// and the names are text that lives on.
  void agree(const char* call, std::initializer_list<Fact> facts = {},
             std::exception_ptr failure = nullptr) const {
    const Claim claim(call, facts, failure != nullptr);
    if (all_agree(claim)) return;
    const std::vector<Claim> claims = all_claims(claim);
    const auto failed = std::find_if(claims.begin(), claims.end(),
                                     [](const Claim& c) { return c.numbers[Claim::failed] != 0; });
    ++shared_->errors;
    if (failed != claims.end()) throw_failure(static_cast<int>(failed - claims.begin()), failure);
    throw Error(disagreement(claims, facts), rank_, size_);
  }

  /// Calls f() and then agree(): what it throws on one rank, all throw as an Error.
  template <class F>
  void attempt(const char* call, std::initializer_list<Fact> facts, F&& f) const {
    std::exception_ptr failure;
    const std::int64_t errors = shared_->errors;
    try {
      f();
    } catch (...) {
      // All ranks throw it already, or none can be told any more.
      if (shared_->errors > errors || shared_->broken) throw;
      failure = std::current_exception();
    }
    agree(call, facts, failure);
  }
  template <class F>
  void attempt(const char* call, F&& f) const {
    attempt(call, {}, std::forward<F>(f));
  }

  /// Replaces each number by its sum over the ranks, with the same bits on all of them.
  template <class Number>
  void sum(std::span<Number> numbers) const {
    agree("sum", {{"the count of the numbers", static_cast<std::int64_t>(numbers.size())}});
    const Stopwatch stopwatch(traffic());
    // One rank adds up, since the sums of several might differ in their last bits.
    for_each_piece(numbers.size(), [&](std::size_t piece, int count) {
      Number* first = numbers.data() + piece;
      const bool root = rank_ == 0;
      MPI_Reduce(root ? MPI_IN_PLACE : first, root ? first : nullptr, count, type_of<Number>(),
                 MPI_SUM, 0, handle());
      MPI_Bcast(first, count, type_of<Number>(), 0, handle());
    });
  }

  /// The numbers of all ranks one behind the other; rank r has counts[r] of them.
  template <class Number>
  void gather(std::span<const Number> numbers, std::span<const Index> counts,
              std::span<Number> all) const {
    const bool at_once = all.size() <= most_at_once;
    const Blocks blocks(at_once ? counts : std::span<const Index>());
    agree("gather", {{"the count of all numbers", static_cast<std::int64_t>(all.size())}});
    const Stopwatch stopwatch(traffic());
    MOE_ASSERT(static_cast<Index>(numbers.size()) == counts[detail::to_size(rank_)]);
    if (at_once) {
      MPI_Allgatherv(numbers.data(), static_cast<int>(numbers.size()), type_of<Number>(),
                     all.data(), blocks.counts.data(), blocks.offsets.data(), type_of<Number>(),
                     handle());
      return;
    }
    Number* first = all.data();
    for (int r = 0; r < size_; ++r) {
      const std::span<Number> part(first, detail::to_size(counts[detail::to_size(r)]));
      if (r == rank_) std::copy(numbers.begin(), numbers.end(), first);
      for_each_piece(part.size(), [&](std::size_t piece, int count) {
        MPI_Bcast(first + piece, count, type_of<Number>(), r, handle());
      });
      first += part.size();
    }
  }

  /// One number of each rank.
  std::vector<Index> gather(Index number) const {
    std::vector<Index> all(detail::to_size(size_));
    const std::vector<Index> ones(detail::to_size(size_), 1);
    gather(std::span<const Index>(&number, 1), std::span<const Index>(ones), std::span<Index>(all));
    return all;
  }

  /// Sends some numbers to each rank and receives some from each, `sent` and `received` being their
  /// counts by rank; the numbers stand by rank too. For few numbers, such as counts of others.
  void exchange(std::span<const Index> numbers, std::span<const Index> sent,
                std::span<Index> received_numbers, std::span<const Index> received) const {
    const Blocks to(sent);
    const Blocks from(received);
    agree("exchange");
    const Stopwatch stopwatch(traffic());
    MPI_Alltoallv(numbers.data(), to.counts.data(), to.offsets.data(), MPI_INT64_T,
                  received_numbers.data(), from.counts.data(), from.offsets.data(), MPI_INT64_T,
                  handle());
    const auto own = static_cast<std::size_t>(sent[detail::to_size(rank_)]);
    traffic().other_bytes += static_cast<std::int64_t>((numbers.size() - own) * sizeof(Index));
  }

  /// Rank `root`'s numbers, for all.
  template <class Number>
  void broadcast(std::span<Number> numbers, int root) const {
    agree("broadcast", {{"the count of the numbers", static_cast<std::int64_t>(numbers.size())}});
    const Stopwatch stopwatch(traffic());
    for_each_piece(numbers.size(), [&](std::size_t piece, int count) {
      MPI_Bcast(numbers.data() + piece, count, type_of<Number>(), root, handle());
    });
  }

  /// Of numbers in one message, since MPI counts in int.
  static constexpr std::size_t most_at_once = std::size_t{1} << 28;

  /// Calls f(first, count) for the pieces that so many numbers are sent in.
  template <class F>
  static void for_each_piece(std::size_t numbers, F&& f) {
    for (std::size_t first = 0; first < numbers; first += most_at_once) {
      f(first, static_cast<int>(std::min(most_at_once, numbers - first)));
    }
  }

  /// Returns when all requests are done. After the timeout the communicator is of no more use, and
  /// std::runtime_error is thrown. Of this no other rank knows.
  void wait_for(std::span<MPI_Request> requests, const char* call) const {
    if (shared_->broken) throw_broken();
    const Stopwatch stopwatch(traffic());
    const auto start = Clock::now();
    for (Index turns = 0;; ++turns) {
      int done = 0;
      MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE);
      if (done != 0) return;
      if (turns % 64 != 63) continue;
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (timeout_ > 0 && seconds > timeout_) {
        (void)shared_->message.release();  // MPI may still write there
        shared_->broken = true;
        throw std::runtime_error("moe: rank " + std::to_string(rank_) + " waited for " +
                                 std::to_string(timeout_) + " s in \"" + call +
                                 "\" for a rank that never came");
      }
      // There may be more ranks than cores; and who waits for long leaves them to others.
      if (seconds > 0.001) std::this_thread::yield();
    }
  }

  /// MPI's name of a number.
  template <class Number>
  static MPI_Datatype type_of() {
    if constexpr (std::is_same_v<Number, float>) {
      return MPI_FLOAT;
    } else if constexpr (std::is_same_v<Number, double>) {
      return MPI_DOUBLE;
    } else if constexpr (std::is_same_v<Number, char>) {
      return MPI_CHAR;
    } else {
      static_assert(std::is_integral_v<Number> && std::is_signed_v<Number> && sizeof(Number) == 8);
      return MPI_INT64_T;
    }
  }

  /// Adds the time of its life to a Traffic.
  class Stopwatch {
   public:
    explicit Stopwatch(Traffic& traffic) : traffic_(traffic) {}
    ~Stopwatch() {
      traffic_.seconds += std::chrono::duration<double>(Clock::now() - start_).count();
    }
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;

   private:
    Traffic& traffic_;
    std::chrono::steady_clock::time_point start_ = Clock::now();
  };

 private:
  using Clock = std::chrono::steady_clock;

  /// What a rank says in agree().
  struct Claim {
    enum Number : std::size_t { failed, name, count, first_fact };
    static constexpr std::size_t most_facts = 6;

    Claim() = default;
    Claim(const char* said, std::initializer_list<Fact> facts, bool has_failed) {
      MOE_ASSERT(facts.size() <= most_facts);
      numbers[failed] = has_failed ? 1 : 0;
      // A hash of the call's name [FNV-1a], so that two calls differ in a number.
      std::uint64_t hash = 14695981039346656037u;
      for (const char c : std::string_view(said)) {
        hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
      }
      numbers[name] = static_cast<std::int64_t>(hash >> 1);
      numbers[count] = static_cast<std::int64_t>(facts.size());
      std::size_t place = first_fact;
      for (const Fact& fact : facts) numbers[place++] = fact.value;
      const std::string_view text(said);
      text.substr(0, call.size() - 1).copy(call.data(), call.size() - 1);
    }

    std::array<std::int64_t, first_fact + most_facts> numbers{};
    std::array<char, 40> call{};
  };

  /// What the ranks reduce to find out whether they agree.
  struct Message {
    std::array<std::int64_t, 2 * (Claim::first_fact + Claim::most_facts)> mine;
    std::array<std::int64_t, 2 * (Claim::first_fact + Claim::most_facts)> highest;
  };

  [[noreturn]] static void throw_broken() {
    throw std::runtime_error("moe: a call of this communicator timed out before");
  }

  struct Shared {
    Shared() = default;
    ~Shared() {
      int finalized = 0;
      MPI_Finalized(&finalized);
      // Freeing is collective, so it is left out where an exception leads the way.
      const bool unwinds = std::uncaught_exceptions() > exceptions;
      if (handle != MPI_COMM_NULL && finalized == 0 && !unwinds && !broken) {
        MPI_Comm_free(&handle);
      }
    }
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;

    MPI_Comm handle = MPI_COMM_NULL;
    Traffic traffic;
    std::unique_ptr<Message> message = std::make_unique<Message>();
    int exceptions = std::uncaught_exceptions();  ///< when it was made
    std::int64_t numbers = 0;
    std::int64_t errors = 0;  ///< how many Errors all ranks have thrown
    bool broken = false;      ///< a call did not end
  };

  /// The lowest and the highest of each number over the ranks tell whether all are equal.
  bool all_agree(const Claim& claim) const {
    if (shared_->broken) throw_broken();
    constexpr std::size_t size = std::tuple_size_v<decltype(claim.numbers)>;
    Message& message = *shared_->message;
    for (std::size_t i = 0; i < size; ++i) {
      message.mine[2 * i] = claim.numbers[i];
      // Falls as the number rises, and never overflows.
      message.mine[2 * i + 1] = ~claim.numbers[i];
    }
    MPI_Request request = MPI_REQUEST_NULL;
    MPI_Iallreduce(message.mine.data(), message.highest.data(), static_cast<int>(2 * size),
                   MPI_INT64_T, MPI_MAX, handle(), &request);
    wait_for(std::span<MPI_Request>(&request, 1), claim.call.data());
    if (message.highest[0] != 0) return false;
    for (std::size_t i = 0; i < size; ++i) {
      if (message.highest[2 * i] != ~message.highest[2 * i + 1]) return false;
    }
    return true;
  }

  std::vector<Claim> all_claims(const Claim& claim) const {
    static_assert(std::is_trivially_copyable_v<Claim>);
    std::vector<Claim> claims(detail::to_size(size_));
    MPI_Allgather(&claim, sizeof(Claim), MPI_BYTE, claims.data(), sizeof(Claim), MPI_BYTE,
                  handle());
    return claims;
  }

  [[noreturn]] void throw_failure(int failed, const std::exception_ptr& failure) const {
    std::string text;
    if (failed == rank_) {
      try {
        std::rethrow_exception(failure);
      } catch (const std::exception& error) {
        text = error.what();
      } catch (...) {
        text = "an exception that is no std::exception";
      }
      text = "rank " + std::to_string(rank_) + ": " + text;
    }
    int length = static_cast<int>(std::min<std::size_t>(text.size(), 1 << 20));
    MPI_Bcast(&length, 1, MPI_INT, failed, handle());
    text.resize(detail::to_size(length));
    MPI_Bcast(text.data(), length, MPI_CHAR, failed, handle());
    throw Error(text, rank_, size_);
  }

  static std::string disagreement(const std::vector<Claim>& claims,
                                  std::initializer_list<Fact> facts) {
    const auto difference = [&](std::size_t number) -> int {
      for (std::size_t r = 1; r < claims.size(); ++r) {
        if (claims[r].numbers[number] != claims[0].numbers[number]) return static_cast<int>(r);
      }
      return 0;
    };
    const auto call = [&](std::size_t r) { return '"' + std::string(claims[r].call.data()) + '"'; };
    if (const int r = difference(Claim::name); r > 0) {
      return "moe: ranks disagree: rank 0 is in " + call(0) + ", rank " + std::to_string(r) +
             " in " + call(detail::to_size(r));
    }
    std::size_t number = Claim::first_fact;
    for (const Fact& fact : facts) {
      if (const int r = difference(number); r > 0) {
        return "moe: ranks disagree in " + call(0) + ": " + fact.name + " is " +
               std::to_string(claims[0].numbers[number]) + " on rank 0 and " +
               std::to_string(claims[detail::to_size(r)].numbers[number]) + " on rank " +
               std::to_string(r);
      }
      ++number;
    }
    return "moe: ranks disagree in " + call(0);
  }

  /// How many numbers there are for each rank, and where they begin, as MPI wants it.
  struct Blocks {
    explicit Blocks(std::span<const Index> of_rank) {
      int offset = 0;
      for (const Index count : of_rank) {
        counts.push_back(static_cast<int>(count));
        offsets.push_back(offset);
        offset += counts.back();
      }
    }
    std::vector<int> counts;
    std::vector<int> offsets;
  };

  std::shared_ptr<Shared> shared_;
  int rank_ = 0;
  int size_ = 1;
  double timeout_ = 0;
};

}  // namespace moe::mpi
