#include "moe/routing/choose_tokens.hpp"

#include <array>

#include "gates/token_choice_checks.hpp"

using namespace moe;
using test::random_matrix;
using Indices = std::vector<Index>;

TEST_CASE("choose_tokens: how many tokens an expert takes", "[routing]") {
  CHECK(detail::tokens_to_take(2, 32768, 256) == 256);
  CHECK(detail::tokens_to_take(4, 12, 6) == 8);
  CHECK(detail::tokens_to_take(2, 11, 4) == 5);  // 5.5
  CHECK(detail::tokens_to_take(1.25, 64, 8) == 10);
  CHECK(detail::tokens_to_take(1.15, 100, 5) == 23);  // 22.999999999999996 in double
  CHECK(detail::tokens_to_take(1, 5, 8) == 1);        // 0.6
  CHECK(detail::tokens_to_take(1, 1, 131072) == 1);
  CHECK(detail::tokens_to_take(3, 7, 3) == 7);  // all
  CHECK(detail::tokens_to_take(2, 0, 4) == 0);
  CHECK(detail::tokens_to_take(0.01, 3, 1) == 1);
  for (Index experts = 1; experts < 40; ++experts) {  // exact where it divides
    for (Index share = 1; share < 40; ++share) {
      CHECK(detail::tokens_to_take(static_cast<double>(experts), share, experts) == share);
      CHECK(detail::tokens_to_take(1, share * experts, experts) == share);
    }
  }
}

TEST_CASE("choose_tokens: three tokens and two experts worked by hand", "[routing]") {
  const Matrix<float> scores{{1, 5}, {3, 5}, {2, 5}};
  detail::TokenChoice<float> choice;
  Routing<float> routing;
  detail::choose_tokens(scores, 2, choice, routing);
  // Expert 0 takes 1 and 2; expert 1, for whom all are equal, 0 and 1.
  CHECK(routing.experts == 2);
  CHECK(routing.token_offsets == Indices{0, 1, 3, 4});
  CHECK(routing.expert == Indices{1, 0, 1, 0});
  CHECK(routing.weight.size() == 4);
}

TEMPLATE_TEST_CASE("choose_tokens: the best of every column for any scores", "[routing]", float,
                   double) {
  detail::TokenChoice<TestType> choice;  // one for all shapes
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    const Index tokens = std::array<Index, 5>{1, 2, 7, 33, 80}[seed % 5];
    const Index experts = std::array<Index, 6>{1, 3, 8, 16, 17, 40}[seed % 6];
    Matrix<TestType> scores = random_matrix<TestType>(tokens, experts, seed);
    if (seed % 2 == 0) scores = (scores * 2).array().round().matrix();  // many ties
    if (seed % 3 == 0)
      scores.row(tokens / 2).setConstant(std::numeric_limits<TestType>::quiet_NaN());
    for (const Index count : {Index{1}, (tokens + 2) / 3, std::max<Index>(1, tokens - 1), tokens}) {
      Routing<TestType> routing;
      detail::choose_tokens(scores, count, choice, routing);
      test::check_routing(routing, tokens, experts);
      const Matrix<double> mask = test::naive_column_mask(scores, count);
      Matrix<double> chosen = Matrix<double>::Zero(tokens, experts);
      test::for_each_slot(routing, [&](Index t, Index i, std::size_t) { chosen(t, i) += 1; });
      REQUIRE(test::same_bits(chosen, mask));
    }
  }
}

TEST_CASE("choose_tokens: the same on any number of threads", "[routing]") {
  const Matrix<float> scores = random_matrix<float>(500, 70, 1);
  const auto run = [&](int count) {
    const test::Threads threads(count);
    detail::TokenChoice<float> choice;
    Routing<float> routing;
    detail::choose_tokens(scores, 40, choice, routing);
    return routing;
  };
  const Routing<float> one = run(1);
  for (const int count : {2, 3, 8}) {
    const Routing<float> other = run(count);
    CHECK(other.expert == one.expert);
    CHECK(other.token_offsets == one.token_offsets);
  }
}

TEST_CASE("choose_tokens: shapes at the ends", "[routing]") {
  detail::TokenChoice<float> choice;
  Routing<float> routing;
  detail::choose_tokens(Matrix<float>(0, 5), 0, choice, routing);
  CHECK(routing.experts == 5);
  CHECK(routing.tokens() == 0);
  CHECK(routing.slots() == 0);
  detail::choose_tokens(random_matrix<float>(1, 131072, 1), 1, choice, routing);
  REQUIRE(routing.slots() == 131072);
  CHECK(std::is_sorted(routing.expert.begin(), routing.expert.end()));
  CHECK(routing.expert.back() == 131071);
}
