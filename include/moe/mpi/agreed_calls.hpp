#pragma once

#include <mpi.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/mpi/channel.hpp"

/// \file
/// Sums, prefix sums, gathers and exchanges of numbers over the ranks, for callers that know that all ranks
/// make the call.

namespace moe::mpi {

/// Collective calls without a check: all ranks must make the same calls in the same order, with the same
/// counts. A Communicator makes them after agree(). A copy refers to the same ranks and the same
/// buffers.
class AgreedCalls {
 public:
  /// The ranks of a channel, of which this is `rank` of `size`.
  AgreedCalls(std::shared_ptr<Channel> channel, int rank, int size)
      : shared_(std::make_shared<Shared>()), rank_(rank), size_(size) {
    shared_->channel = std::move(channel);
  }

  // Local, not collective.

  int rank() const { return rank_; }                      ///< this rank
  int size() const { return size_; }                      ///< the number of ranks
  MPI_Comm handle() const { return channel().handle(); }  ///< for calls of MPI
  Traffic& traffic() const {
    return channel().traffic();
  }  ///< what this rank has sent, and how long it has waited, so far
  /// The channel, which completes calls of MPI within the timeout.
  Channel& channel() const { return *shared_->channel; }

  /// Replaces each number by its sum over the ranks, with the same bits on all of them. Call
  /// make_room_for_sum() before: otherwise this rank alone may throw std::bad_alloc.
  template <class Number>
  void sum_agreed(std::span<Number> numbers) const {
    sum_in_room<Number>(
        numbers.size(),
        [&](std::size_t first, std::size_t count, Number* room) {
          std::copy_n(numbers.data() + first, count, room);
        },
        [&](std::size_t first, std::size_t count, const Number* room) {
          std::copy_n(room, count, numbers.data() + first);
        });
  }
  /// Room for sum_agreed() of `numbers` numbers. Local; may throw std::bad_alloc.
  template <class Number>
  void make_room_for_sum(std::size_t numbers) const {
    room_for_sum<Number>(numbers);
  }

  // Calls in which a rank that failed takes part too, so that the ranks need not agree() first. They come
  // after a call in which all ranks agreed on the count, and after make_room_to_fail(). On all ranks they
  // return whether any rank failed: then the numbers are undefined, and agree() throws the Error. A rank
  // that failed has no numbers, and calls the fail_ function with their count.

  /// sum_agreed(), if no rank failed. Returns whether one did.
  template <class Number>
  [[nodiscard]] bool sum_or_fail(std::span<Number> numbers) const {
    MOE_ASSERT(!numbers.empty());
    return sum_or_fail(numbers.data(), numbers.size());
  }
  /// Takes part in sum_or_fail(), to say that this rank failed.
  template <class Number>
  void fail_in_sum(std::size_t numbers) const {
    (void)sum_or_fail<Number>(nullptr, numbers);
  }

  /// Sets `numbers` to the result of prefix_agreed() and `sums`, of the same length, to that of
  /// sum_agreed(), if no rank failed. Returns whether one did. One call of MPI for up to 64 KiB
  /// over all ranks, otherwise two for each MiB of `numbers` or part of one.
  [[nodiscard]] bool sum_and_prefix_or_fail(std::span<Index> numbers, std::span<Index> sums) const {
    if (is_small<Index>(numbers.size() + 1)) {
      return gather_or_fail(numbers.data(), sums.data(), numbers.size());
    }
    std::copy(numbers.begin(), numbers.end(), sums.begin());
    if (sum_or_fail(sums)) return true;
    prefix_agreed(numbers);
    return false;
  }
  /// Takes part in sum_and_prefix_or_fail(), to say that this rank failed.
  void fail_in_sum_and_prefix(std::size_t numbers) const {
    if (is_small<Index>(numbers + 1)) {
      (void)gather_or_fail(nullptr, nullptr, numbers);
    } else {
      fail_in_sum<Index>(numbers);
    }
  }

  /// Room for any of these calls with this count. Local; may throw std::bad_alloc.
  template <class Number>
  void make_room_to_fail(std::size_t numbers) const {
    channel().room<std::byte>(small_bytes);
    room_for_sum<Number>(numbers + 1);
  }

  /// `numbers` has a block for each rank, all of one length. Every rank fills its own block and
  /// gets those of the others, in one call of MPI. Call make_room_to_gather() before.
  void gather_agreed(std::span<Index> numbers) const {
    auto* const room = channel().room<Index>(numbers.size());
    const std::size_t block = numbers.size() / detail::to_size(size_);
    const std::size_t own = block * detail::to_size(rank_);
    std::copy_n(numbers.data() + own, block, room + own);
    all_gather(room, block, "gather");
    std::copy_n(room, numbers.size(), numbers.data());
  }
  /// Room for gather_agreed() of `numbers` numbers, those of all ranks. Local; may throw std::bad_alloc.
  void make_room_to_gather(std::size_t numbers) const { channel().room<Index>(numbers); }

