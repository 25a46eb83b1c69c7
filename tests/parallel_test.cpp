#include "moe/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "support.hpp"

using namespace moe;
using detail::to_size;

// Catch2's macros are not for several threads at once, so the bodies only take notes.

TEST_CASE("parallel: every index is called once by a worker in range", "[parallel]") {
  const int threads = GENERATE(1, 2, 3, 8);
  const Index count = GENERATE(as<Index>{}, 0, 1, 2, 7, 1000);
  CAPTURE(threads, count);
  const test::Threads scope(threads);
  std::vector<std::atomic<int>> calls(to_size(count));
  std::atomic<int> outside{0};
  const Index workers = worker_count();
  parallel_for(count, [&](Index i, Index worker) {
    if (i < 0 || i >= count || worker < 0 || worker >= workers) {
      ++outside;
    } else {
      ++calls[to_size(i)];
    }
  });
  CHECK(outside == 0);
  CHECK(std::all_of(calls.begin(), calls.end(), [](const auto& n) { return n == 1; }));
}

TEST_CASE("parallel: there are as many workers as threads were asked for", "[parallel]") {
#ifdef _OPENMP
  for (const int threads : {1, 2, 5}) {
    const test::Threads scope(threads);
    CHECK(worker_count() == threads);
  }
#else
  CHECK(worker_count() == 1);
#endif
}

TEST_CASE("parallel: two calls of one worker never overlap", "[parallel]") {
  const test::Threads scope(8);
  std::vector<std::atomic<int>> inside(to_size(worker_count()));
  std::atomic<int> overlaps{0};
  std::atomic<Index> sum{0};
  parallel_for(2000, [&](Index i, Index worker) {
    if (inside[to_size(worker)]++ != 0) ++overlaps;
    sum += i;
    --inside[to_size(worker)];
  });
  CHECK(overlaps == 0);
  CHECK(sum == 1999 * 2000 / 2);
}

TEST_CASE("parallel: of several exceptions the one of the smallest index arrives", "[parallel]") {
  const int threads = GENERATE(1, 2, 3, 8);
  const Index first = GENERATE(as<Index>{}, 0, 1, 37, 199);
  CAPTURE(threads, first);
  const test::Threads scope(threads);
  for (int repeat = 0; repeat < 10; ++repeat) {
    std::vector<std::atomic<int>> calls(200);
    std::string caught;
    try {
      parallel_for(200, [&](Index i, Index) {
        ++calls[to_size(i)];
        if (i >= first) throw std::runtime_error("index " + std::to_string(i));
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught == "index " + std::to_string(first));
    for (Index i = 0; i < first; ++i) REQUIRE(calls[to_size(i)] == 1);
  }
}

TEST_CASE("parallel: an exception keeps its type and the next loop runs whole", "[parallel]") {
  const test::Threads scope(GENERATE(1, 4));
  CHECK_THROWS_AS(parallel_for(50,
                               [](Index i, Index) {
                                 if (i == 49) throw 7;
                               }),
                  int);
  std::atomic<int> calls{0};
  CHECK_NOTHROW(parallel_for(50, [&](Index, Index) { ++calls; }));
  CHECK(calls == 50);
}

TEST_CASE("parallel: a loop inside a loop is serial and complete", "[parallel]") {
  const test::Threads scope(GENERATE(1, 2, 8));
  const Index outer_workers = worker_count();
  std::vector<std::atomic<int>> calls(20 * 30);
  std::atomic<int> wrong{0};
  parallel_for(20, [&](Index i, Index) {
    if (outer_workers > 1 && worker_count() != 1) ++wrong;
    Index next = 0;  // belongs to this i alone: an inner loop on several threads would race
    parallel_for(30, [&](Index j, Index worker) {
      if (outer_workers > 1 && (j != next++ || worker != 0)) ++wrong;
      ++calls[to_size(i * 30 + j)];
    });
  });
  CHECK(wrong == 0);
  CHECK(std::all_of(calls.begin(), calls.end(), [](const auto& n) { return n == 1; }));
}

TEST_CASE("parallel: an exception leaves a loop inside a loop", "[parallel]") {
  const test::Threads scope(GENERATE(1, 4));
  std::string caught;
  try {
    parallel_for(8, [](Index i, Index) {
      parallel_for(8, [i](Index j, Index) {
        if (i >= 2 && j >= 5) throw std::to_string(10 * i + j);
      });
    });
  } catch (const std::string& text) {
    caught = text;
  }
  CHECK(caught == "25");
}

TEST_CASE("parallel: blocks cover the range without gap or overlap", "[parallel]") {
  const test::Threads scope(GENERATE(1, 3));
  const Index block = GENERATE(as<Index>{}, 1, 2, 7, 64);
  for (const Index count : {0, 1, 6, 7, 8, 63, 64, 65, 130}) {
    CAPTURE(block, count);
    std::vector<std::atomic<int>> calls(to_size(count));
    std::atomic<int> blocks{0};
    std::atomic<int> wrong{0};
    parallel_for_blocks(count, block, least_shared_work, [&](Index first, Index size) {
      ++blocks;
      if (first % block != 0 || size < 1 || size > block || first + size > count) {
        ++wrong;
        return;
      }
      for (Index i = first; i < first + size; ++i) ++calls[to_size(i)];
    });
    CHECK(wrong == 0);
    CHECK(blocks == (count + block - 1) / block);
    CHECK(std::all_of(calls.begin(), calls.end(), [](const auto& n) { return n == 1; }));
  }
}
