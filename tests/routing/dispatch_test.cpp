#include "moe/routing/dispatch.hpp"

#include <random>

#include "../support.hpp"

using namespace moe;
using Indices = IndexedVector<Index>;

namespace {

/// Four tokens, three experts. Token 1 goes nowhere, token 3 everywhere.
Routing<float> small_routing() {
  Routing<float> routing;
  routing.experts = 3;
  routing.token_offsets = {0, 2, 2, 3, 6};
  routing.expert = {0, 2, 2, 0, 1, 2};
  routing.weight = {0.25f, 0.75f, 1.0f, 0.5f, 0.25f, 0.25f};
  return routing;
}

/// Any number of slots a token, none included.
Routing<double> random_routing(Index tokens, Index experts, std::uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](Index n) {
    return static_cast<Index>(random() % static_cast<std::uint32_t>(n));
  };
  Routing<double> routing;
  routing.experts = experts;
  routing.token_offsets = {0};
  for (Index t = 0; t < tokens; ++t) {
    const Index probability = below(5);
    for (Index e = 0; e < experts; ++e) {
      if (below(4) < probability) {
        routing.expert.push_back(e);
        routing.weight.push_back(static_cast<double>(random()));
      }
    }
    routing.token_offsets.push_back(routing.slots());
  }
  return routing;
}

}  // namespace

TEST_CASE("dispatch: offsets are the running count of slots by expert", "[routing][dispatch]") {
  Indices offsets = {9, 9};  // what was there is forgotten
  detail::count_offsets(Indices{2, 0, 2, 3, 2}, 5, offsets);
  CHECK(offsets == Indices{0, 1, 1, 4, 5, 5});
  detail::count_offsets({}, 2, offsets);
  CHECK(offsets == Indices{0, 0, 0});
}

TEST_CASE("dispatch: slots are sorted by expert and keep their order within one",
          "[routing][dispatch]") {
  const Indices expert = {2, 0, 2, 3, 2};
  Indices offsets = {0, 1, 1, 4, 5, 5};
  Indices sorted_slot;
  detail::sort_slots(expert, offsets, sorted_slot);
  CHECK(sorted_slot == Indices{1, 0, 2, 4, 3});
  CHECK(offsets == Indices{0, 1, 1, 4, 5, 5});
}

TEST_CASE("dispatch: grouping gives rows by expert and their way back", "[routing][dispatch]") {
  Routing<float> routing = small_routing();
  Dispatch<float> dispatch;
  sort_by_expert(routing, dispatch);
  // slot    0 1 2 3 4 5
  // expert  0 2 2 0 1 2
  // token   0 0 2 3 3 3
  CHECK(dispatch.offsets == Indices{0, 2, 3, 6});
  CHECK(dispatch.sorted_slot == Indices{0, 3, 4, 1, 2, 5});
  CHECK(dispatch.token == Indices{0, 3, 3, 0, 2, 3});
  CHECK(dispatch.weight == IndexedVector<float>{0.25f, 0.5f, 0.25f, 0.75f, 1.0f, 0.25f});
  CHECK(dispatch.sorted_position == Indices{0, 3, 4, 1, 2, 5});
  CHECK(routing.tokens() == 4);
  CHECK(routing.slots() == 6);
  CHECK(dispatch.slots_of(0) == 2);
  CHECK(dispatch.slots_of(1) == 1);
  CHECK(dispatch.slots_of(2) == 3);
}

TEST_CASE("dispatch: a row's slot and a slot's row are not the same list", "[routing][dispatch]") {
  // In small_routing() the two lists happen to be equal.
  Routing<float> routing;
  routing.experts = 2;
  routing.token_offsets = {0, 1, 2, 3};
  routing.expert = {1, 1, 0};
  routing.weight = {1, 1, 1};
  Dispatch<float> dispatch;
  sort_by_expert(routing, dispatch);
  CHECK(dispatch.sorted_slot == Indices{2, 0, 1});
  CHECK(dispatch.sorted_position == Indices{1, 2, 0});
  CHECK(dispatch.token == Indices{2, 0, 1});
}

