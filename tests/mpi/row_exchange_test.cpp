#include "moe/mpi/row_exchange.hpp"

#include <stdexcept>
#include <string>
#include <vector>

#include "support.hpp"

using namespace moe;
using mpi::Communicator;
using mpi::RowExchange;

namespace {

/// What row i of the rank says in column j.
template <class Scalar>
Matrix<Scalar> rows_of_rank(int rank, Index rows, Index width) {
  Matrix<Scalar> m(rows, width);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < width; ++j) {
      m(i, j) = static_cast<Scalar>(1000 * rank + 10 * i) + static_cast<Scalar>(j) / 16;
    }
  }
  return m;
}

}  // namespace

TEMPLATE_TEST_CASE("row exchange: rows arrive where they should, in one message or in pieces",
                   "[mpi]", float, double) {
  using Scalar = TestType;
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int ranks = communicator.size();
  for (const Index width : {1, 3, 8}) {
    const auto row = width * static_cast<Index>(sizeof(Scalar));
    // Whole, two rows a piece, one row, and less than one, which is sent as one.
    for (const Index most : {Index{1} << 30, 2 * row, row, row - 1}) {
      // Rank a sends b + 2·a rows to rank b: those of `list`.
      const Matrix<Scalar> own = rows_of_rank<Scalar>(communicator.rank(), 20, width + 2);
      std::vector<std::vector<Index>> lists;
      std::vector<Matrix<Scalar>> received;
      std::vector<Matrix<Scalar>> sent;
      sent.reserve(static_cast<std::size_t>(ranks));  // they must stay where they are
      for (int r = 0; r < ranks; ++r) {
        lists.emplace_back();
        for (Index i = 0; i < r + 2 * communicator.rank(); ++i)
          lists.back().push_back((7 * i + r) % 20);
        received.emplace_back(Matrix<Scalar>::Constant(communicator.rank() + 2 * r, width, -1));
      }
      {
        RowExchange exchange(communicator, most);
        for (int r = 0; r < ranks; ++r) {
          Matrix<Scalar>& to = received[static_cast<std::size_t>(r)];
          exchange.receive(to, 0, to.rows(), r);
          const auto& list = lists[static_cast<std::size_t>(r)];
          Matrix<Scalar>& packed = sent.emplace_back(static_cast<Index>(list.size()), width);
          for (Index i = 0; i < packed.rows(); ++i) {
            packed.row(i) = own.row(list[static_cast<std::size_t>(i)]).head(width);
          }
          exchange.send(packed, 0, packed.rows(), r);
        }
        exchange.wait();
      }
      for (int r = 0; r < ranks; ++r) {
        const Matrix<Scalar> theirs = rows_of_rank<Scalar>(r, 20, width + 2);
        const auto& got = received[static_cast<std::size_t>(r)];
        for (Index i = 0; i < got.rows(); ++i) {
          const Index from = (7 * i + communicator.rank()) % 20;
          CHECK(test::same_bits(got.row(i), theirs.row(from).head(width)));
        }
      }
    }
  }
}

TEST_CASE("row exchange: counts beyond an int are split", "[mpi]") {
  // Not sent, since it would take 16 GiB: the pieces alone.
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const Index rows = (Index{1} << 31) + 5;
  std::vector<Index> pieces;
  RowExchange::for_each_piece<float>(rows, 1, std::int64_t{1} << 30, [&](Index first, int count) {
    CHECK(first == (pieces.empty() ? 0 : pieces.back()));
    CHECK(count > 0);
    pieces.push_back(first + count);
  });
  CHECK(pieces.back() == rows);
  CHECK(pieces.size() == 9);  // of 2^28 floats, and the last of 5
}

TEST_CASE("row exchange: rows behind each other, and nothing at all", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int next = (communicator.rank() + 1) % communicator.size();
  const int previous = (communicator.rank() + communicator.size() - 1) % communicator.size();
  Matrix<double> own = rows_of_rank<double>(communicator.rank(), 5, 4);
  Matrix<double> got(5, 4);
  std::vector<double> number{static_cast<double>(communicator.rank()), -1};
  RowExchange exchange(communicator, 64);
  exchange.receive(got, 0, 3, previous);
  exchange.receive(got, 3, 2, previous);
  exchange.send(own, 0, 3, next);
  exchange.send(own, 3, 2, next);
  exchange.receive(got, 0, 0, previous);
  exchange.send(own, 0, 0, next);
  exchange.receive(number, 1, 1, previous);
  exchange.send(number, 0, 1, next);
  exchange.wait();
  CHECK(test::same_bits(got, rows_of_rank<double>(previous, 5, 4)));
  CHECK(number[1] == previous);
}

namespace {

/// Sends a row to the next rank.
void post(RowExchange& exchange, const Communicator& communicator, Matrix<double>& own,
          Matrix<double>& got) {
  exchange.receive(got, 0, 1,
                   (communicator.rank() + communicator.size() - 1) % communicator.size());
  exchange.send(own, 0, 1, (communicator.rank() + 1) % communicator.size());
}

/// What a call says that the communicator refuses.
std::string refusal_of(const Communicator& communicator) {
  try {
    communicator.agree("a call");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "none";
}

}  // namespace

TEST_CASE("row exchange: without wait() the communicator refuses every later call", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Matrix<double> own = rows_of_rank<double>(communicator.rank(), 1, 4);
  Matrix<double> got(1, 4);
  {
    RowExchange exchange(communicator);
    post(exchange, communicator, own, got);
  }
  CHECK(refusal_of(communicator) == "moe: an exchange of rows was left without wait() before");
  RowExchange exchange(communicator);
  CHECK_THROWS_AS(exchange.send(own, 0, 1, 0), std::runtime_error);
  CHECK_THROWS_AS(exchange.receive(got, 0, 1, 0), std::runtime_error);
  // Nothing timed out, so the rows came, and their memory is still its owner's.
  CHECK(got.rows() == 1);
}

TEST_CASE("row exchange: an exception that all ranks throw leaves the communicator as it was",
          "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Matrix<double> own = rows_of_rank<double>(communicator.rank(), 1, 4);
  Matrix<double> got(1, 4);
  CHECK_THROWS_AS(
      [&] {
        RowExchange exchange(communicator);
        post(exchange, communicator, own, got);
        communicator.attempt("work", [] { throw std::runtime_error("no luck"); });
      }(),
      mpi::Error);
  CHECK(refusal_of(communicator) == "none");
  CHECK(got.rows() == 1);
}
