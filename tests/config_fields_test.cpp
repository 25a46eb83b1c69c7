#include "moe/config_fields.hpp"

#include <string>
#include <utility>
#include <vector>

#include "moe/moe.hpp"
#include "support.hpp"

using namespace moe;

namespace {

template <class Config>
std::vector<std::int64_t> fields_of(const Config& config) {
  std::vector<std::int64_t> fields;
  detail::for_each_field(config, [&](const std::string&, const auto& field) {
    fields.push_back(detail::field_bits(field));
  });
  return fields;
}

template <class Config>
std::vector<std::string> names_of(const Config& config) {
  std::vector<std::string> names;
  detail::for_each_field(config,
                         [&](const std::string& name, const auto&) { names.push_back(name); });
  return names;
}

template <class Config>
std::vector<std::pair<std::string, std::string>> texts_of(const Config& config) {
  std::vector<std::pair<std::string, std::string>> texts;
  detail::for_each_named_field(config, [&](const std::string& name, const auto& field) {
    texts.emplace_back(name, detail::field_text(field));
  });
  return texts;
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

enum class Unnamed { zero, one };

struct Named {
  Index count = 3;
  Inner inner{};
  float third = 0.1f;
  Unnamed unnamed = Unnamed::one;
  std::vector<int> list{1, 2};
  Seed seed;

  template <class Self, class Visitor>
  static constexpr void visit_fields(Self& self, Visitor visit) {
    visit("count", self.count);
    visit("inner", self.inner);
    visit("third", self.third);
    visit("unnamed", self.unnamed);
    visit("list", self.list);
    visit("seed", self.seed);
  }
};

/// A configuration that has another one's fields and its own.
template <bool complete>
struct Derived : TopKConfig {
  double own = 1;

  template <class Self, class Visitor>
  static constexpr void visit_fields(Self& self, Visitor visit) {
    TopKConfig::visit_fields(self, visit);
    if constexpr (complete) visit("own", self.own);
  }
};

/// A visit_fields that does not suit its configuration in one of these ways.
enum class Fault { none, left_out, twice, last_left_out };

template <Fault fault>
struct Faulty {
  int a = 1;
  Seed seed;
  int b = 2;
  int c = 3;

  template <class Self, class Visitor>
  static constexpr void visit_fields(Self& self, Visitor visit) {
    visit("a", self.a);
    if constexpr (fault != Fault::left_out) visit("seed", self.seed);
    visit("b", self.b);
    if constexpr (fault == Fault::twice) visit("c", self.b);
    if constexpr (fault == Fault::none || fault == Fault::left_out) visit("c", self.c);
  }
};

}  // namespace

TEST_CASE("config fields: every number, flag and enumerator in order") {
  CHECK(fields_of(Outer{}) == std::vector<std::int64_t>{7, 1, 1, std::bit_cast<std::int64_t>(0.5),
                                                        static_cast<int>(Activation::silu)});
  CHECK(fields_of(Empty{}).empty());
  CHECK(detail::field_count<Outer>() == 5);
  CHECK(detail::field_count<Empty>() == 0);
  CHECK(detail::field_count<WithSeed>() == 3);
  CHECK(fields_of(WithSeed{.seed = 5}) == std::vector<std::int64_t>{1, 5, 2});
}

TEST_CASE("config fields: numbers stand for names that there are not") {
  CHECK(names_of(Outer{}) == std::vector<std::string>{"0", "1.0", "1.1", "3", "4"});
  CHECK(names_of(Named{.seed = 1}) ==
        std::vector<std::string>{"count", "inner.0", "inner.1", "third", "unnamed", "seed"});
  CHECK(texts_of(Outer{}).empty());
}

TEST_CASE("config fields: texts of fields that have names") {
  using Texts = std::vector<std::pair<std::string, std::string>>;
  CHECK(texts_of(Named{.seed = 18446744073709551615u}) ==
        Texts{{"count", "3"},
              {"third", "0.10000000149011612"},  // what 0.1f is
              {"unnamed", "1"},
              {"seed", "18446744073709551615"}});
  CHECK(detail::field_text(-5) == "-5");
  CHECK(detail::field_text(0.1) == "0.1");
  CHECK(detail::field_text(1e-20) == "1e-20");
  CHECK(detail::field_text(false) == "false");
  CHECK(detail::field_text(Activation::gelu_tanh) == "gelu_tanh");
  CHECK(detail::field_text(static_cast<Activation>(9)) == "9");
  CHECK(detail::field_text(static_cast<Activation>(-1)) == "-1");
}

TEST_CASE("config fields: 64 bits are the field again") {
  CHECK(detail::field_of_bits<double>(detail::field_bits(0.1)) == 0.1);
  CHECK(detail::field_of_bits<float>(detail::field_bits(0.1f)) == 0.1f);
  CHECK(detail::field_of_bits<Index>(detail::field_bits(Index{-3})) == -3);
  CHECK(detail::field_of_bits<bool>(detail::field_bits(true)));
  CHECK(detail::field_of_bits<Seed>(detail::field_bits(Seed(18446744073709551615u))) ==
        18446744073709551615u);
  CHECK(detail::field_of_bits<Activation>(detail::field_bits(Activation::tanh)) ==
        Activation::tanh);
}

TEST_CASE("config fields: the last enumerator's name is the last name") {
  CHECK(detail::field_text(Activation::tanh) == "tanh");
  CHECK(enumerator_names(Activation{}).back() == "tanh");
  CHECK(detail::field_text(Score::sqrt_softplus) == "sqrt_softplus");
  CHECK(enumerator_names(Score{}).back() == "sqrt_softplus");
  CHECK(detail::field_text(GroupScore::two_best) == "two_best");
  CHECK(detail::field_text(PlaceOrder::best_tokens) == "best_tokens");
  CHECK(enumerator_names(PlaceOrder{}).back() == "best_tokens");
  CHECK(detail::field_text(SwitchCount::first_choice) == "first_choice");
  CHECK(detail::field_text(Precision::bfloat16) == "bfloat16");
  CHECK(enumerator_names(Precision{}).back() == "bfloat16");
  CHECK(detail::field_text(RowOrder::sequence_major) == "sequence_major");
}

TEST_CASE("config fields: a visit_fields that misses a field or visits one twice is seen") {
  STATIC_REQUIRE(detail::visits_every_field<Named>());
  STATIC_REQUIRE(detail::visits_every_field<Faulty<Fault::none>>());
  STATIC_REQUIRE(!detail::visits_every_field<Faulty<Fault::left_out>>());
  STATIC_REQUIRE(!detail::visits_every_field<Faulty<Fault::last_left_out>>());
  STATIC_REQUIRE(!detail::visits_every_field<Faulty<Fault::twice>>());
  STATIC_REQUIRE(detail::visits_every_field<Derived<true>>());
  STATIC_REQUIRE(!detail::visits_every_field<Derived<false>>());
  STATIC_REQUIRE(!detail::HasNamedFields<Outer>);
  STATIC_REQUIRE(detail::is_all_named<Faulty<Fault::none>>());
  STATIC_REQUIRE(!detail::is_all_named<Named>());
  STATIC_REQUIRE(!detail::is_all_named<Outer>());
}

TEMPLATE_TEST_CASE("config fields: those of every module have names", "", NoisyTopKGate<float>,
                   HierarchicalGate<float>, ProductKeyGate<float>, TopKGate<float>,
                   BalancedGate<float>, ExpertChoiceGate<float>,
                   SharedExpertGate<BalancedGate<double>>, FeedForward<float>,
                   MoELayer<Expert<FeedForward>>, Linear<float>, LSTM<float>, Dropout<float>,
                   Embedding<float>) {
  STATIC_REQUIRE(detail::visits_every_field<typename TestType::Config>());
  STATIC_REQUIRE(detail::is_all_named<typename TestType::Config>());
}

TEST_CASE("config fields: every field of every gate and layer counts") {
  using Layer = MoELayer<Expert<FeedForward>, SharedExpertGate<TopKGate<float>>>;
  const Layer::Config config{.seed = 1};
  // Width; the expert's ten; the gate's five and its routed one's 30; identity_experts, output and seed.
  CHECK(fields_of(config).size() == 1 + 11 + 5 + 30 + 3);
  const std::vector<std::string> names = names_of(config);
  CHECK(names[1] == "expert.width");
  CHECK(names[12] == "gate.width");
  CHECK(names[18] == "gate.routed.experts");
  CHECK(names.back() == "seed");
  Layer::Config other{.seed = 1};
  other.gate.routed.init_stddev = 0.03;  // the last one
  CHECK(fields_of(config) != fields_of(other));
  other = {.seed = 1};
  other.expert.recompute = true;
  CHECK(fields_of(config) != fields_of(other));
  other = {.seed = 1};
  other.expert.saved = Precision::bfloat16;
  CHECK(fields_of(config) != fields_of(other));
  other = {.seed = 1};
  other.expert.products = Precision::bfloat16;
  CHECK(fields_of(config) != fields_of(other));
  other = {.seed = 1};
  other.gate.routed.place_order = PlaceOrder::first_choices;
  CHECK(fields_of(config) != fields_of(other));
  CHECK(fields_of(config) != fields_of(Layer::Config{.seed = 2}));
  CHECK(fields_of(config) == fields_of(Layer::Config{.seed = 1}));
}
