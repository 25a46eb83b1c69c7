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

namespace {

/// Checks that experts take the same tokens in one process and where the rows are divided. Returns the
/// calls of the batch.
template <class S>
Index check_choice(const Matrix<S>& scores, Index count,
                   const std::vector<std::vector<Index>>& ways) {
  detail::TokenChoice<S> choice;
  Routing<S> expected;
  detail::choose_tokens(scores, count, choice, expected);
  Index calls = 0;
  for (const std::vector<Index>& sizes : ways) {
    INFO("count " << count << ", " << sizes.size() << " parts");
    std::vector<Routing<S>> parts(sizes.size());
    test::share_batch(sizes, [&](std::size_t i, const SharedBatch& batch) {
      detail::TokenChoice<S> own;
      const Matrix<S> rows = scores.middleRows(batch.first_row(), sizes[i]);
      detail::choose_tokens(rows, count, &batch, own, parts[i]);
      if (i == 0) calls = std::max(calls, dynamic_cast<const test::PartOfBatch&>(batch).calls);
    });
    std::vector<Index> offsets{0};
    std::vector<Index> expert;
    for (const Routing<S>& part : parts) {
      CHECK(part.experts == scores.cols());
      CHECK(part.weight.size() == part.expert.size());
      for (Index t = 0; t < part.tokens(); ++t) {
        offsets.push_back(offsets.back() + part.slots_of_token(t).count);
      }
      expert.insert(expert.end(), part.expert.begin(), part.expert.end());
    }
    CHECK((offsets == expected.token_offsets));
    CHECK((expert == expected.expert));
  }
  return calls;
}

}  // namespace

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
      INFO("seed " << seed);
      CHECK(check_choice(scores, count, ways_to_divide(tokens)) <= 4);
    }
  }
}

TEST_CASE("shared selection: quantiles worked by hand", "[routing]") {
  const detail::ShownQuantiles few{3, 4};
  CHECK(few.count() == 3);
  CHECK(few.place(2) == 2);
  // 9·1/5, 9·2/5, 9·3/5 and 9·4/5, rounded down: between them is one other, and one is at each end.
  const detail::ShownQuantiles many{9, 4};
  CHECK(many.count() == 4);
  CHECK(many.place(0) == 1);
  CHECK(many.place(1) == 3);
  CHECK(many.place(2) == 5);
  CHECK(many.place(3) == 7);
  CHECK(detail::ShownQuantiles::remaining(9, 4) == 3);
  CHECK(detail::ShownQuantiles::needed(9, 1) == 9);
  // 9 candidates leave 2·(9/3) + 1 = 7 with two quantiles, 2·(9/4) + 1 = 5 with three, and 3 with four.
  CHECK(detail::ShownQuantiles::needed(9, 2) == 4);
  CHECK(detail::ShownQuantiles::needed(0, 3) == 1);
  // 256 leave 2·16319 + 1, these 2·126 + 1, and those are shown.
  CHECK(detail::ShownQuantiles::needed(Index{1} << 22, 3) <= 256);
  CHECK(detail::ShownQuantiles::needed(Index{1} << 22, 3) > 250);
}

// Few quantiles of many candidates: it takes all gathers.
TEMPLATE_TEST_CASE("shared selection: many candidates that leading bits do not tell apart",
                   "[routing]", float, double) {
  using L = Limits<TestType>;
  Index most = 0;
  struct Size {
    Index tokens, experts;
  };
  for (const Size size : {Size{6000, 3}, Size{900, 260}}) {
    const auto [tokens, experts] = size;
    const Index third = tokens / 3;
    std::vector<std::vector<Index>> ways{
        {tokens}, {1, tokens - 1}, {0, tokens, 0}, {third, 0, third, tokens - 2 * third}};
    ways.emplace_back(12, tokens / 12);
    ways.back().back() += tokens - tokens / 12 * 12;
    for (int kind = 0; kind < 8; ++kind) {
      std::mt19937_64 random(static_cast<std::uint64_t>(kind));
      Matrix<TestType> scores(tokens, experts);
      for (Index t = 0; t < tokens; ++t) {
        for (Index e = 0; e < experts; ++e) {
          const auto any = static_cast<TestType>(random() % 1000000);
          const auto bit = TestType(1) + static_cast<TestType>(t * 7919 % tokens) * L::epsilon();
          TestType& score = scores(t, e);
          switch (kind) {
            case 0:  // equal
              score = TestType(0.25);
              break;
            case 1:  // one bit apart, on all processes
              score = bit;
              break;
            case 2:  // one bit apart, each process above those before it
              score = TestType(1) + static_cast<TestType>(t) * L::epsilon();
              break;
            case 3:  // the same the other way round
              score = TestType(1) - static_cast<TestType>(t) * L::epsilon();
              break;
            case 4:  // denormals
              score = any * L::denorm_min();
              break;
            case 5:  // many equal ones among others
              score = random() % 3 == 0 ? bit : TestType(1) + 500 * L::epsilon();
              break;
            case 6:  // candidates of one process alone
              score = t < 2 * third ? TestType(1) / (2 + any) : bit;
              break;
            default:  // no numbers, infinities, and others
              score = t % 5 == 0   ? L::quiet_NaN()
                      : t % 7 == 0 ? L::infinity()
                      : t % 3 == 0 ? -L::infinity()
                                   : -bit;
          }
        }
      }
      for (const Index count : {Index{1}, tokens / 2, tokens - 1}) {
        INFO("kind " << kind << ", " << tokens << " tokens");
        const Index calls = check_choice(scores, count, ways);
        CHECK(calls <= 4);
        most = std::max(most, calls);
      }
    }
  }
  CHECK(most == 4);
}

TEMPLATE_TEST_CASE("shared selection: it takes few calls", "[routing]", float, double) {
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
        CHECK(calls <= 4);
      });
    }
  }
}

namespace {

/// The first of so many processes that a list of each has more numbers than the counts; the others have
/// no tokens.
class FirstOfMany : public test::FirstProcess {
 public:
  explicit FirstOfMany(Index rows) : FirstProcess(20000, rows) {}
  void make_room_to_gather(Index numbers) const override { room_ = numbers; }
  void gather_agreed(std::span<Index> numbers) const override {
    CHECK(static_cast<Index>(numbers.size()) <= room_);
  }

 private:
  mutable Index room_ = 0;
};

}  // namespace

TEMPLATE_TEST_CASE("shared selection: among very many processes", "[routing]", float, double) {
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
