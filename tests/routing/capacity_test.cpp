#include "moe/routing/capacity.hpp"

#include <cstdint>
#include <vector>

#include "../support.hpp"

using namespace moe;
using Indices = std::vector<Index>;
using Flags = std::vector<unsigned char>;

namespace {

constexpr PlaceOrder all_orders[] = {PlaceOrder::rows, PlaceOrder::first_choices,
                                     PlaceOrder::largest_weight, PlaceOrder::best_tokens};

template <class Scalar>
Flags kept(PlaceOrder how, Index capacity, Index experts, Index top_k, const Indices& expert,
           const std::vector<Scalar>& weight, const Flags& before = {},
           const detail::PlaceSequences& sequences = {}) {
  detail::Choices<Scalar> choices;
  choices.resize(static_cast<Index>(expert.size()) / top_k, top_k);
  choices.expert = expert;
  choices.weight = weight;
  if (!before.empty()) choices.keeps = before;
  detail::CapacityScratch<Scalar> scratch;
  detail::drop_over_capacity(how, capacity, experts, sequences, choices, scratch);
  return choices.keeps;
}

}  // namespace

TEST_CASE("capacity: places of an expert", "[routing]") {
  CHECK(detail::expert_capacity(1, 16, 1, 4) == 4);
  CHECK(detail::expert_capacity(1.25, 16, 1, 4) == 5);
  CHECK(detail::expert_capacity(1, 17, 1, 4) == 5);
  CHECK(detail::expert_capacity(1, 16, 2, 4) == 8);
  CHECK(detail::expert_capacity(1.1, 100, 1, 10) == 11);  // more than 11 in binary
  CHECK(detail::expert_capacity(1.1, 40, 1, 4) == 11);
  CHECK(detail::expert_capacity(0.7, 40, 1, 4) == 7);
  CHECK(detail::expert_capacity(100, 16, 2, 4) == 16);
  CHECK(detail::expert_capacity(1e300, 16, 2, 4) == 16);
  CHECK(detail::expert_capacity(1e-9, 1, 1, 131072) == 1);
  CHECK(detail::expert_capacity(2, 0, 2, 4) == 0);
}

TEMPLATE_TEST_CASE("capacity: who finds a place, in each order", "[routing]", float, double) {
  using S = TestType;
  // Four tokens of two choices; expert 0 is chosen second, first, first, second, and expert 1 first,
  // second, -, first.
  const Indices expert = {1, 0, 0, 1, 0, 2, 1, 0};
  const std::vector<S> weight = {S(0.6), S(0.4), S(0.9), S(0.1), S(0.3), S(0.2), S(0.5), S(0.45)};
  CHECK(kept(PlaceOrder::rows, 2, 3, 2, expert, weight) == Flags{1, 1, 1, 1, 0, 1, 0, 0});
  CHECK(kept(PlaceOrder::first_choices, 2, 3, 2, expert, weight) == Flags{1, 0, 1, 0, 1, 1, 1, 0});
  CHECK(kept(PlaceOrder::largest_weight, 2, 3, 2, expert, weight) == Flags{1, 0, 1, 0, 0, 1, 1, 1});
  for (const auto how : all_orders) {
    CHECK(kept(how, 4, 3, 2, expert, weight) == Flags(8, 1));
    CHECK(kept(how, 0, 3, 2, expert, weight) == Flags(8, 0));
    CHECK(kept<S>(how, 1, 3, 2, {}, {}).empty());
  }
}

TEMPLATE_TEST_CASE("capacity: first choices come first, the best tokens' before others",
                   "[routing]", float, double) {
  using S = TestType;
  // The tokens by the weight of their first choice: 2, 0, 3, 1. Expert 0 is the first choice of 0, 1, 2
  // and the second one of 3; expert 1 the second one of 0 and 2 and the first one of 3.
  const Indices expert = {0, 1, 0, 2, 0, 1, 1, 0};
  const std::vector<S> weight = {S(0.7), S(0.2), S(0.3), S(0.3), S(0.9), S(0.05), S(0.6), S(0.4)};
  CHECK(kept(PlaceOrder::best_tokens, 1, 3, 2, expert, weight) == Flags{0, 0, 0, 1, 1, 0, 1, 0});
  CHECK(kept(PlaceOrder::best_tokens, 2, 3, 2, expert, weight) == Flags{1, 0, 0, 1, 1, 1, 1, 0});
  CHECK(kept(PlaceOrder::best_tokens, 3, 3, 2, expert, weight) == Flags{1, 1, 1, 1, 1, 1, 1, 0});
  // Ties go by row, NaN comes last.
  const S nan = std::numeric_limits<S>::quiet_NaN();
  CHECK(kept<S>(PlaceOrder::best_tokens, 2, 1, 1, {0, 0, 0, 0}, {1, nan, 1, 2}) ==
        Flags{1, 0, 0, 1});
}

