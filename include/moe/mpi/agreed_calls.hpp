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
/// Sums, prefixes, gathers and exchanges of numbers over the ranks, where it is agreed already that all
/// ranks make the call.

namespace moe::mpi {

/// What a Communicator does after agree(): all ranks make the same calls in the same order, with the
/// same counts, and none checks that. A copy refers to the same ranks, and to the same room.
class AgreedCalls {
 public:
  AgreedCalls(std::shared_ptr<Channel> channel, int rank, int size)
      : shared_(std::make_shared<Shared>()), rank_(rank), size_(size) {
    shared_->channel = std::move(channel);
  }

  // These are local.

  int rank() const { return rank_; }
  int size() const { return size_; }
  MPI_Comm handle() const { return channel().handle(); }
  Traffic& traffic() const { return channel().traffic(); }
  /// The waiting that an exchange of rows shares with these calls.
  Channel& channel() const { return *shared_->channel; }

  /// Replaces each number by its sum over the ranks, with the same bits on all of them. Throws
  /// std::bad_alloc on this rank alone unless the room was made, see make_room_for_sum().
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
  template <class Number>
  void make_room_for_sum(std::size_t numbers) const {
    room_for_sum<Number>(numbers);
  }

  // Calls in which a rank that failed takes part, so that none has to agree() first: they come after
  // one in which all ranks agreed on the count, and made room. They return whether a rank failed, on
  // all ranks alike: then the numbers are anything, and agree() tells what went wrong. A rank that
  // failed has no numbers, and gives their count alone.

  /// sum_agreed().
  template <class Number>
  [[nodiscard]] bool sum_or_fail(std::span<Number> numbers) const {
    MOE_ASSERT(!numbers.empty());
    return sum_or_fail(numbers.data(), numbers.size());
  }
  template <class Number>
  void fail_in_sum(std::size_t numbers) const {
    (void)sum_or_fail<Number>(nullptr, numbers);
  }

  /// `numbers` become those of prefix_agreed() and `sums`, as many, those of sum_agreed(). One call up
  /// to 64 KiB over all ranks, else two.
  [[nodiscard]] bool sum_and_prefix_or_fail(std::span<Index> numbers, std::span<Index> sums) const {
    if (is_small<Index>(numbers.size() + 1)) {
      return gather_or_fail(numbers.data(), sums.data(), numbers.size());
    }
    std::copy(numbers.begin(), numbers.end(), sums.begin());
    if (sum_or_fail(sums)) return true;
    prefix_agreed(numbers);
    return false;
  }
  void fail_in_sum_and_prefix(std::size_t numbers) const {
    if (is_small<Index>(numbers + 1)) {
      (void)gather_or_fail(nullptr, nullptr, numbers);
    } else {
      fail_in_sum<Index>(numbers);
    }
  }

  /// Room for any of these.
  template <class Number>
  void make_room_to_fail(std::size_t numbers) const {
    channel().room<std::byte>(small_bytes);
    room_for_sum<Number>(numbers + 1);
  }

  /// Every rank has a block of the numbers, of one length, and gets those of the others. After a call
  /// in which all ranks agreed on the count, and made room for as many numbers.
  void gather_agreed(std::span<Index> numbers) const {
    MOE_ASSERT(numbers.size() <= most_numbers<Index>());
    Index* const room = room_for<Index>(numbers.size());
    const std::size_t block = numbers.size() / detail::to_size(size_);
    const std::size_t own = block * detail::to_size(rank_);
    std::copy_n(numbers.data() + own, block, room + own);
    all_gather(room, block, "gather");
    std::copy_n(room, numbers.size(), numbers.data());
  }

  /// Replaces each number by its sum over the ranks before this one, 0 on rank 0.
  void prefix_agreed(std::span<Index> numbers) const {
    Index* const room = room_for<Index>(numbers.size());
    for_each_piece<Index>(numbers.size(), [&](std::size_t first, int count) {
      std::copy_n(numbers.data() + first, count, room);
      channel().complete("prefix", [&](MPI_Request* request) {
        MPI_Iexscan(MPI_IN_PLACE, room, count, type_of<Index>(), MPI_SUM, handle(), request);
      });
      if (rank_ == 0) std::fill_n(room, count, Index{0});  // where MPI leaves it undefined
      std::copy_n(room, count, numbers.data() + first);
    });
  }

