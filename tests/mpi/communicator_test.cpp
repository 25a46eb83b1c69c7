#include "moe/mpi/communicator.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "errors.hpp"
#include "support.hpp"

using namespace moe;
using mpi::Communicator;
using test::error_of;

TEST_CASE("communicator: sums have the same bits on all ranks", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int ranks = communicator.size();
  std::vector<Index> counts{communicator.rank() + 1, 10, Index{1} << 40};
  communicator.sum(std::span<Index>(counts));
  CHECK(counts ==
        std::vector<Index>{ranks * (ranks + 1) / 2, 10 * ranks, ranks * (Index{1} << 40)});

  // Numbers whose sum depends on the order.
  std::vector<float> numbers(1000);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = static_cast<float>(i + 1) / static_cast<float>(3 + 7 * communicator.rank());
  }
  communicator.sum(std::span<float>(numbers));
  std::vector<float> root = numbers;
  communicator.broadcast(std::span<float>(root), 0);
  CHECK(root == numbers);
  float expected = 0;
  for (int r = 0; r < ranks; ++r) expected += 1000.0f / static_cast<float>(3 + 7 * r);
  CHECK(std::abs(numbers.back() - expected) < 1e-4f * expected);

  std::vector<double> none;
  communicator.sum(std::span<double>(none));
}

TEST_CASE("communicator: gathers what each has, in the order of ranks", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  std::vector<Index> counts;
  std::vector<double> expected;
  for (int r = 0; r < communicator.size(); ++r) {
    counts.push_back(r % 2 == 0 ? 2 * r + 1 : 0);  // some have nothing
    for (Index i = 0; i < counts.back(); ++i)
      expected.push_back(100.0 * r + static_cast<double>(i));
  }
  std::vector<double> own;
  for (Index i = 0; i < counts[static_cast<std::size_t>(communicator.rank())]; ++i) {
    own.push_back(100.0 * communicator.rank() + static_cast<double>(i));
  }
  std::vector<double> all(expected.size());
  communicator.gather(std::span<const double>(own), std::span<const Index>(counts),
                      std::span<double>(all));
  CHECK(all == expected);
  std::vector<Index> ranks(static_cast<std::size_t>(communicator.size()));
  std::iota(ranks.begin(), ranks.end(), Index{0});
  CHECK(communicator.gather(Index{communicator.rank()}) == ranks);
}

TEST_CASE("communicator: what does not fit into one piece arrives whole", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int ranks = communicator.size();
  const int rank = communicator.rank();
  // Two pieces of 2^17 numbers and a last one of 3.
  const auto in_a_piece = static_cast<Index>(Communicator::most_bytes / sizeof(Index));
  const Index count = 2 * in_a_piece + 3;
  std::vector<Index> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), Index{0});
  communicator.sum(std::span<Index>(numbers));
  const auto is_at = [&](Index factor, Index plus) {
    for (Index i = 0; i < count; ++i) {
      if (numbers[static_cast<std::size_t>(i)] != factor * i + plus) return false;
    }
    return true;
  };
  CHECK(is_at(ranks, 0));
  if (rank != ranks - 1) std::fill(numbers.begin(), numbers.end(), -1);
  communicator.broadcast(std::span<Index>(numbers), ranks - 1);
  CHECK(is_at(ranks, 0));

  // Rank r has r + 1 pieces less r numbers, which count on from those of the ranks before.
  std::vector<Index> counts;
  for (Index r = 0; r < ranks; ++r) counts.push_back((r + 1) * in_a_piece - r);
  const auto own = counts.begin() + rank;
  std::vector<Index> mine(static_cast<std::size_t>(*own));
  std::iota(mine.begin(), mine.end(), std::accumulate(counts.begin(), own, Index{0}));
  std::vector<Index> all(
      static_cast<std::size_t>(std::accumulate(counts.begin(), counts.end(), Index{0})), -1);
  communicator.gather(std::span<const Index>(mine), std::span<const Index>(counts),
                      std::span<Index>(all));
  std::vector<Index> expected(all.size());
  std::iota(expected.begin(), expected.end(), Index{0});
  CHECK(all == expected);

  // Counts too have room: rank a sends 2^20 numbers a·R + b to rank b.
  const Index many = Index{1} << 20;
  const std::vector<Index> each(static_cast<std::size_t>(ranks), many);
  std::vector<Index> sent;
  for (int to = 0; to < ranks; ++to) {
    sent.insert(sent.end(), static_cast<std::size_t>(many), rank * ranks + to);
  }
  std::vector<Index> got(sent.size(), -1);
  communicator.exchange(std::span<const Index>(sent), std::span<const Index>(each),
                        std::span<Index>(got), std::span<const Index>(each));
  for (int from = 0; from < ranks; ++from) {
    const auto first = got.begin() + from * many;
    CHECK(std::count(first, first + many, from * ranks + rank) == many);
  }
}

