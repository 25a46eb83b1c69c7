#pragma once

#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "moe/matrix.hpp"
#include "moe/mpi/channel.hpp"
#include "moe/mpi/claim.hpp"
#include "moe/mpi/error.hpp"

/// \file
/// How ranks find out that all of them make the same call and none failed.

namespace moe::mpi {

/// The implementation of Communicator::agree(). If all ranks agree it is one reduction.
class Agreement {
 public:
  /// The largest number of values that each rank can send to the others with its claim.
  static constexpr std::size_t most_numbers = 2;

  /// The ranks of a channel, of which this is `rank` of `size`.
  Agreement(std::shared_ptr<Channel> channel, int rank, int size)
      : channel_(std::move(channel)), rank_(rank), size_(size) {}

  /// The bytes of Channel::room() that an Agreement needs. They are allocated first, so that a
  /// later std::bad_alloc can be reported to the other ranks.
  static std::size_t room_bytes(int ranks) {
    return std::max({2 * message_numbers(ranks) * sizeof(std::int64_t),
                     detail::to_size(ranks) * sizeof(Claim), most_text});
  }

  /// See Communicator::agree_and_gather(). Collective.
  std::span<const Index> gather(const char* call, std::initializer_list<Fact> facts,
                                std::initializer_list<Index> numbers,
                                const std::exception_ptr& failure) {
    const Claim claim(call, facts, failure != nullptr);
    const std::span<const Index> gathered = all_agree(claim, numbers);
    if (!gathered.empty()) return gathered;
    const std::span<const Claim> claims = all_claims(claim);
    const auto failed = std::find_if(claims.begin(), claims.end(),
                                     [](const Claim& c) { return c.numbers[Claim::failed] != 0; });
    ++errors_;
    if (failed != claims.end()) throw_failure(static_cast<int>(failed - claims.begin()), failure);
    throw Error(disagreement(claims, facts), rank_, size_);
  }

  /// The number of Errors that all ranks have thrown so far.
  std::int64_t errors() const { return errors_; }

 private:
  /// The number of values that the ranks reduce: every number of a Claim and its complement.
  static constexpr std::size_t claim_numbers = 2 * (Claim::first_fact + Claim::most_facts);
  /// The largest number of bytes of the message of a rank that failed.
  static constexpr std::size_t most_text = std::size_t{64} << 10;

  static std::size_t message_numbers(int ranks) {
    return claim_numbers + detail::to_size(ranks) * most_numbers;
  }

  /// A number is equal on all ranks if its minimum and maximum over the ranks are. Returns the numbers of
  /// every rank, or nothing if a rank failed or the claims differ. Numbers must be at least 0: each
  /// rank has 0 in the places of the others, and the reduction takes the maximum.
  std::span<const Index> all_agree(const Claim& claim, std::initializer_list<Index> numbers) {
    static_assert(std::is_signed_v<Index> && sizeof(Index) == sizeof(std::int64_t));
    MOE_ASSERT(numbers.size() <= most_numbers);
    const std::size_t size = message_numbers(size_);
    auto* const mine = channel_->room<Index>(2 * size);
    Index* const highest = mine + size;
    std::fill_n(mine, size, 0);
    for (std::size_t i = 0; i < claim.numbers.size(); ++i) {
      mine[2 * i] = claim.numbers[i];
      // Falls as the number rises, and never overflows.
      mine[2 * i + 1] = ~claim.numbers[i];
    }
    std::copy(numbers.begin(), numbers.end(),
              mine + claim_numbers + detail::to_size(rank_) * most_numbers);
    channel_->complete(claim.call.data(), [&](MPI_Request* request) {
      MPI_Iallreduce(mine, highest, static_cast<int>(size), MPI_INT64_T, MPI_MAX,
                     channel_->handle(), request);
    });
    if (highest[0] != 0) return {};
    for (std::size_t i = 0; i < claim.numbers.size(); ++i) {
      if (highest[2 * i] != ~highest[2 * i + 1]) return {};
    }
    return {highest + claim_numbers, size - claim_numbers};
  }

  /// The claims of all ranks, valid until the next call.
  std::span<const Claim> all_claims(const Claim& claim) {
    auto* const claims = channel_->room<Claim>(detail::to_size(size_));
    claims[rank_] = claim;
    channel_->complete(claim.call.data(), [&](MPI_Request* request) {
      MPI_Iallgather(MPI_IN_PLACE, 0, MPI_BYTE, claims, sizeof(Claim), MPI_BYTE, channel_->handle(),
                     request);
    });
    return {claims, detail::to_size(size_)};
  }

  [[noreturn]] void throw_failure(int failed, const std::exception_ptr& failure) {
    std::string text;
    if (failed == rank_) {
      try {
        std::rethrow_exception(failure);
      } catch (const std::exception& error) {
        text = error.what();
      } catch (...) {
        text = "an exception that is not a std::exception";
      }
      text = "rank " + std::to_string(rank_) + ": " + text;
    }
    const auto broadcast = [&](void* room, int count, MPI_Datatype type) {
      channel_->complete("the message of the rank that failed", [&](MPI_Request* request) {
        MPI_Ibcast(room, count, type, failed, channel_->handle(), request);
      });
    };
    auto* const length = channel_->room<std::int64_t>(1);
    *length = static_cast<std::int64_t>(std::min(text.size(), most_text));
    broadcast(length, 1, MPI_INT64_T);
    const auto size = static_cast<int>(*length);
    char* const room = channel_->room<char>(most_text);
    if (failed == rank_) std::copy_n(text.data(), size, room);
    broadcast(room, size, MPI_CHAR);
    throw Error(std::string(room, detail::to_size(size)), rank_, size_);
  }

  std::shared_ptr<Channel> channel_;
  int rank_;
  int size_;
  std::int64_t errors_ = 0;
};

}  // namespace moe::mpi
