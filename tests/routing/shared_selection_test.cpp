#include "moe/routing/shared_selection.hpp"

#include <array>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "../support.hpp"
#include "moe/routing/capacity.hpp"
#include "moe/routing/choose_tokens.hpp"
#include "shared_batch.hpp"

using namespace moe;

namespace {

template <class S>
using Limits = std::numeric_limits<S>;

/// Where an order of bits could differ from that of numbers.
template <class S>
std::vector<S> hard_scores() {
  return {Limits<S>::quiet_NaN(),
          -Limits<S>::quiet_NaN(),
          Limits<S>::infinity(),
          -Limits<S>::infinity(),
          S{0},
          -S{0},
          Limits<S>::denorm_min(),
          -Limits<S>::denorm_min(),
          Limits<S>::min(),
          -Limits<S>::min(),
          Limits<S>::max(),
          Limits<S>::lowest(),
          S{1},
          S{1} + Limits<S>::epsilon(),
          S{1} - Limits<S>::epsilon(),
          S{-1}};
}

/// Scores of a kind: hard ones, random ones, few values, one value, and many values that differ in their
/// last bits, or in bits anywhere.
constexpr std::uint64_t kinds = 6;
template <class S>
S draw(std::mt19937_64& random, std::uint64_t kind) {
  static const std::vector<S> hard = hard_scores<S>();
  const auto any = std::normal_distribution<S>()(random);
  const auto few = static_cast<int>(random() % 300);
  const auto bits = static_cast<int>(random() % Limits<S>::digits);
  switch (kind % kinds) {
    case 0:
      return hard[random() % hard.size()];
    case 1:
      return any;
    case 2:
      return std::round(2 * any);
    case 3:
      return S(0.25);
    case 4:
      return S{1} + static_cast<S>(few) * Limits<S>::epsilon();
    default:
      return S{1} + std::ldexp(static_cast<S>(few) * Limits<S>::epsilon(), bits);
  }
}

/// Parts of a batch: one, several, some of them empty, and one for each row and more.
std::vector<std::vector<Index>> ways_to_divide(Index rows) {
  std::vector<std::vector<Index>> ways{{rows}, {rows / 3, rows - rows / 3}, {0, rows, 0}};
  std::vector<Index> ones(static_cast<std::size_t>(std::min<Index>(rows, 6)), 1);
  ones.push_back(rows - static_cast<Index>(ones.size()));
  ones.push_back(0);
  ways.push_back(ones);
  return ways;
}

}  // namespace

TEMPLATE_TEST_CASE("shared selection: bits are in the order of scores", "[routing]", float,
                   double) {
  std::vector<TestType> scores = hard_scores<TestType>();
  scores.push_back(TestType(-3e-5));
  for (const TestType a : scores) {
    for (const TestType b : scores) {
      const TestType both[] = {a, b};
      const detail::ByScore<TestType> before(both);
      INFO(a << " and " << b);
      CHECK((detail::ordered_bits(a) > detail::ordered_bits(b)) == (before.key(0) > before.key(1)));
      CHECK((detail::ordered_bits(a) == detail::ordered_bits(b)) ==
            (before.key(0) == before.key(1)));
    }
  }
}

TEMPLATE_TEST_CASE("shared selection: experts take the tokens that they take in one process",
                   "[routing]", float, double) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    std::mt19937_64 random(seed);
    const Index tokens = std::array<Index, 5>{0, 1, 5, 40, 131}[seed % 5];
    const Index experts = std::array<Index, 4>{1, 7, 33, 70}[seed / 4 % 4];
    Matrix<TestType> scores(tokens, experts);
    for (Index i = 0; i < scores.size(); ++i) scores.data()[i] = draw<TestType>(random, seed);
    for (const Index count :
         std::set<Index>{std::min<Index>(1, tokens), (tokens + 2) / 3, tokens}) {
      detail::TokenChoice<TestType> choice;
      Routing<TestType> expected;
      detail::choose_tokens(scores, count, choice, expected);
      for (const std::vector<Index>& sizes : ways_to_divide(tokens)) {
        INFO("seed " << seed << ", count " << count << ", " << sizes.size() << " parts");
        std::vector<Routing<TestType>> parts(sizes.size());
        test::share_batch(sizes, [&](std::size_t i, const SharedBatch& batch) {
          detail::TokenChoice<TestType> own;
          const Matrix<TestType> rows = scores.middleRows(batch.first_row(), sizes[i]);
          detail::choose_tokens(rows, count, &batch, own, parts[i]);
        });
        std::vector<Index> offsets{0};
        std::vector<Index> expert;
        for (const Routing<TestType>& part : parts) {
          CHECK(part.experts == experts);
          CHECK(part.weight.size() == part.expert.size());
          for (Index t = 0; t < part.tokens(); ++t) {
            offsets.push_back(offsets.back() + part.slots_of_token(t).count);
          }
          expert.insert(expert.end(), part.expert.begin(), part.expert.end());
        }
        CHECK(offsets == expected.token_offsets);
        CHECK(expert == expected.expert);
      }
    }
  }
}

