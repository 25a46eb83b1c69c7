#include "../../examples/inspect/routes.hpp"
#include "../catch.hpp"

using namespace moe;

namespace {

/// Two tokens and a row of padding; experts 0 and 1 are shared.
Routing<float> routing() {
  Routing<float> routing;
  routing.experts = 6;
  routing.token_offsets = {0, 3, 3, 6};
  routing.expert = {0, 2, 5, 1, 2, 3};
  routing.weight = {1.0f, 0.25f, 0.75f, 0.5f, 0.125f, 0.125f};
  return routing;
}

}  // namespace

TEST_CASE("inspect: experts by their tokens, and the sums of their weights",
          "[examples][inspect]") {
  const auto shares = inspect::shares(routing());
  REQUIRE(shares.size() == 6);
  CHECK(shares[0].expert == 2);
  CHECK(shares[0].tokens == 2);
  CHECK(shares[0].weight == 0.375);
  // Those with as many tokens stay in their order.
  CHECK(shares[1].expert == 0);
  CHECK(shares[2].expert == 1);
  CHECK(shares[3].expert == 3);
  CHECK(shares[4].expert == 5);
  CHECK(shares[4].weight == 0.75);
  CHECK(shares[5].expert == 4);
  CHECK(shares[5].tokens == 0);
}

TEST_CASE("inspect: a token's experts by their weights", "[examples][inspect]") {
  CHECK(inspect::expert_name(1, 2) == "s1");
  CHECK(inspect::expert_name(2, 2) == "0");
  CHECK(inspect::expert_name(2, 0) == "2");
  CHECK(inspect::route_of(routing(), 0, 2) == "s0 (1.000)  3 (0.750)  0 (0.250)");
  CHECK(inspect::route_of(routing(), 1, 2).empty());
  CHECK(inspect::route_of(routing(), 2, 2) == "s1 (0.500)  0 (0.125)  1 (0.125)");
}