  /// Replaces each number by its sum over the ranks before this one, 0 on rank 0. Call
  /// make_room_for_sum<Index>() with this count before.
  void prefix_agreed(std::span<Index> numbers) const {
    auto* const room = room_for<Index>(numbers.size());
    for_each_piece<Index>(numbers.size(), [&](std::size_t first, int count) {
      std::copy_n(numbers.data() + first, count, room);
      channel().complete("prefix", [&](MPI_Request* request) {
        MPI_Iexscan(MPI_IN_PLACE, room, count, type_of<Index>(), MPI_SUM, handle(), request);
      });
      if (rank_ == 0) std::fill_n(room, count, Index{0});  // where MPI leaves it undefined
      std::copy_n(room, count, numbers.data() + first);
    });
  }

  /// Sends numbers to each rank and receives numbers from each. `sent` and `received` are their counts by
  /// rank; the numbers are in the order of the ranks. Call make_room_for_exchange() before.
  void exchange_agreed(std::span<const Index> numbers, std::span<const Index> sent,
                       std::span<Index> received_numbers, std::span<const Index> received) const {
    const std::size_t both = numbers.size() + received_numbers.size();
    Blocks& to = shared_->to;
    Blocks& from = shared_->from;
    auto* const room = channel().room<Index>(both);
    to.assign(sent, [](Index count) { return count; });
    from.assign(received, [](Index count) { return count; });
    std::copy(numbers.begin(), numbers.end(), room);
    Index* const arrived = room + numbers.size();
    channel().complete("exchange", [&](MPI_Request* request) {
      MPI_Ialltoallv(room, to.counts.data(), to.offsets.data(), MPI_INT64_T, arrived,
                     from.counts.data(), from.offsets.data(), MPI_INT64_T, handle(), request);
    });
    std::copy_n(arrived, received_numbers.size(), received_numbers.data());
    const auto own = static_cast<std::size_t>(sent[detail::to_size(rank_)]);
    traffic().other_bytes += static_cast<std::int64_t>((numbers.size() - own) * sizeof(Index));
  }
  /// Room for exchange_agreed() of `numbers` numbers, those sent plus those received. Local;
  /// may throw std::bad_alloc.
  void make_room_for_exchange(std::size_t numbers) const {
    shared_->to.resize(size_);
    shared_->from.resize(size_);
    channel().room<Index>(numbers);
  }

  /// Bytes that sums, prefix sums, broadcasts and Communicator::gather() move at a time
  /// (gather_agreed() moves all at once). A piece stays in the cache, which makes a long sum faster
  /// than in one message.
  static constexpr std::size_t most_bytes = std::size_t{1} << 20;

  /// Calls f(first, count) for the pieces in which `numbers` numbers are moved. The last piece may
  /// have one number more, which says whether a rank failed.
  template <class Number, class F>
  static void for_each_piece(std::size_t numbers, F&& f) {
    constexpr std::size_t most = most_numbers<Number>();
    for (std::size_t first = 0; first < numbers;) {
      const std::size_t left = numbers - first;
      const std::size_t count = left == most + 1 ? left : std::min(most, left);
      f(first, static_cast<int>(count));
      first += count;
    }
  }

  /// MPI's datatype for a number.
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

 protected:
  /// The channel.
  const std::shared_ptr<Channel>& shared_channel() const { return shared_->channel; }

  /// The count of the numbers of each rank and the offset of the first, as arguments of MPI.
  struct Blocks {
    /// Makes room for `ranks` ranks.
    void resize(int ranks) {
      counts.resize(detail::to_size(ranks));
      offsets.resize(detail::to_size(ranks));
    }
    /// Sets the count of rank r to part(of_rank[r]).
    template <class Part>
    void assign(std::span<const Index> of_rank, Part&& part) {
      int offset = 0;
      for (std::size_t r = 0; r < of_rank.size(); ++r) {
        counts[r] = static_cast<int>(part(of_rank[r]));
        offsets[r] = offset;
        offset += counts[r];
      }
    }
    std::vector<int> counts;   ///< by rank
    std::vector<int> offsets;  ///< by rank
  };

  /// The largest number of values in a piece.
  template <class Number>
  static constexpr std::size_t most_numbers() {
    return most_bytes / sizeof(Number);
  }
  /// Room for a piece of `numbers` numbers, or for a number of each rank.
  template <class Number>
  Number* room_for(std::size_t numbers) const {
    const std::size_t most = std::max(most_numbers<Number>() + 1, detail::to_size(size_));
    return channel().room<Number>(std::min(numbers, most));
  }

  /// Room for sum_agreed() of `numbers` numbers.
  template <class Number>
  Number* room_for_sum(std::size_t numbers) const {
    if (!is_gathered<Number>(numbers)) return room_for<Number>(numbers);
    return channel().room<Number>(numbers * detail::to_size(size_));
  }

  /// Broadcasts the numbers in room() from `root`.
  template <class Number>
  void broadcast_room(Number* room, int count, int root, const char* call) const {
    channel().complete(call, [&](MPI_Request* request) {
      MPI_Ibcast(room, count, type_of<Number>(), root, handle(), request);
    });
  }

 private:
  struct Shared {
    std::shared_ptr<Channel> channel;
    Blocks to;  ///< of an exchange
    Blocks from;
  };