  /// Sends some numbers to each rank and receives some from each, `sent` and `received` being their
  /// counts by rank; the numbers stand by rank too. Each rank made room for both numbers before.
  void exchange_agreed(std::span<const Index> numbers, std::span<const Index> sent,
                       std::span<Index> received_numbers, std::span<const Index> received) const {
    const std::size_t both = numbers.size() + received_numbers.size();
    Blocks& to = shared_->to;
    Blocks& from = shared_->from;
    Index* const room = channel().room<Index>(both);
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
  void make_room_for_exchange(std::size_t numbers) const {
    shared_->to.resize(size_);
    shared_->from.resize(size_);
    channel().room<Index>(numbers);
  }

  /// Of the numbers that sums, gathers and broadcasts move at a time: they stay in a cache, which makes
  /// long sums faster than in one message.
  static constexpr std::size_t most_bytes = std::size_t{1} << 20;

  /// Calls f(first, count) for the pieces that `numbers` numbers are moved in. The last may be longer
  /// by a number, such as whether a rank failed.
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

 protected:
  const std::shared_ptr<Channel>& shared_channel() const { return shared_->channel; }

  /// How many numbers there are for each rank, and where they begin, as MPI wants it.
  struct Blocks {
    void resize(int ranks) {
      counts.resize(detail::to_size(ranks));
      offsets.resize(detail::to_size(ranks));
    }
    /// part(of_rank[r]) numbers for rank r.
    template <class Part>
    void assign(std::span<const Index> of_rank, Part&& part) {
      int offset = 0;
      for (std::size_t r = 0; r < of_rank.size(); ++r) {
        counts[r] = static_cast<int>(part(of_rank[r]));
        offsets[r] = offset;
        offset += counts[r];
      }
    }
    std::vector<int> counts;
    std::vector<int> offsets;
  };

  template <class Number>
  static constexpr std::size_t most_numbers() {
    return most_bytes / sizeof(Number);
  }
  /// Room for a piece of some numbers, and for a number of each rank.
  template <class Number>
  Number* room_for(std::size_t numbers) const {
    const std::size_t most = std::max(most_numbers<Number>() + 1, detail::to_size(size_));
    return channel().room<Number>(std::min(numbers, most));
  }

  template <class Number>
  Number* room_for_sum(std::size_t numbers) const {
    if (!is_gathered<Number>(numbers)) return room_for<Number>(numbers);
    return channel().room<Number>(numbers * detail::to_size(size_));
  }

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

  /// Of the numbers of all ranks that every rank gets, where that spares a call.
  static constexpr std::size_t small_bytes = most_bytes / 16;
  template <class Number>
  bool is_small(std::size_t numbers) const {
    return numbers * detail::to_size(size_) <= small_bytes / sizeof(Number);
  }
  /// Whether every rank gets all numbers and adds them up, which is one call instead of two.
  template <class Number>
  bool is_gathered(std::size_t numbers) const {
    return !std::is_integral_v<Number> && is_small<Number>(numbers);
  }
  /// Sums `numbers` numbers in room: read(first, count, room) puts this rank's there, and write(first,
  /// count, room) takes the sums.
  template <class Number, class Read, class Write>
  void sum_in_room(std::size_t numbers, Read&& read, Write&& write) const {
    Number* const room = room_for_sum<Number>(numbers);
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

  /// Of null numbers where this rank failed; one more number behind them says how many ranks did.
  template <class Number>
  bool sum_or_fail(Number* numbers, std::size_t count) const {
    Number failed{0};
    // How many of a piece are no flag.
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

  /// sum_and_prefix_or_fail() of few numbers, or of null ones where this rank failed.
  bool gather_or_fail(Index* numbers, Index* sums, std::size_t count) const {
    const std::size_t block = count + 1;
    Index* const room = channel().room<Index>(block * detail::to_size(size_));
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

  /// Room holds a block of each rank, of which this rank's is filled.
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
