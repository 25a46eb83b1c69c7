#pragma once

#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/mpi/communicator.hpp"

/// \file
/// The all-to-all that moves rows of tokens, in flight while something else is computed.

namespace moe::mpi {

/// Rows on their way between ranks. What is sent and received must stay where it is until wait(),
/// and nothing has arrived for certain before it returned. For each pair of ranks the one sends what
/// the other receives, in the same order; where rows arrive does not depend on when.
///
/// After a time-out MPI may still read and write the buffers, for ever. So they are taken away from
/// their owners, whose matrices and vectors are empty then, and are never freed. One that is left by
/// an exception waits first, no longer than the timeout. One that is left without wait() and without
/// an exception makes every later call of the communicator throw std::runtime_error.
///
/// MPI counts in int, and some versions fail beyond 2 GiB, so what is larger goes in pieces of at
/// most `most_bytes`, which is the same on all ranks; a row is never cut.
class RowExchange {
 public:
  explicit RowExchange(const Communicator& communicator,
                       std::int64_t most_bytes = std::int64_t{1} << 30)
      : communicator_(communicator), most_bytes_(most_bytes) {
    // Enough for all that a pass sends unless a message goes in pieces, so that only this
    // constructor throws std::bad_alloc, when the others can still be told.
    requests_.reserve(most_buffers * detail::to_size(communicator.size()));
    lent_.reserve(std::max(most_buffers, 2 * detail::to_size(communicator.size())));
  }
  ~RowExchange() {
    if (requests_.empty()) return;
    const bool unwinds = std::uncaught_exceptions() > exceptions_;
    try {
      wait();
    } catch (...) {  // NOLINT: the communicator says so in every later call
    }
    if (!unwinds) {
      communicator_.channel().refuse("moe: an exchange of rows was left without wait() before");
    }
  }
  RowExchange(const RowExchange&) = delete;
  RowExchange& operator=(const RowExchange&) = delete;

  /// Sends rows first, first + 1, ..., `count` of them. Throws std::runtime_error where the
  /// communicator is of no more use.
  template <class Scalar>
  void send(Matrix<Scalar>& rows, Index first, Index count, int to) {
    MOE_ASSERT(first >= 0 && first + count <= rows.rows());
    communicator_.traffic().row_bytes +=
        post_send(rows, rows.data() + first * rows.cols(), count, rows.cols(), to);
  }
  /// Sends numbers that go with rows.
  template <class Scalar>
  void send(std::vector<Scalar>& numbers, Index first, Index count, int to) {
    MOE_ASSERT(first >= 0 && first + count <= static_cast<Index>(numbers.size()));
    communicator_.traffic().other_bytes += post_send(numbers, numbers.data() + first, count, 1, to);
  }

  /// Receives as many as the other sends, one behind the other. Throws likewise.
  template <class Scalar>
  void receive(Matrix<Scalar>& rows, Index first, Index count, int from) {
    MOE_ASSERT(first >= 0 && first + count <= rows.rows());
    post_receive(rows, rows.data() + first * rows.cols(), count, rows.cols(), from);
  }
  template <class Scalar>
  void receive(std::vector<Scalar>& numbers, Index first, Index count, int from) {
    MOE_ASSERT(first >= 0 && first + count <= static_cast<Index>(numbers.size()));
    post_receive(numbers, numbers.data() + first, count, 1, from);
  }

  /// Returns when all is sent and received. Throws std::runtime_error after the communicator's
  /// timeout.
  void wait() {
    try {
      communicator_.channel().wait_for(std::span<MPI_Request>(requests_), "an exchange of rows");
    } catch (...) {
      for (const Lent& lent : lent_) lent.keep(lent.buffer);
      requests_.clear();
      lent_.clear();
      throw;
    }
    requests_.clear();
    lent_.clear();
  }

  /// Calls f(first, count) for the pieces of `count` rows that are sent by themselves.
  template <class Scalar, class F>
  static void for_each_piece(Index count, Index width, std::int64_t most_bytes, F&& f) {
    if (width == 0) return;
    const std::int64_t bytes = width * static_cast<std::int64_t>(sizeof(Scalar));
    const Index most = std::max<Index>(1, most_bytes / bytes);
    for (Index first = 0; first < count; first += most) {
      f(first, static_cast<int>(std::min(most, count - first)));
    }
  }

 private:
  /// Rows, weights and flags, sent and received.
  static constexpr std::size_t most_buffers = 6;

  /// A buffer that MPI uses.
  struct Lent {
    void* buffer;
    void (*keep)(void* buffer) noexcept;  ///< takes its memory away from it, for ever
  };

  template <class Buffer>
  void lend(Buffer& buffer) {
    communicator_.channel().check();
    const auto is_same = [&](const Lent& lent) { return lent.buffer == &buffer; };
    if (std::any_of(lent_.begin(), lent_.end(), is_same)) return;
    lent_.push_back({&buffer, [](void* lent) noexcept {
                       (void)new Buffer(std::move(*static_cast<Buffer*>(lent)));
                     }});
  }

  /// Returns how many bytes go.
  template <class Buffer, class Scalar>
  std::int64_t post_send(Buffer& buffer, const Scalar* rows, Index count, Index width, int to) {
    lend(buffer);
    const Stopwatch stopwatch(communicator_.traffic());
    for_each_message(rows, count, width, [&](const Scalar* first, int size, MPI_Datatype type) {
      MPI_Isend(first, size, type, to, 0, communicator_.handle(), next());
    });
    return count * width * static_cast<std::int64_t>(sizeof(Scalar));
  }
  template <class Buffer, class Scalar>
  void post_receive(Buffer& buffer, Scalar* rows, Index count, Index width, int from) {
    lend(buffer);
    const Stopwatch stopwatch(communicator_.traffic());
    for_each_message(rows, count, width, [&](Scalar* first, int size, MPI_Datatype type) {
      MPI_Irecv(first, size, type, from, 0, communicator_.handle(), next());
    });
  }

  template <class Scalar, class F>
  void for_each_message(Scalar* rows, Index count, Index width, F&& f) const {
    MPI_Datatype row;
    MPI_Type_contiguous(static_cast<int>(width),
                        Communicator::type_of<std::remove_const_t<Scalar>>(), &row);
    MPI_Type_commit(&row);
    for_each_piece<Scalar>(count, width, most_bytes_,
                           [&](Index first, int size) { f(rows + first * width, size, row); });
    MPI_Type_free(&row);
  }

  MPI_Request* next() { return &requests_.emplace_back(MPI_REQUEST_NULL); }

  const Communicator& communicator_;
  std::int64_t most_bytes_;
  std::vector<MPI_Request> requests_;
  std::vector<Lent> lent_;
  int exceptions_ = std::uncaught_exceptions();  ///< when it was made
};

}  // namespace moe::mpi
