#include "moe/config.hpp"

#include <cstddef>
#include <string>
#include <string_view>

#include "catch.hpp"

using Catch::Matchers::Equals;
using Catch::Matchers::StartsWith;
using moe::detail::require;

TEST_CASE("config: a condition that holds is silent", "[config]") {
  CHECK_NOTHROW(require(true));
  CHECK_NOTHROW(require(true, "never read ", 1));
}

TEST_CASE("config: a broken condition is an invalid_argument that joins its parts", "[config]") {
  const std::string field = "experts";
  const std::string_view reason = "at least";
  CHECK_THROWS_AS(require(false, "x"), std::invalid_argument);
  CHECK_THROWS_WITH(require(false), Equals("moe: "));
  CHECK_THROWS_WITH(require(false, field, " = ", -3, ", must be ", reason, " 1 and below ",
                            Eigen::Index{1} << 40),
                    Equals("moe: experts = -3, must be at least 1 and below 1099511627776"));
}

TEST_CASE("config: every number type can be a part of a message", "[config]") {
  CHECK_THROWS_WITH(require(false, std::size_t{7}, " ", Eigen::Index{-8}, " ", 9u),
                    Equals("moe: 7 -8 9"));
  CHECK_THROWS_WITH(require(false, "dropout = ", 1.5f), StartsWith("moe: dropout = 1.5"));
  CHECK_THROWS_WITH(require(false, "momentum = ", -0.25), StartsWith("moe: momentum = -0.25"));
}
