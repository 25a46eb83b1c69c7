#include "moe/mpi/config_fields.hpp"

#include <string>
#include <vector>

#include "moe/moe.hpp"
#include "support.hpp"

using namespace moe;

namespace {

template <class Config>
std::vector<std::int64_t> fields_of(const Config& config) {
  std::vector<std::int64_t> fields;
  const auto add = [&](std::int64_t field) { fields.push_back(field); };
  detail::for_each_field(config, add);
  return fields;
}

struct Inner {
  int a = 1;
  bool b = true;
};
struct Outer {
  Index first = 7;
  Inner inner{};
  std::string text = "passed by";
  double half = 0.5;
  Activation activation = Activation::silu;
};
struct Empty {};
struct WithSeed {
  int before = 1;
  Seed seed;  // must be given
  int after = 2;
};

}  // namespace

TEST_CASE("config fields: every number, flag and enumerator in order", "[mpi]") {
  CHECK(fields_of(Outer{}) == std::vector<std::int64_t>{7, 1, 1, std::bit_cast<std::int64_t>(0.5),
                                                        static_cast<int>(Activation::silu)});
  CHECK(fields_of(Empty{}).empty());
  CHECK(detail::field_count<Outer>() == 5);
  CHECK(detail::field_count<Empty>() == 0);
  CHECK(detail::field_count<WithSeed>() == 3);
  CHECK(fields_of(WithSeed{.seed = 5}) == std::vector<std::int64_t>{1, 5, 2});
}

TEST_CASE("config fields: every field of every gate and layer counts", "[mpi]") {
  using Layer = MoELayer<Expert<FeedForward>, SharedExpertGate<TopKGate<float>>>;
  const Layer::Config config{.seed = 1};
  // Width; the expert's five; the gate's three and its routed one's 24; output and seed.
  CHECK(fields_of(config).size() == 1 + 5 + 3 + detail::field_count<TopKConfig>() + 2);
  Layer::Config other{.seed = 1};
  other.gate.routed.init_stddev = 0.03;  // the last one
  CHECK(fields_of(config) != fields_of(other));
  other = {.seed = 1};
  other.expert.recompute = true;
  CHECK(fields_of(config) != fields_of(other));
  other = {.seed = 1};
  other.gate.routed.place_order = PlaceOrder::first_choices;
  CHECK(fields_of(config) != fields_of(other));
  CHECK(fields_of(config) != fields_of(Layer::Config{.seed = 2}));
  CHECK(fields_of(config) == fields_of(Layer::Config{.seed = 1}));
}
