#include "moe/mpi/placement.hpp"

#include "support.hpp"

using moe::Index;
using moe::mpi::Placement;

TEST_CASE("placement: every expert is on one rank, and ranks have nearly as many", "[mpi]") {
  for (const int ranks : {1, 2, 3, 4, 7, 64}) {
    for (const Index experts : {1, 2, 5, 8, 100}) {
      const Placement placement(experts, ranks);
      Index next = 0;
      for (int r = 0; r < ranks; ++r) {
        CHECK(placement.first(r) == next);
        CHECK(placement.count(r) >= experts / ranks);
        CHECK(placement.count(r) <= (experts + ranks - 1) / ranks);
        next += placement.count(r);
      }
      CHECK(next == experts);
    }
  }
}

TEST_CASE("placement: groups stay together", "[mpi]") {
  const Placement placement(12, 2, 4);  // three groups of four: one and two
  CHECK(placement.first(0) == 0);
  CHECK(placement.first(1) == 4);
  CHECK(placement.count(1) == 8);
  const Placement many(8, 3, 4);  // more ranks than groups
  CHECK(many.count(0) + many.count(1) + many.count(2) == 8);
  for (int r = 0; r < 3; ++r) CHECK(many.count(r) % 4 == 0);
}

TEST_CASE("placement: shared experts are on rank 0, before the groups", "[mpi]") {
  const Placement placement(2 + 12, 2, 4, 2);  // two shared, three groups of four
  CHECK(placement.first(0) == 0);
  CHECK(placement.first(1) == 6);
  CHECK(placement.count(1) == 8);
  CHECK_THROWS_WITH(Placement(8, 2, 1, 9),
                    "moe: Placement: 9 shared experts, must be from 0 to 8 experts");
}

TEST_CASE("placement: what makes no sense is refused", "[mpi]") {
  CHECK_THROWS_WITH(Placement(8, 0), "moe: Placement: 0 ranks, must be at least 1");
  CHECK_THROWS_WITH(Placement(8, 2, 3),
                    "moe: Placement: units of 3 experts, must be at least 1 and divide 8");
  CHECK_THROWS_WITH(Placement(8, 2, 0),
                    "moe: Placement: units of 0 experts, must be at least 1 and divide 8");
}