  /// The largest number of bytes, over all ranks, that a gather sends to every rank to save a second call.
  static constexpr std::size_t small_bytes = most_bytes / 16;
  template <class Number>
  bool is_small(std::size_t numbers) const {
    return numbers * detail::to_size(size_) <= small_bytes / sizeof(Number);
  }
  /// Whether a sum is one gather, after which every rank adds up all numbers, instead of two calls.
  template <class Number>
  bool is_gathered(std::size_t numbers) const {
    return !std::is_integral_v<Number> && is_small<Number>(numbers);
  }
  /// Sums `numbers` numbers in room(): read(first, count, room) copies this rank's numbers to it, and
  /// write(first, count, room) copies the sums from it.
  template <class Number, class Read, class Write>
  void sum_in_room(std::size_t numbers, Read&& read, Write&& write) const {
    auto* const room = room_for_sum<Number>(numbers);
    if constexpr (std::is_integral_v<Number>) {  // any order of the sum has the same bits
      for_each_piece<Number>(numbers, [&](std::size_t first, int count) {
        read(first, static_cast<std::size_t>(count), room);
        channel().complete("sum", [&](MPI_Request* request) {
          MPI_Iallreduce(MPI_IN_PLACE, room, count, type_of<Number>(), MPI_SUM, handle(), request);
        });
        write(first, static_cast<std::size_t>(count), room);
      });
      return;
    }
    if (is_gathered<Number>(numbers)) {
      // Every rank adds up all numbers, in the order of the ranks.
      read(0, numbers, room + detail::to_size(rank_) * numbers);
      all_gather(room, numbers, "sum");
      for (std::size_t r = 1; r < detail::to_size(size_); ++r) {
        const Number* const of_rank = room + r * numbers;
        for (std::size_t i = 0; i < numbers; ++i) room[i] += of_rank[i];
      }
      write(0, numbers, room);
      return;
    }
    const bool root = rank_ == 0;
    for_each_piece<Number>(numbers, [&](std::size_t first, int count) {
      read(first, static_cast<std::size_t>(count), room);
      // One rank adds up, since the sums of several might differ in their last bits.
      channel().complete("sum", [&](MPI_Request* request) {
        MPI_Ireduce(root ? MPI_IN_PLACE : room, root ? room : nullptr, count, type_of<Number>(),
                    MPI_SUM, 0, handle(), request);
      });
      broadcast_room(room, count, 0, "sum");
      write(first, static_cast<std::size_t>(count), room);
    });
  }

  /// `numbers` is null if this rank failed. One more number after them counts the ranks that failed.
  template <class Number>
  bool sum_or_fail(Number* numbers, std::size_t count) const {
    Number failed{0};
    // The number of values in a piece without the flag.
    const auto of_numbers = [&](std::size_t first, std::size_t size) {
      return std::min(size, count - first);
    };
    sum_in_room<Number>(
        count + 1,
        [&](std::size_t first, std::size_t size, Number* room) {
          std::fill_n(room, size, Number{0});
          if (numbers != nullptr) {
            std::copy_n(numbers + first, of_numbers(first, size), room);
          } else if (first + size > count) {
            room[size - 1] = Number{1};
          }
        },
        [&](std::size_t first, std::size_t size, const Number* room) {
          if (numbers != nullptr) {
            std::copy_n(room, of_numbers(first, size), numbers + first);
          }
          if (first + size > count) failed = room[size - 1];
        });
    return failed > Number{0};
  }

  /// sum_and_prefix_or_fail() of few numbers; `numbers` is null if this rank failed.
  bool gather_or_fail(Index* numbers, Index* sums, std::size_t count) const {
    const std::size_t block = count + 1;
    auto* const room = channel().room<Index>(block * detail::to_size(size_));
    Index* const own = room + detail::to_size(rank_) * block;
    own[count] = numbers == nullptr ? 1 : 0;
    if (numbers == nullptr) {
      std::fill_n(own, count, Index{0});
    } else {
      std::copy_n(numbers, count, own);
    }
    all_gather(room, block, "prefix");
    for (std::size_t r = 0; r < detail::to_size(size_); ++r) {
      if (room[r * block + count] != 0) return true;
    }
    std::fill_n(numbers, count, Index{0});
    std::fill_n(sums, count, Index{0});
    for (std::size_t r = 0; r < detail::to_size(size_); ++r) {
      const Index* const of_rank = room + r * block;
      for (std::size_t i = 0; i < count; ++i) {
        sums[i] += of_rank[i];
        if (r < detail::to_size(rank_)) numbers[i] += of_rank[i];
      }
    }
    return false;
  }

  /// Gathers the blocks of all ranks in `room`, where this rank has filled its own.
  template <class Number>
  void all_gather(Number* room, std::size_t block, const char* call) const {
    channel().complete(call, [&](MPI_Request* request) {
      MPI_Iallgather(MPI_IN_PLACE, 0, type_of<Number>(), room, static_cast<int>(block),
                     type_of<Number>(), handle(), request);
    });
  }

  std::shared_ptr<Shared> shared_;
  int rank_ = 0;
  int size_ = 1;
};

}  // namespace moe::mpi