TEMPLATE_TEST_CASE("communicator: a rank that failed says so in a sum", "[mpi]", Index, float,
                   double) {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int ranks = communicator.size();
  const bool is_last = communicator.rank() == ranks - 1;
  // Small ones, whole pieces, and a number less and more.
  const std::size_t piece = Communicator::most_bytes / sizeof(TestType);
  for (const std::size_t count : {std::size_t{1}, std::size_t{5}, std::size_t{9000}, piece - 1,
                                  piece, piece + 1, 2 * piece + 3}) {
    INFO(count << " numbers");
    std::vector<TestType> numbers(count);
    for (std::size_t i = 0; i < count; ++i) {
      numbers[i] = static_cast<TestType>(static_cast<int>(i % 100) + communicator.rank());
    }
    std::vector<TestType> expected = numbers;
    communicator.sum(std::span<TestType>(expected));
    communicator.make_room_to_fail<TestType>(count);
    const std::vector<TestType> own = numbers;
    CHECK_FALSE(communicator.sum_or_fail(std::span<TestType>(numbers)));
    CHECK(numbers == expected);
    numbers = own;
    if (is_last) {
      communicator.fail_in_sum<TestType>(count);
    } else {
      CHECK(communicator.sum_or_fail(std::span<TestType>(numbers)));
    }
    communicator.agree("and goes on");
  }
}

TEST_CASE("communicator: sums and prefix sums in one call, and ranks that fail there", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int ranks = communicator.size();
  const Index rank = communicator.rank();
  for (const std::size_t count : {1u, 3u, 1000u, 2047u, 2730u, 4095u, 8191u, 8192u, 140000u}) {
    INFO(count << " numbers");
    std::vector<Index> numbers(count);
    std::iota(numbers.begin(), numbers.end(), rank);
    const std::vector<Index> own = numbers;
    std::vector<Index> sums(count);
    communicator.make_room_to_fail<Index>(count);
    communicator.traffic() = {};
    CHECK_FALSE(communicator.sum_and_prefix_or_fail(std::span(numbers), std::span(sums)));
    if (count <= 1000) CHECK(communicator.traffic().collectives == 1);
    bool is_right = true;
    for (std::size_t i = 0; i < count; ++i) {
      const auto place = static_cast<Index>(i);
      is_right = is_right && sums[i] == ranks * place + ranks * (ranks - 1) / 2 &&
                 numbers[i] == rank * place + rank * (rank - 1) / 2;
    }
    CHECK(is_right);
    numbers = own;
    if (rank == ranks - 1) {
      communicator.fail_in_sum_and_prefix(count);
    } else {
      CHECK(communicator.sum_and_prefix_or_fail(std::span(numbers), std::span(sums)));
    }
    communicator.agree("and goes on");
  }
}

TEST_CASE("communicator: ranks that disagree all hear who does on what", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int rank = communicator.rank();
  const int last = communicator.size() - 1;
  communicator.agree("a call", {{"one", 1}, {"lowest", std::numeric_limits<std::int64_t>::min()}});
  if (last == 0) return;
  const std::string at = std::to_string(last);
  CHECK(error_of([&] { communicator.agree(rank == last ? "other" : "this"); }) ==
        "moe: ranks disagree: rank 0 is in \"this\", rank " + at + " in \"other\"");
  CHECK(error_of([&] {
          communicator.agree("a call", {{"same", 5}, {"size", rank == last ? -3 : 4}});
        }) == "moe: ranks disagree in \"a call\": size is 4 on rank 0 and -3 on rank " + at);
  CHECK(error_of([&] {
          std::vector<double> numbers(rank == last ? 3 : 2);
          communicator.sum(std::span<double>(numbers));
        }) ==
        "moe: ranks disagree in \"sum\": the count of the numbers is 2 on rank 0 and 3 on rank " +
            at);
  std::vector<double> numbers{static_cast<double>(rank)};
  CHECK(error_of(
            [&] { communicator.broadcast(std::span<double>(numbers), rank == last ? last : 0); }) ==
        "moe: ranks disagree in \"broadcast\": root is 0 on rank 0 and " + at + " on rank " + at);
  CHECK(numbers.front() == rank);
  communicator.agree("and goes on");
}