TEST_CASE("dispatch: every slot is in the rows of its expert exactly once", "[routing][dispatch]") {
  for (std::uint32_t seed = 0; seed < 60; ++seed) {
    const Index tokens = static_cast<Index>(seed * seed % 97);
    const Index experts = 1 + static_cast<Index>(seed % 13);
    Routing<double> routing = random_routing(tokens, experts, seed);
    const Routing<double> made = routing;
    Dispatch<double> dispatch;
    sort_by_expert(routing, dispatch);
    CHECK(routing.expert == made.expert);
    CHECK(routing.weight == made.weight);
    CHECK(routing.token_offsets == made.token_offsets);

    REQUIRE(static_cast<Index>(dispatch.offsets.size()) == experts + 1);
    CHECK(dispatch.offsets.front() == 0);
    CHECK(dispatch.offsets.back() == routing.slots());
    CHECK(std::is_sorted(dispatch.offsets.begin(), dispatch.offsets.end()));

    REQUIRE(dispatch.sorted_slot.size() == routing.expert.size());
    REQUIRE(dispatch.sorted_position.size() == routing.expert.size());
    REQUIRE(dispatch.token.size() == routing.expert.size());
    Indices sorted = dispatch.sorted_slot;
    std::sort(sorted.begin(), sorted.end());
    bool permutation = true;
    for (std::size_t i = 0; i < sorted.size(); ++i) {
      permutation = permutation && sorted[i] == static_cast<Index>(i);
    }
    CHECK(permutation);

    bool at_home = true;
    bool stable = true;
    bool token = true;
    bool inverse = true;
    for (Index e = 0; e < experts; ++e) {
      const Index first = dispatch.offsets[e];
      for (Index row = first; row < dispatch.offsets[e + 1]; ++row) {
        const Index slot = dispatch.sorted_slot[row];
        const Index t = dispatch.token[row];
        at_home = at_home && routing.expert[slot] == e;
        stable = stable && (row == first || dispatch.sorted_slot[row - 1] < slot);
        token = token && routing.token_offsets[t] <= slot && slot < routing.token_offsets[t + 1];
        inverse = inverse && dispatch.sorted_position[slot] == row;
      }
    }
    CHECK(at_home);
    CHECK(stable);
    CHECK(token);
    CHECK(inverse);
  }
}

TEST_CASE("dispatch: weights' gradients go back to their slots", "[routing][dispatch]") {
  Dispatch<float> dispatch;
  sort_by_expert(small_routing(), dispatch);
  const IndexedVector<float> by_position = {10, 11, 12, 13, 14, 15};
  IndexedVector<float> by_slot = {9};
  sort_by_expert_backward(dispatch, std::span<const float>(by_position), by_slot);
  CHECK(by_slot == IndexedVector<float>{10, 13, 14, 11, 12, 15});
}

TEST_CASE("dispatch: a token's slots are a range", "[routing][dispatch]") {
  const Routing<float> routing = small_routing();
  CHECK(routing.slots_of_token(0).first == 0);
  CHECK(routing.slots_of_token(0).count == 2);
  CHECK(routing.slots_of_token(1).count == 0);
  CHECK(routing.slots_of_token(3).first == 3);
  CHECK(routing.slots_of_token(3).count == 3);
}

TEST_CASE("dispatch: a routing can be grouped again with another size", "[routing][dispatch]") {
  const Routing<double> routing = random_routing(3, 4, 2);
  Dispatch<double> used;
  Dispatch<double> fresh;
  sort_by_expert(random_routing(50, 7, 1), used);
  sort_by_expert(routing, used);
  sort_by_expert(routing, fresh);
  CHECK(used.offsets == fresh.offsets);
  CHECK(used.sorted_slot == fresh.sorted_slot);
  CHECK(used.token == fresh.token);
  CHECK(used.weight == fresh.weight);
  CHECK(used.sorted_position == fresh.sorted_position);
}

TEST_CASE("dispatch: no tokens make no rows", "[routing][dispatch]") {
  Routing<float> routing;
  CHECK(routing.tokens() == 0);
  CHECK(routing.slots() == 0);
  routing.experts = 2;
  routing.token_offsets = {0};
  Dispatch<float> dispatch;
  sort_by_expert(routing, dispatch);
  CHECK(routing.tokens() == 0);
  CHECK(dispatch.offsets == Indices{0, 0, 0});
  CHECK(dispatch.sorted_slot.empty());
}

TEST_CASE("dispatch: a contradiction is refused before anything is grouped",
          "[routing][dispatch]") {
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Routing<float> routing = small_routing();
    spoil(routing);
    Dispatch<float> dispatch;
    CHECK_THROWS_AS(sort_by_expert(routing, dispatch), std::invalid_argument);
    CHECK_THROWS_WITH(sort_by_expert(routing, dispatch), message);
    CHECK(dispatch.offsets.empty());
    CHECK(dispatch.sorted_slot.empty());
    CHECK(dispatch.token.empty());
    CHECK(dispatch.sorted_position.empty());
  };
  const std::string offsets =
      "moe: Routing.token_offsets must run from 0 to the number of slots, 6";
  refuse([](auto& r) { r.weight.pop_back(); }, "moe: Routing.weight has 5 entries for 6 slots");
  refuse([](auto& r) { r.token_offsets.clear(); }, offsets);
  refuse([](auto& r) { r.token_offsets.front() = 1; }, offsets);
  refuse([](auto& r) { r.token_offsets.back() = 5; }, offsets);
  refuse([](auto& r) { r.token_offsets.back() = 7; }, offsets);
  refuse([](auto& r) { r.token_offsets[2] = 1; }, "moe: Routing.token_offsets descends at token 2");
  refuse([](auto& r) { r.token_offsets[2] = 4; }, "moe: Routing.token_offsets descends at token 3");
  refuse([](auto& r) { r.expert[4] = 3; }, "moe: Routing.expert = 3, must be in [0, 3)");
  refuse([](auto& r) { r.expert[4] = -1; }, "moe: Routing.expert = -1, must be in [0, 3)");
  refuse([](auto& r) { r.expert[1] = r.expert[0]; },
         "moe: Routing.expert does not ascend at slot 1 of token 0");
}