TEMPLATE_TEST_CASE("capacity: what was dropped before takes no place", "[routing]", float, double) {
  using S = TestType;
  const Indices expert = {0, 1, 0, 1, 0, 1};
  const std::vector<S> weight = {3, 3, 2, 2, 1, 1};
  const Flags before = {1, 0, 1, 1, 1, 1};
  for (const auto how : all_orders) {
    CHECK(kept(how, 2, 2, 2, expert, weight, before) == Flags{1, 0, 1, 1, 0, 1});
  }
}

TEMPLATE_TEST_CASE("capacity: each sequence has places of its own", "[routing]", float, double) {
  using S = TestType;
  ValidTokens tokens;
  const auto kept_of = [&](PlaceOrder how, Index capacity, RowOrder order,
                           const std::vector<std::uint8_t>& valid, const Indices& expert,
                           const std::vector<S>& weight, Index top_k = 1) {
    find_valid_tokens(static_cast<Index>(valid.size()), valid, nullptr, tokens);
    return kept(how, capacity, 2, top_k, expert, weight, {}, {2, order, &tokens});
  };
  // Two sequences of three rows, all of which choose expert 1: rows 0, 2, 4 and 1, 3, 5, or 0 to 2 and 3 to 5.
  const std::vector<std::uint8_t> all(6, 1);
  const Indices one(6, 1);
  const std::vector<S> up = {1, 2, 3, 4, 5, 6};
  for (const auto how : {PlaceOrder::rows, PlaceOrder::first_choices}) {
    CHECK(kept_of(how, 1, RowOrder::time_major, all, one, up) == Flags{1, 1, 0, 0, 0, 0});
    CHECK(kept_of(how, 2, RowOrder::time_major, all, one, up) == Flags{1, 1, 1, 1, 0, 0});
    CHECK(kept_of(how, 1, RowOrder::sequence_major, all, one, up) == Flags{1, 0, 0, 1, 0, 0});
  }
  for (const auto how : {PlaceOrder::largest_weight, PlaceOrder::best_tokens}) {
    CHECK(kept_of(how, 1, RowOrder::time_major, all, one, up) == Flags{0, 0, 0, 0, 1, 1});
    CHECK(kept_of(how, 1, RowOrder::sequence_major, all, one, up) == Flags{0, 0, 1, 0, 0, 1});
  }
  // Tokens in rows 1, 2, 3 and 5 only.
  const std::vector<std::uint8_t> some = {0, 1, 1, 1, 0, 1};
  const Indices four(4, 1);
  CHECK(kept_of(PlaceOrder::rows, 1, RowOrder::time_major, some, four, {1, 1, 1, 1}) ==
        Flags{1, 1, 0, 0});
  CHECK(kept_of(PlaceOrder::rows, 1, RowOrder::sequence_major, some, four, {1, 1, 1, 1}) ==
        Flags{1, 0, 1, 0});
  // Two choices of two tokens for each sequence: rows 0 and 1, and 2 and 3.
  CHECK(kept_of(PlaceOrder::first_choices, 1, RowOrder::sequence_major, {1, 1, 1, 1},
                {0, 1, 1, 0, 1, 0, 1, 0}, std::vector<S>(8, S{1}),
                2) == Flags{1, 0, 1, 0, 1, 1, 0, 0});
}

TEMPLATE_TEST_CASE("capacity: equal weights go by row, NaN last", "[routing]", float, double) {
  using S = TestType;
  const S nan = std::numeric_limits<S>::quiet_NaN();
  CHECK(kept<S>(PlaceOrder::largest_weight, 2, 1, 1, {0, 0, 0, 0}, {1, 2, 1, 1}) ==
        Flags{1, 1, 0, 0});
  CHECK(kept<S>(PlaceOrder::largest_weight, 2, 1, 1, {0, 0, 0, 0}, {nan, 0, nan, 1}) ==
        Flags{0, 1, 0, 1});
}