TEMPLATE_TEST_CASE("shared selection: it takes few calls", "[routing]", float, double) {
  constexpr bool is_float = std::is_same_v<TestType, float>;
  for (std::uint64_t kind = 0; kind < kinds; ++kind) {
    for (const Index experts : {1, 8, 64, 200}) {
      std::mt19937_64 random(kind);
      const Index tokens = 700;
      Matrix<TestType> scores(tokens, experts);
      for (Index i = 0; i < scores.size(); ++i) scores.data()[i] = draw<TestType>(random, kind);
      test::share_batch({200, 0, 500}, [&](std::size_t, const SharedBatch& batch) {
        detail::TokenChoice<TestType> choice;
        Routing<TestType> routing;
        const Index rows = batch.first_row() == 0 ? 200 : 500;
        const Matrix<TestType> own = scores.middleRows(batch.first_row(), rows);
        if (batch.process() == 1) {
          detail::choose_tokens(Matrix<TestType>(0, experts), tokens / 3, &batch, choice, routing);
        } else {
          detail::choose_tokens(own, tokens / 3, &batch, choice, routing);
        }
        if (batch.process() > 0) return;  // a check is not for several threads
        const Index calls = dynamic_cast<const test::PartOfBatch&>(batch).calls;
        INFO("kind " << kind << ", " << experts << " experts: " << calls << " calls");
        // More than 64 scores of a process differ in their last bits alone.
        const bool are_close = kind == 4 && !(is_float && experts <= 64);
        const Index digits = is_float ? 4 : experts <= 64 ? 6 : 8;
        CHECK(calls <= (are_close ? digits + 2 : 4));
        if (are_close && !is_float) CHECK(calls > 4);
      });
    }
  }
}

namespace {

/// The first of so many processes that they have no room to show each other scores; the others have no
/// tokens.
class FirstOfMany : public SharedBatch {
 public:
  explicit FirstOfMany(Index rows) : rows_(rows) {}
  Index processes() const override { return 20000; }
  Index process() const override { return 0; }
  Index rows() const override { return rows_; }
  Index first_row() const override { return 0; }
  Index tokens() const override { return rows_; }
  Index first_token() const override { return 0; }
  void sum(std::span<float>) const override {}
  void sum(std::span<double>) const override {}
  void sum(std::span<Index>) const override {}
  void prefix(std::span<Index> numbers) const override {
    std::fill(numbers.begin(), numbers.end(), Index{0});
  }
  void gather_agreed(std::span<Index>) const override { FAIL("there is no room"); }

 private:
  Index rows_;
};

}  // namespace

TEMPLATE_TEST_CASE("shared selection: among very many processes scores are counted only",
                   "[routing]", float, double) {
  for (std::uint64_t kind = 0; kind < kinds; ++kind) {
    std::mt19937_64 random(kind);
    const Index tokens = 300;
    Matrix<TestType> scores(tokens, 7);
    for (Index i = 0; i < scores.size(); ++i) scores.data()[i] = draw<TestType>(random, kind);
    detail::TokenChoice<TestType> choice;
    Routing<TestType> expected;
    detail::choose_tokens(scores, 100, choice, expected);
    Routing<TestType> actual;
    const FirstOfMany batch(tokens);
    detail::choose_tokens(scores, 100, &batch, choice, actual);
    CHECK(actual.token_offsets == expected.token_offsets);
    CHECK(actual.expert == expected.expert);
  }
}

TEMPLATE_TEST_CASE("shared selection: capacity drops what it drops in one process", "[routing]",
                   float, double) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    std::mt19937_64 random(seed);
    const Index tokens = std::array<Index, 5>{0, 1, 5, 40, 131}[seed % 5];
    const Index experts = std::array<Index, 3>{3, 7, 70}[seed / 4 % 3];
    const Index top_k = 1 + static_cast<Index>(random() % 3);
    detail::Choices<TestType> all;
    all.resize(tokens, top_k);
    for (Index c = 0; c < all.size(); ++c) {
      all.expert[c] = static_cast<Index>(random() % static_cast<std::uint64_t>(experts));
      all.weight[c] = draw<TestType>(random, seed);
      if (random() % 5 == 0) all.keeps[c] = 0;  // dropped before
    }
    for (const auto how :
         {PlaceOrder::rows, PlaceOrder::first_choices, PlaceOrder::largest_weight}) {
      for (const Index capacity :
           {Index{0}, Index{1}, Index{2}, tokens * top_k / experts, tokens}) {
        detail::Choices<TestType> expected = all;
        detail::CapacityScratch<TestType> scratch;
        const Index count = tokens == 40 ? 5 : 1;
        const auto order = seed % 2 == 0 ? RowOrder::time_major : RowOrder::sequence_major;
        ValidTokens rows;
        find_valid_tokens(tokens, {}, nullptr, rows);
        detail::drop_over_capacity(how, capacity, experts, {count, order, &rows}, expected,
                                   scratch);
        for (const std::vector<Index>& sizes : ways_to_divide(tokens)) {
          INFO("seed " << seed << ", capacity " << capacity << ", order " << static_cast<int>(how)
                       << ", " << sizes.size() << " parts");
          std::vector<detail::Choices<TestType>> parts(sizes.size());
          test::share_batch(sizes, [&](std::size_t i, const SharedBatch& batch) {
            detail::Choices<TestType>& own = parts[i];
            own.resize(sizes[i], top_k);
            const auto first = batch.first_row() * top_k;
            std::copy_n(all.expert.begin() + first, own.size(), own.expert.begin());
            std::copy_n(all.weight.begin() + first, own.size(), own.weight.begin());
            std::copy_n(all.keeps.begin() + first, own.size(), own.keeps.begin());
            detail::CapacityScratch<TestType> of_part;
            ValidTokens own_rows;
            find_valid_tokens(sizes[i], {}, &batch, own_rows);
            detail::drop_over_capacity(how, capacity, experts, {count, order, &own_rows}, &batch,
                                       own, of_part);
          });
          std::vector<unsigned char> keeps;
          for (const auto& part : parts) {
            keeps.insert(keeps.end(), part.keeps.begin(), part.keeps.end());
          }
          CHECK(keeps == expected.keeps);
        }
      }
    }
  }
}
