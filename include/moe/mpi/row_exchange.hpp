#pragma once

#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/mpi/communicator.hpp"

/// \file
/// The all-to-all that moves rows of tokens, in flight while something else is computed.

namespace moe::mpi {

/// Rows on their way between ranks. What is sent and received must stay where it is until wait(),
/// which the destructor does too. For each pair of ranks the one sends what the other receives, in
/// the same order; where rows arrive does not depend on when.
///
/// MPI counts in int, and some versions fail beyond 2 GiB, so what is larger goes in pieces of at
/// most `most_bytes`, which is the same on all ranks; a row is never cut.
class RowExchange {
 public:
  explicit RowExchange(const Communicator& communicator,
                       std::int64_t most_bytes = std::int64_t{1} << 30)
      : communicator_(communicator), most_bytes_(most_bytes) {
    requests_.reserve(static_cast<std::size_t>(4 * communicator.size()));
  }
  ~RowExchange() {
    try {
      wait();
    } catch (...) {  // NOLINT: a time-out, of which the communicator knows
    }
  }
  RowExchange(const RowExchange&) = delete;
  RowExchange& operator=(const RowExchange&) = delete;

  /// Sends rows that lie one behind the other.
  template <class Scalar>
  void send(const Scalar* rows, Index count, Index width, int to) {
    communicator_.traffic().row_bytes += post_send(rows, count, width, to);
  }
  /// Sends numbers that go with rows.
  template <class Scalar>
  void send(const Scalar* numbers, Index count, int to) {
    communicator_.traffic().other_bytes += post_send(numbers, count, 1, to);
  }

  /// Receives as many as the other sends, one behind the other.
  template <class Scalar>
  void receive(Scalar* rows, Index count, Index width, int from) {
    const Communicator::Stopwatch stopwatch(communicator_.traffic());
    for_each_message(rows, count, width, [&](Scalar* first, int size, MPI_Datatype type) {
      MPI_Irecv(first, size, type, from, 0, communicator_.handle(), next());
    });
  }
  template <class Scalar>
  void receive(Scalar* numbers, Index count, int from) {
    receive(numbers, count, 1, from);
  }

  /// Returns when all is sent and received. Throws std::runtime_error after the communicator's
  /// timeout.
  void wait() {
    communicator_.wait_for(std::span<MPI_Request>(requests_), "an exchange of rows");
    requests_.clear();
  }

  /// Calls f(first, count) for the pieces of `count` rows that are sent by themselves.
  template <class Scalar, class F>
  static void for_each_piece(Index count, Index width, std::int64_t most_bytes, F&& f) {
    if (width == 0) return;
    const std::int64_t bytes = width * static_cast<Index>(sizeof(Scalar));
    const Index most = std::max<Index>(1, most_bytes / bytes);
    for (Index first = 0; first < count; first += most) {
      f(first, static_cast<int>(std::min(most, count - first)));
    }
  }

 private:
  /// Returns how many bytes go.
  template <class Scalar>
  std::int64_t post_send(const Scalar* rows, Index count, Index width, int to) {
    const Communicator::Stopwatch stopwatch(communicator_.traffic());
    for_each_message(rows, count, width, [&](const Scalar* first, int size, MPI_Datatype type) {
      MPI_Isend(first, size, type, to, 0, communicator_.handle(), next());
    });
    return count * width * static_cast<Index>(sizeof(Scalar));
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
};

}  // namespace moe::mpi
