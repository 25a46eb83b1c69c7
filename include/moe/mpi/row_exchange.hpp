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
/// The all-to-all that moves rows of tokens, asynchronously, while other things are computed.

namespace moe::mpi {

/// An exchange of rows between ranks. The buffers of send() and receive() must not be moved or freed until
/// wait() returns, and received rows may be read only then. For each pair of ranks, one must send what the
/// other receives, in the same order.
///
/// After a time-out MPI may still read and write the buffers at any time. So their memory is taken from the
/// matrices and vectors, which are empty then, and is never freed. If an exception destroys an exchange, it
/// waits first, no longer than the timeout. If one is destroyed without wait() and without an exception,
/// every later call of the communicator throws std::runtime_error.
///
/// MPI counts in int, and some versions fail beyond 2 GiB. So larger messages are cut into pieces of at
/// most `most_bytes`, which must be the same on all ranks; a row is never cut.
class RowExchange {
 public:
  /// `most_bytes` is the size of the largest message. May throw std::bad_alloc; the other functions
  /// do not for the messages of a layer's pass, unless one is cut.
  explicit RowExchange(const Communicator& communicator,
                       std::int64_t most_bytes = std::int64_t{1} << 30)
      : communicator_(communicator), most_bytes_(most_bytes) {
    // Enough for all that a pass sends unless a message goes in pieces, so that only this
    // constructor throws std::bad_alloc, when the failure can still be reported to the other ranks.
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

  /// Sends `count` rows, from row `first` on. Throws std::runtime_error if the communicator timed out
  /// before.
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

  /// Receives `count` rows, from row `first` on. Throws likewise.
  template <class Scalar>
  void receive(Matrix<Scalar>& rows, Index first, Index count, int from) {
    MOE_ASSERT(first >= 0 && first + count <= rows.rows());
    post_receive(rows, rows.data() + first * rows.cols(), count, rows.cols(), from);
  }
  /// Receives numbers that go with rows.
  template <class Scalar>
  void receive(std::vector<Scalar>& numbers, Index first, Index count, int from) {
    MOE_ASSERT(first >= 0 && first + count <= static_cast<Index>(numbers.size()));
    post_receive(numbers, numbers.data() + first, count, 1, from);
  }

  /// Returns when everything is sent and received. Throws std::runtime_error after the communicator's
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

  /// Calls f(first, count) for the pieces in which `count` rows are sent.
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
  /// Buffers of a pass for each other rank: rows, weights and flags, sent and received.
  static constexpr std::size_t most_buffers = 6;

  /// A buffer that MPI uses.
  struct Lent {
    void* buffer;
    void (*keep)(void* buffer) noexcept;  ///< takes the memory from the buffer and never frees it
  };

  template <class Buffer>
  void lend(Buffer& buffer) {
    communicator_.channel().check();
    const auto is_same = [&](const Lent& lent) { return lent.buffer == &buffer; };
    if (std::any_of(lent_.begin(), lent_.end(), is_same)) return;
    // If there is no memory for this either, the program must end.
    lent_.push_back({&buffer, [](void* lent) noexcept {
                       // NOLINTNEXTLINE(bugprone-unhandled-exception-at-new)
                       (void)new Buffer(std::move(*static_cast<Buffer*>(lent)));
                     }});
  }

  /// Returns the number of bytes sent.
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
  int exceptions_ = std::uncaught_exceptions();  ///< when the exchange was made
};

}  // namespace moe::mpi
