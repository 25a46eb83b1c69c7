#include <string>
#include <vector>

#include "../../examples/language_model/load_map.hpp"
#include "../catch.hpp"

/// \file
/// The picture of the experts' load in a training of the language model.

using namespace language_model;
using Catch::Matchers::Contains;

namespace {

moe::Balance<float> balance_of(std::vector<Index> tokens) {
  moe::Balance<float> balance;
  balance.tokens_per_expert.assign(tokens.begin(), tokens.end());
  return balance;
}

}  // namespace

TEST_CASE("language model: two columns of the load become one when there are too many",
          "[examples][language_model]") {
  LoadMap map(2);
  for (Index update = 0; update < 64; ++update) map.add(balance_of({update % 2 * 2, 3}));
  CHECK(map.updates_per_column() == 1);
  CHECK(map.tokens().rows() == 64);
  LoadMap full(2);  // goes on before its columns are halved
  full.resume(64, map.tokens());
  CHECK(full.updates_per_column() == 1);
  map.add(balance_of({6, 0}));
  CHECK(map.updates() == 65);
  CHECK(map.updates_per_column() == 2);
  REQUIRE(map.tokens().rows() == 33);
  CHECK(map.tokens()(0, 0) == 2);
  CHECK(map.tokens()(31, 1) == 6);
  CHECK(map.tokens()(32, 0) == 6);
  CHECK(map.load(0, 0) == 0.5);  // 2 of a mean of 4
  CHECK(map.load(0, 1) == 1.5);
  CHECK(map.load(32, 0) == 2);
  CHECK(map.load(32, 1) == 0);
  map.add(balance_of({0, 2}));
  REQUIRE(map.tokens().rows() == 33);
  CHECK(map.load(32, 1) == 0.5);  // 6 and 2

  // It goes on in the middle of a column, and where one ends.
  for (const Index more : {0, 1}) {
    LoadMap whole = map;
    for (Index i = 0; i < more; ++i) whole.add(balance_of({5, 5}));
    LoadMap resumed(2);
    resumed.resume(whole.updates(), whole.tokens());
    for (Index i = 0; i < 100; ++i) {
      whole.add(balance_of({i, 3}));
      resumed.add(balance_of({i, 3}));
    }
    CHECK(resumed.updates_per_column() == 4);
    CHECK(resumed.tokens() == whole.tokens());
  }
  LoadMap other(3);
  CHECK_THROWS_WITH(other.resume(66, map.tokens()), Contains("3 experts") && Contains("33 x 2"));
  LoadMap shorter(2);
  CHECK_THROWS_AS(shorter.resume(64, map.tokens()), std::invalid_argument);
}

TEST_CASE("language model: the picture has a row for each expert and a colour for each load",
          "[examples][language_model]") {
  CHECK(std::string(colour_of_load(0).text) == "none");
  CHECK(std::string(colour_of_load(0.2).text) == "below 1/4");
  CHECK(std::string(colour_of_load(0.8).text) == "to 1.25");
  CHECK(std::string(colour_of_load(1).text) == "to 1.25");
  CHECK(std::string(colour_of_load(3.9).text) == "to 4");
  CHECK(std::string(colour_of_load(1e9).text) == "above 4");

  LoadMap map(2);
  map.add(balance_of({0, 8}));
  map.add(balance_of({4, 4}));
  const std::string text = load_picture({{"sparse", map}, {"without updates", LoadMap(2)}}).text();
  CHECK_THAT(text, Contains("sparse: load of 2 experts (rows) over the mean, in 2 updates"));
  CHECK_THAT(text, !Contains("without updates"));
  // Two columns of 384 pixels; two rows of 12 below the title: none and the mean, twice the mean and
  // the mean.
  CHECK_THAT(text, Contains("fill=\"#20304c\" d=\"M12 32h384v12h-384z\""));
  CHECK_THAT(text, Contains("fill=\"#f4f4f0\" d=\"M396 32h384v12h-384zM396 44h384v12h-384z\""));
  CHECK_THAT(text, Contains("fill=\"#e8814d\" d=\"M12 44h384v12h-384z\""));
}
