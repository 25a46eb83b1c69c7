#include "moe/layer/balance_record.hpp"

#include <algorithm>
#include <clocale>
#include <cmath>
#include <limits>
#include <vector>

#include "../support.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/layer/moe_layer.hpp"

// balance_record(): figures worked by hand on a routing written here, and those of real gates.

namespace {

using moe::Index;

/// Four tokens, five experts, five slots: one token with an even choice, one sure of its own, one with
/// weights 1 : 3, one without any.
moe::GateTape<double> tape_by_hand() {
  moe::GateTape<double> tape;
  tape.routing.experts = 5;
  for (const Index offset : {0, 2, 3, 5, 5}) tape.routing.token_offsets.push_back(offset);
  for (const Index e : {0, 1, 1, 1, 3}) tape.routing.expert.push_back(e);
  for (const double w : {0.5, 0.5, 0.8, 0.1, 0.3}) tape.routing.weight.push_back(w);
  tape.balance.loss = 0.25;
  tape.balance.importance.resize(5);
  tape.balance.importance << 0.5, 1.4, 0, 0.3, 0;
  tape.balance.load.resize(5);
  tape.balance.load << 1, 3, 0, 1, 0;
  for (const Index count : {1, 3, 0, 1, 0}) tape.balance.tokens_per_expert.push_back(count);
  return tape;
}

}  // namespace

TEST_CASE("balance record: figures worked by hand", "[layer]") {
  const auto record = moe::balance_record(tape_by_hand(), "middle", 7, 2);
  CHECK(record.step == 7);
  CHECK(record.layer == "middle");
  CHECK(record.tokens == 4);
  CHECK(record.slots == 5);
  CHECK(record.unused_experts == 2);
  // The mean load is 1, its squared differences 0, 4, 1, 0, 1.
  CHECK_THAT(record.cv_load, Catch::Matchers::WithinAbs(std::sqrt(6.0 / 5), 1e-12));
  // The mean importance is 0.44, the squares 0.25, 1.96, 0, 0.09, 0: variance 0.46 - 0.1936.
  CHECK_THAT(record.cv_importance, Catch::Matchers::WithinAbs(std::sqrt(0.2664) / 0.44, 1e-12));
  CHECK_THAT(record.max_over_mean_load, Catch::Matchers::WithinAbs(3, 1e-12));
  CHECK_THAT(record.loss, Catch::Matchers::WithinAbs(0.25, 0));
  // ln 2, 0 and ln 4 - 3/4·ln 3, of three tokens.
  const double entropy = (std::log(2.0) + std::log(4.0) - 0.75 * std::log(3.0)) / 3;
  CHECK_THAT(record.gate_entropy, Catch::Matchers::WithinAbs(entropy, 1e-12));
  CHECK_THAT(record.unrouted_tokens, Catch::Matchers::WithinAbs(0.25, 1e-12));
  CHECK_THAT(record.drop_rate, Catch::Matchers::WithinAbs(3.0 / 8, 1e-12));
  CHECK(moe::balance_record(tape_by_hand(), "middle", 7).drop_rate == 0);
}

TEST_CASE("balance record: the entropy leaves out tokens whose weights sum to 0 or less",
          "[layer]") {
  const auto entropy_with = [](std::vector<double> weights) {
    auto tape = tape_by_hand();
    for (std::size_t s = 0; s < weights.size(); ++s) tape.routing.weight[s] = weights[s];
    return moe::balance_record(tape, "", 1).gate_entropy;
  };
  // Left of the three tokens: 0 and ln 4 - 3/4·ln 3, or ln 2 and the latter.
  const double uneven = std::log(4.0) - 0.75 * std::log(3.0);
  CHECK_THAT(entropy_with({0, 0}), Catch::Matchers::WithinAbs(uneven / 2, 1e-12));
  CHECK_THAT(entropy_with({-0.5, -0.5}), Catch::Matchers::WithinAbs(uneven / 2, 1e-12));
  CHECK_THAT(entropy_with({0.1, -0.3}), Catch::Matchers::WithinAbs(uneven / 2, 1e-12));
  CHECK_THAT(entropy_with({0.5, 0.5, -0.8}),
             Catch::Matchers::WithinAbs((std::log(2.0) + uneven) / 2, 1e-12));
  CHECK(entropy_with({-1, -1, -1, -1, -1}) == 0);
  // What the entropy is not defined for shows.
  CHECK(std::isnan(entropy_with({0.7, -0.2})));
  CHECK(std::isnan(entropy_with({std::numeric_limits<double>::quiet_NaN()})));
  CHECK(std::isnan(entropy_with({-1, -1, std::numeric_limits<double>::quiet_NaN()})));
}

