#include "moe/nn/batches.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <vector>

#include "../allocation.hpp"
#include "../support.hpp"

using namespace moe;

namespace {

std::vector<Index> order_of(const Batches& batches) {
  std::vector<Index> order;
  for (const IndexSpan rows : batches) order.insert(order.end(), rows.begin(), rows.end());
  return order;
}

std::vector<Index> ascending(Index count) {
  std::vector<Index> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), Index{0});
  return numbers;
}

}  // namespace

TEST_CASE("batches: every row once, the last batch smaller", "[nn][batches]") {
  for (const Index rows : {1, 2, 9, 10, 11, 100}) {
    for (const Index size : {1, 3, 10, 1000}) {
      INFO(rows << " rows, " << size << " in a batch");
      const Batches batches({.rows = rows, .batch_rows = size, .seed = 1}, 0);
      std::vector<Index> order = order_of(batches);
      std::sort(order.begin(), order.end());
      CHECK(order == ascending(rows));
      CHECK(batches.count() == (rows + size - 1) / size);
      Index number = 0;
      for (const IndexSpan batch : batches) {
        const bool last = ++number == batches.count();
        CHECK(static_cast<Index>(batch.size()) == (last ? rows - (number - 1) * size : size));
      }
      CHECK(number == batches.count());
    }
  }
}

TEST_CASE("batches: the order is that of the seed and the epoch, and of nothing else",
          "[nn][batches]") {
  const auto order = [](std::uint64_t seed, std::uint64_t epoch, Index size) {
    return order_of(Batches({.rows = 50, .batch_rows = size, .seed = seed}, epoch));
  };
  const std::vector<Index> first = order(1, 0, 8);
  CHECK(order(1, 0, 8) == first);
  CHECK(order(1, 0, 3) == first);
  CHECK(order(1, 1, 8) != first);
  CHECK(order(2, 0, 8) != first);
  CHECK(order(2, 1, 8) != order(1, 1, 8));
  CHECK(first != ascending(50));
}

TEST_CASE("batches: a batch by its number, and the one of the iteration", "[nn][batches]") {
  const Batches batches({.rows = 7, .batch_rows = 3, .seed = 4}, 2);
  Index number = 0;
  for (auto it = batches.begin(); it != batches.end(); it++, ++number) {
    CHECK(std::ranges::equal(*it, batches[number]));
    // A view of the one permutation.
    CHECK((*it).data() == batches[0].data() + 3 * number);
  }
  CHECK(batches.config().rows == 7);
  std::size_t pass = 0;
  CHECK(test::allocations_in([&] {
          for (const IndexSpan rows : batches) pass += rows.size();
        }) == 0);
  CHECK(pass == 7);
}

TEST_CASE("batches: no rows", "[nn][batches]") {
  const Batches batches({.rows = 0, .batch_rows = 3, .seed = 4}, 0);
  CHECK(batches.count() == 0);
  CHECK(batches.begin() == batches.end());
  CHECK_THROWS_WITH(batches[0], "moe: Batches: batch = 0, must be in [0, 0)");
}

TEST_CASE("batches: each place gets each row equally often", "[nn][batches]") {
  const int epochs = 6000;
  std::map<std::vector<Index>, int> orders;
  for (int epoch = 0; epoch < epochs; ++epoch) {
    ++orders[order_of(
        Batches({.rows = 3, .batch_rows = 2, .seed = 9}, static_cast<std::uint64_t>(epoch)))];
  }
  // All six orders, a thousand times each: within five standard deviations of sqrt(6000·5/36).
  CHECK(orders.size() == 6);
  for (const auto& [order, count] : orders)
    CHECK_THAT(count, Catch::Matchers::WithinAbs(1000, 145));
}

TEST_CASE("batches: what is wrong is named", "[nn][batches]") {
  CHECK_THROWS_WITH(Batches({.rows = -1, .batch_rows = 3, .seed = 1}, 0),
                    "moe: Batches::Config.rows = -1, must be at least 0");
  CHECK_THROWS_WITH(Batches({.rows = 4, .batch_rows = 0, .seed = 1}, 0),
                    "moe: Batches::Config.batch_rows = 0, must be at least 1");
  const Batches batches({.rows = 4, .batch_rows = 3, .seed = 1}, 0);
  CHECK_THROWS_WITH(batches[2], "moe: Batches: batch = 2, must be in [0, 2)");
  CHECK_THROWS_WITH(batches[-1], "moe: Batches: batch = -1, must be in [0, 2)");
}