TEST_CASE("communicator: numbers of a rank that does not exist", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int ranks = communicator.size();
  for (const int root : {-1, ranks}) {
    std::vector<Index> numbers{Index{communicator.rank()}};
    CHECK(error_of([&] { communicator.broadcast(std::span<Index>(numbers), root); }) ==
          "rank 0: moe: broadcast: root = " + std::to_string(root) + ", must be one of " +
              std::to_string(ranks) + " ranks");
    CHECK(numbers.front() == communicator.rank());
  }
  communicator.agree("and goes on");
}

TEST_CASE("communicator: what one rank throws, all do", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  const std::string at = std::to_string(last);
  const auto fails = [&](auto&& f) {
    return error_of([&] {
      communicator.attempt("an attempt", [&] {
        if (communicator.rank() == last) f();
      });
    });
  };
  CHECK(fails([] { throw std::runtime_error("no luck"); }) == "rank " + at + ": no luck");
  CHECK(fails([] { throw std::bad_alloc(); }) == "rank " + at + ": " + std::bad_alloc().what());
  CHECK(fails([] { throw 7; }) == "rank " + at + ": an exception that is not a std::exception");
  CHECK(fails([] { throw std::runtime_error(std::string(3000, 'x')); }).size() ==
        3000 + 6 + at.size() + 1 - 0);
  // Of several the lowest, and while the others are in quite another call.
  CHECK(error_of([&] {
          communicator.attempt(
              "an attempt", [&] { throw std::runtime_error(std::to_string(communicator.rank())); });
        }) == "rank 0: 0");
  CHECK(error_of([&] {
          if (communicator.rank() == last) {
            communicator.attempt("an attempt", [] { throw std::runtime_error("no luck"); });
          } else {
            double one = 1;
            communicator.sum(std::span<double>(&one, 1));
          }
        }) == "rank " + at + ": no luck");
  CHECK(fails([] {}) == "none");
}

TEST_CASE("communicator: what makes no sense is refused", "[mpi]") {
  CHECK_THROWS_AS(Communicator(MPI_COMM_WORLD, -1), std::invalid_argument);
}

TEST_CASE("communicator: counts beyond an int are split", "[mpi]") {
  // Not sent, since it would take 16 GiB: the pieces alone.
  const std::size_t numbers = (std::size_t{1} << 32) + 7;
  std::size_t next = 0;
  int pieces = 0;
  Communicator::for_each_piece<float>(numbers, [&](std::size_t first, int count) {
    CHECK(first == next);
    CHECK(count > 0);
    next += static_cast<std::size_t>(count);
    ++pieces;
  });
  CHECK(next == numbers);
  CHECK(pieces == 16385);  // of 1 MiB, 2^18 numbers, and the last of 7
  Communicator::for_each_piece<float>(0, [](std::size_t, int) { FAIL(); });
}

TEST_CASE("communicator: a copy is the same one", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  {
    const Communicator copy = communicator;
    copy.agree("in the copy");
    copy.traffic().row_bytes = 5;
  }
  communicator.agree("in the first");
  CHECK(communicator.traffic().row_bytes == 5);
  CHECK(communicator.traffic().seconds > 0);
}

TEST_CASE("communicator: the last copy frees, and not while an exception leads the way", "[mpi]") {
  static int freed = 0;
  int key = 0;
  MPI_Comm_create_keyval(
      MPI_COMM_NULL_COPY_FN, [](MPI_Comm, int, void*, void*) { return ++freed, MPI_SUCCESS; }, &key,
      nullptr);
  {
    const Communicator communicator(MPI_COMM_WORLD, 30);
    MPI_Comm_set_attr(communicator.handle(), key, nullptr);
    { const Communicator copy = communicator; }
    CHECK(freed == 0);
  }
  CHECK(freed == 1);
  try {
    const Communicator communicator(MPI_COMM_WORLD, 30);
    MPI_Comm_set_attr(communicator.handle(), key, nullptr);
    throw 1;
  } catch (int) {
  }
  CHECK(freed == 1);  // freeing is collective: not while an exception leads the way
  MPI_Comm_free_keyval(&key);
}
