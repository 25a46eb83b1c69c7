#include "moe/layer/balance_text.hpp"

#include <limits>
#include <vector>

#include "../support.hpp"
#include "moe/layer/moe_layer.hpp"

using namespace moe;

namespace {

/// Loads of mean 2: the squared differences are 1, 1, 4 and 4.
Balance<double> balance_by_hand() {
  Balance<double> balance;
  balance.loss = 0.25;
  balance.importance.resize(4);
  balance.importance << 1, 1, 1, 1;
  balance.load.resize(4);
  balance.load << 1, 3, 0, 4;
  for (const Index count : {1, 3, 0, 3}) balance.tokens_per_expert.push_back(count);
  return balance;
}

}  // namespace

TEST_CASE("balance text: worked by hand", "[layer]") {
  // sqrt(2.5)/2 = 0.790569...
  const std::string figures =
      "loss 0.25, cv_importance 0, cv_load 0.791, max/mean 2, unused 1 of 4";
  const Balance<double> balance = balance_by_hand();
  CHECK(to_string(balance) == figures + "\ntokens of experts, most first: 1: 3, 3: 3, 0: 1, 2: 0");
  CHECK(to_string(balance, 4) == to_string(balance));
  CHECK(to_string(balance, 3) ==
        figures + "\ntokens of experts, most first: 1: 3, 3: 3, 0: 1, ... 1 more");
  CHECK(to_string(balance, 1) == figures + "\ntokens of experts, most first: 1: 3, ... 3 more");
  CHECK(to_string(balance, 0) == figures);
}

TEST_CASE("balance text: NaN, no pass, and what is refused", "[layer]") {
  Balance<double> balance = balance_by_hand();
  balance.loss = std::numeric_limits<double>::quiet_NaN();
  CHECK_THAT(to_string(balance), Catch::Matchers::StartsWith("loss nan, cv_importance 0, "));
  CHECK(to_string(Balance<float>()) ==
        "loss 0, cv_importance 0, cv_load 0, max/mean 0, unused 0 of 0");
  CHECK_THROWS_WITH(to_string(balance, -1),
                    "moe: to_string(Balance): most_experts = -1, must be at least 0");
}

TEST_CASE("balance text: of a layer's pass", "[layer]") {
  using Layer = MoELayer<Expert<FeedForward>>;
  const Layer layer(
      {.width = 4, .expert = {.hidden = 4}, .gate = {.experts = 3, .top_k = 3}, .seed = 1});
  Layer::Tape tape;
  layer.forward(test::random_matrix<float>(5, 4, 2), tape, {.step = 1});
  CHECK_THAT(
      to_string(tape.balance()),
      Catch::Matchers::EndsWith("unused 0 of 3\ntokens of experts, most first: 0: 5, 1: 5, 2: 5"));
}
