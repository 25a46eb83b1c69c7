#include "moe/routing/choices.hpp"

#include "../support.hpp"

using namespace moe;
using Indices = std::vector<Index>;

TEMPLATE_TEST_CASE("choices: those kept become slots in the order of the experts", "[routing]",
                   float, double) {
  detail::Choices<TestType> choices;
  choices.resize(3, 2);
  CHECK(choices.keeps == std::vector<unsigned char>(6, 1));
  choices.expert = {4, 1, 0, 3, 2, 0};
  choices.weight = {1, 2, 3, 4, 5, 6};
  choices.keeps = {1, 1, 0, 0, 0, 1};
  Routing<TestType> routing;
  detail::make_slots(choices, TestType{10}, Index{5}, routing);
  CHECK(routing.experts == 5);
  CHECK(routing.token_offsets == Indices{0, 2, 2, 3});
  CHECK(routing.expert == Indices{1, 4, 0});
  CHECK(routing.weight == std::vector<TestType>{20, 10, 60});
  CHECK(choices.slot[0] == 1);
  CHECK(choices.slot[1] == 0);
  CHECK(choices.slot[5] == 2);
  CHECK_NOTHROW(detail::check_routing(routing));
}

TEST_CASE("choices: no tokens make no slots", "[routing]") {
  detail::Choices<float> choices;
  choices.resize(0, 2);
  Routing<float> routing;
  detail::make_slots(choices, 1.0f, Index{5}, routing);
  CHECK(routing.token_offsets == Indices{0});
  CHECK(routing.slots() == 0);
}
