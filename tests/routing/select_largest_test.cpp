#include "moe/routing/select_largest.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "../support.hpp"

using namespace moe;
using test::random_matrix;
using Indices = std::vector<Index>;

TEMPLATE_TEST_CASE("select_largest: a stable sort's for any scores", "[routing]", float, double) {
  const auto nan = std::numeric_limits<TestType>::quiet_NaN();
  const auto infinity = std::numeric_limits<TestType>::infinity();
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    for (const Index size : {1, 2, 7, 31, 32, 33, 90}) {
      Matrix<TestType> scores = random_matrix<TestType>(1, size, seed);
      if (seed % 2 == 0) scores = (scores * 2).array().round().matrix();  // many ties
      if (seed % 4 == 1) scores(0, size / 2) = nan;
      if (seed % 4 == 3) scores(0, size / 2) = -infinity;
      if (seed % 8 == 1) scores(0, 0) = infinity;
      if (seed % 16 == 5) {  // fewer that count than are asked for, or none at all
        for (Index i = 0; i < size; ++i) {
          if (i % 29 != static_cast<Index>(seed % 3)) scores(0, i) = i % 2 == 0 ? nan : -infinity;
        }
      }
      if (seed % 64 == 13) scores.setConstant(nan);
      Indices expected;
      for (Index i = 0; i < size; ++i) expected.push_back(i);
      const auto key = [&](Index i) { return std::isnan(scores(0, i)) ? -infinity : scores(0, i); };
      std::stable_sort(expected.begin(), expected.end(),
                       [&](Index a, Index b) { return key(a) > key(b); });
      for (Index count = 1; count <= size; ++count) {
        Indices best(detail::to_size(count));
        select_largest(scores.data(), size, count, best.data());
        REQUIRE(std::equal(best.begin(), best.end(), expected.begin()));
      }
    }
  }
  TestType* nothing = nullptr;
  Index* nowhere = nullptr;
  select_largest(nothing, 0, 0, nowhere);
}