TEST_CASE("balance record: a header and rows of CSV", "[layer]") {
  CHECK(moe::BalanceRecord::csv_header() ==
        "step,layer,tokens,slots,loss,cv_importance,cv_load,max_over_mean_load,unused_experts,"
        "gate_entropy,unrouted_tokens,drop_rate");
  moe::BalanceRecord record;
  record.step = std::numeric_limits<std::uint64_t>::max();
  record.layer = "layer 3";
  record.tokens = 64;
  record.slots = 128;
  record.loss = std::numeric_limits<double>::quiet_NaN();
  record.cv_importance = 1.0 / 3;
  record.cv_load = 1e-12;
  record.max_over_mean_load = std::numeric_limits<double>::infinity();
  record.unused_experts = 2;
  record.gate_entropy = 0.5;
  record.unrouted_tokens = 1;
  record.drop_rate = 0.015625;
  const char* numbers = ",64,128,nan,0.333333333,1e-12,inf,2,0.5,1,0.015625";
  const std::string step = "18446744073709551615,";
  CHECK(record.csv_row() == step + "layer 3" + numbers);
  record.layer = "a \"b\", c\n";
  CHECK(record.csv_row() == step + "\"a \"\"b\"\", c\n\"" + numbers);
}

TEST_CASE("balance record: numbers have a point in every locale", "[layer]") {
  const std::string before = std::setlocale(LC_NUMERIC, nullptr);
  moe::BalanceRecord record;
  record.loss = 0.5;
  const std::string row = record.csv_row();
  for (const char* locale : {"de_DE.UTF-8", "fr_FR.UTF-8", "nl_NL"}) {
    if (std::setlocale(LC_NUMERIC, locale) != nullptr) CHECK(record.csv_row() == row);
  }
  std::setlocale(LC_NUMERIC, before.c_str());
}

TEST_CASE("balance record: choices dropped over capacity, and padding", "[layer]") {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>, moe::TopKGate<float>>;
  // A capacity of half the places: an expert takes two of the six valid tokens' twelve choices.
  Layer layer({.width = 4,
               .expert = {.hidden = 4},
               .gate = {.experts = 3, .top_k = 2, .capacity_factor = 0.5},
               .seed = 1});
  const auto x = moe::test::random_matrix<float>(8, 4, 2);
  const std::vector<std::uint8_t> valid{1, 1, 0, 1, 1, 1, 0, 1};
  Layer::Tape tape;
  layer.forward(x, tape, {.step = 1, .valid = valid});
  const auto record = moe::balance_record(tape.gate, "", 1, 2);
  CHECK(record.tokens == 6);
  // The load is that of before anything was dropped.
  double places = 0;
  for (const float load : tape.balance().load) places += std::min(2.0, static_cast<double>(load));
  CHECK(static_cast<double>(record.slots) == places);
  CHECK_THAT(record.drop_rate,
             Catch::Matchers::WithinAbs(1 - static_cast<double>(record.slots) / 12, 1e-12));
  CHECK(record.drop_rate >= 0.5);
  CHECK_THAT(record.cv_load,
             Catch::Matchers::WithinAbs(static_cast<double>(tape.balance().cv_load()), 0));
}

TEST_CASE("balance record: a batch without tokens has zeros", "[layer]") {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
  Layer layer({.width = 4, .expert = {.hidden = 4}, .gate = {.experts = 3, .top_k = 2}, .seed = 1});
  Layer::Tape tape;
  layer.evaluate(moe::Matrix<float>(0, 4), tape);
  const auto record = moe::balance_record(tape.gate, "empty", 0, 2);
  CHECK(record.csv_row() == "0,empty,0,0,0,0,0,0,3,0,0,0");
}

TEST_CASE("balance record: what cannot be is refused", "[layer]") {
  using Catch::Matchers::Contains;
  CHECK_THROWS_WITH(moe::balance_record(moe::GateTape<float>(), "last", 1),
                    Contains("balance_record: no pass on the tape of layer \"last\""));
  CHECK_THROWS_WITH(moe::balance_record(tape_by_hand(), "last", 1, 1),
                    Contains("has 5 slots of 4 tokens, top_k = 1"));
  CHECK_THROWS_WITH(moe::balance_record(tape_by_hand(), "last", 1, -1), Contains("top_k = -1"));
}
