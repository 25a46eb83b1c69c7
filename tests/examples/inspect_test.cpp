#include <string>

#include "../../examples/inspect/formats.hpp"
#include "../../examples/inspect/routes.hpp"
#include "../support.hpp"

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

TEST_CASE("inspect: a batch in every format, and why one is refused", "[examples][inspect]") {
  MoELayer<Expert<FeedForward>, TopKGate<>> layer(
      {.width = 32, .expert = {.hidden = 64}, .gate = {.experts = 3, .top_k = 2}, .seed = 1});
  const auto x = test::random_matrix<float>(5, 32, 2);
  const Matrix<float> y = layer.evaluate(x);
  const auto serve = [&](const std::string& format) {
    const inspect::Served served = inspect::serve(format, layer, x, y);
    CHECK(served.format == format);
    return served;
  };
  const Index weights = 3 * 2 * 32 * 64;
  CHECK(serve("float").bytes == 4 * weights);
  CHECK(serve("float").difference == 0);
  CHECK(serve("bfloat16").bytes == 2 * weights);
  CHECK(serve("float16").bytes == 2 * weights);
  CHECK(serve("int8").bytes == weights + weights / 16);
  CHECK(serve("int4").bytes == weights / 2 + weights / 16);
  double last = 0;
  for (const char* format : {"float16", "bfloat16", "int8+int8", "int4+int8"}) {
    const inspect::Served served = serve(format);
    CHECK(served.refusal.empty());
    CHECK(served.difference > last);
    CHECK(served.difference < 0.3);
    last = served.difference;
  }
  CHECK(serve("int8").difference < serve("int8+int8").difference);
  CHECK(serve("int4").difference != serve("int4+int8").difference);

  for_each_parameter(layer, [](const std::string& name, auto& parameter) {
    if (name == "experts.2.down.weight") parameter.value(7, 3) = 1e6f;
  });
  CHECK_THAT(serve("float16").refusal,
             Catch::Matchers::Contains("experts.2.down.weight(7, 3) = 1e+06 is too large"));
  CHECK(serve("bfloat16").refusal.empty());
}
