#include "moe/random.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

#include "support.hpp"

using namespace moe;

namespace {

using Words = std::array<std::uint32_t, 4>;

constexpr std::uint64_t key_of(std::uint32_t first, std::uint32_t second) {
  return first | (std::uint64_t{second} << 32);
}

/// The probability a deviate is made for, on its own side of zero: in (0, 1/2].
double intended_tail(std::uint32_t bits) { return ((bits >> 1) + 0.5) * 0x1p-32; }

/// Error of the deviate's tail probability, relative to the intended one.
double tail_error(std::uint32_t bits) {
  const double deviate = std::abs(static_cast<double>(standard_normal(bits)));
  const double tail = 0.5 * std::erfc(deviate / std::sqrt(2.0));
  return std::abs(tail / intended_tail(bits) - 1.0);
}

}  // namespace

TEST_CASE("random: Philox gives the published known answers", "[random]") {
  // kat_vectors of Random123: "philox 4x32 10", counter, key, answer.
  constexpr std::uint32_t ones = 0xFFFFFFFF;
  STATIC_REQUIRE(philox({0, 0, 0, 0}, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  STATIC_REQUIRE(philox({ones, ones, ones, ones}, key_of(ones, ones)) ==
                 Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  STATIC_REQUIRE(
      philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, key_of(0xa4093822, 0x299f31d0)) ==
      Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("random: of Philox's words in 64 bits the upper halves count nothing", "[random]") {
  std::array<std::array<std::uint64_t, 5>, 4> lanes{};
  std::array<Words, 5> counters{};
  for (std::size_t lane = 0; lane < 5; ++lane) {
    counters[lane] = philox({static_cast<std::uint32_t>(lane), 0, 0, 1}, 7);
    for (std::size_t word = 0; word < 4; ++word) {
      lanes[word][lane] = counters[lane][word] | (std::uint64_t{0xDEADBEEF} << 32);
    }
  }
  detail::philox_lanes(lanes, 0x123456789ABCDEF0);
  for (std::size_t lane = 0; lane < 5; ++lane) {
    const Words expected = philox(counters[lane], 0x123456789ABCDEF0);
    for (std::size_t word = 0; word < 4; ++word) {
      CHECK(static_cast<std::uint32_t>(lanes[word][lane]) == expected[word]);
    }
  }
}

TEST_CASE("random: derived seeds differ by stream and by seed", "[random]") {
  STATIC_REQUIRE(derive_seed(1, 2) == derive_seed(1, 2));
  std::set<std::uint64_t> seeds;
  std::uint64_t expected = 0;
  for (const std::uint64_t high : {std::uint64_t{0}, std::uint64_t{1} << 32}) {
    for (std::uint64_t seed = 0; seed < 40; ++seed) {
      for (std::uint64_t stream = 0; stream < 40; ++stream) {
        seeds.insert(derive_seed(seed + high, stream));
        seeds.insert(derive_seed(seed, stream + (std::uint64_t{2} << 32)));
        seeds.insert(derive_seed(seed + high, ~stream));
      }
    }
    expected += high == 0 ? 3 * 1600 : 2 * 1600;  // the second line repeats itself
  }
  CHECK(seeds.size() == expected);
  // Nor is a derived seed the noise of its parent.
  for (std::uint32_t stream = 0; stream < 40; ++stream) {
    const Words noise = detail::noise_words(5, {.step = 0}, 0, stream);
    CHECK(derive_seed(5, stream) != key_of(noise[0], noise[1]));
  }
}

TEST_CASE("random: a multiply-add is rounded once, with or without an instruction for it",
          "[random]") {
  const auto check = [](float a, float b, float c) {
    INFO(a << " * " << b << " + " << c);
    const float expected = std::fma(a, b, c);
    CHECK(std::bit_cast<std::uint32_t>(detail::multiply_add_in_double(a, b, c)) ==
          std::bit_cast<std::uint32_t>(expected));
    CHECK(std::bit_cast<std::uint32_t>(detail::multiply_add(a, b, c)) ==
          std::bit_cast<std::uint32_t>(expected));
  };
  // c and half a unit in its last place, but for 2^-56, which a double beside c cannot hold: rounded
  // to double first, the sum seems to lie in the middle between two floats.
  const float a = 0x1p-12f * (1.0f + 0x1p-16f);
  const float b = 0x1p-12f * (1.0f - 0x1p-16f);
  const float c = 1.0f + 0x1p-23f;
  CHECK(detail::multiply_add_in_double(a, b, c) == c);
  CHECK(detail::multiply_add_in_double(-a, b, c) == c);
  CHECK(static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + c) != c);
  for (const float scale : {1.0f, -1.0f, 0x1p40f, -0x1p-40f}) {
    for (const float addend : {c, -c, 1.0f, 1.0f + 0x1p-22f}) {
      check(a, b * scale, addend * scale);
      check(a, -b * scale, addend * scale);
    }
  }
  for (const float value : {0.0f, -0.0f, 1.0f, -3.0f}) check(value, 5.0f, -5.0f * value);
  for (std::uint32_t i = 0; i < 20000; ++i) {
    const Words words = philox({i, 0, 0, 0}, 1);
    const auto number = [](std::uint32_t bits) {  // of exponents that lie near each other
      return std::bit_cast<float>((bits & 0x807FFFFFu) | ((120u + (bits >> 26 & 15u)) << 23));
    };
    check(number(words[0]), number(words[1]), number(words[2]));
  }
}

TEMPLATE_TEST_CASE("random: noise is a function of token and column, however much is drawn at once",
                   "[random]", float, double) {
  const NoiseKey key{(std::uint64_t{3} << 32) + 5, 7};
  const std::vector<Index> token{4, 0, 9, 2, 2, 30, 11};
  std::vector<Index> widths{63, 64, 65, 66, 67, 127, 128, 200};
  for (Index columns = 0; columns <= 50; ++columns) widths.push_back(columns);
  for (const Index columns : widths) {
    for (const Index rows : {0, 1, 2, 5, 7}) {
      std::vector<TestType> noise(detail::to_size(rows * columns) + 1, TestType{9});
      const auto token_of = [&](Index row) { return token[detail::to_size(row)]; };
      detail::fill_noise(11, key, rows, columns, token_of, noise.data());
      CHECK(noise.back() == TestType{9});  // beyond it nothing is written
      for (Index i = 0; i < rows * columns; ++i) {
        const auto row = static_cast<std::uint32_t>(token_of(i / columns) + 7);
        const auto block = static_cast<std::uint32_t>(i % columns / 4);
        const Words words = philox({block, row, 5, 3}, 11);
        const float expected = standard_normal(words[detail::to_size(i % columns % 4)]);
        REQUIRE(noise[detail::to_size(i)] == static_cast<TestType>(expected));
      }
    }
  }
}

TEST_CASE("random: normal deviates are the quantiles of their bits", "[random]") {
  // Tail probabilities from 2^-33 to 1/2, on both sides of zero, in steps of 1/64.
  double middle = 0.0;
  double tail = 0.0;
  double far_tail = 0.0;
  for (double exponent = 1.0; exponent <= 33.0; exponent += 1.0 / 64) {
    const double probability = std::exp2(-exponent);
    const auto half = static_cast<std::uint32_t>(std::min(probability * 0x1p32, 0x1p31 - 1));
    for (const std::uint32_t sign : {0u, 1u}) {
      const double error = tail_error(2 * half + sign);
      double& worst = probability > 0x1p-9 ? middle : probability > 0x1p-24 ? tail : far_tail;
      worst = std::max(worst, error);
    }
  }
  CHECK(middle < 5e-6);
  CHECK(tail < 4e-5);
  CHECK(far_tail < 2e-5);
  for (std::uint32_t i = 0; i < 200'000; ++i) {
    middle = std::max(middle, tail_error((i * 2654435761u) | 0x02000000u));
  }
  CHECK(middle < 5e-6);
}

TEST_CASE("random: the lowest bit is the sign of a normal deviate", "[random]") {
  for (std::uint32_t i = 0; i < 100'000; ++i) {
    const std::uint32_t bits = (i * 2654435761u) & ~1u;
    const float positive = standard_normal(bits);
    REQUIRE(positive >= 0.0f);
    REQUIRE(standard_normal(bits | 1u) == -positive);
  }
}

TEST_CASE("random: normal deviates are monotone and finite up to the extremes", "[random]") {
  for (const std::uint32_t bits :
       {0u, 1u, 0xFFFFFFFFu, 0xFFFFFFFEu, 2u, 0x80000000u, 0x7FFFFFFFu}) {
    CAPTURE(bits);
    CHECK(std::isfinite(standard_normal(bits)));
    CHECK(std::abs(standard_normal(bits)) < 6.4f);
  }
  CHECK(standard_normal(0) > 6.3f);
  CHECK(standard_normal(1) < -6.3f);
  CHECK(std::abs(standard_normal(0xFFFFFFFE)) < 1e-7f);
  CHECK(std::abs(standard_normal(0xFFFFFFFF)) < 1e-7f);
  // Over all sizes, through the seam between the two approximations too; up to their rounding.
  float last = standard_normal(0);
  for (double exponent = 32.0; exponent >= 0.0; exponent -= 1.0 / 256) {
    const auto bits = static_cast<std::uint32_t>(std::min(std::exp2(exponent), 0x1p32 - 2)) & ~1u;
    if (exponent == 32.0) last = standard_normal(bits);
    const float next = standard_normal(bits);
    REQUIRE(next > last - 1e-6f);
    last = next;
  }
}

TEST_CASE("random: a million normal deviates have the moments of a normal", "[random]") {
  constexpr std::uint32_t blocks = 250'000;
  constexpr double count = 4.0 * blocks;
  constexpr std::size_t bins = 64;
  std::array<double, bins> histogram{};
  std::array<double, 5> moment{};
  double neighbours = 0.0;
  for (std::uint32_t block = 0; block < blocks; ++block) {
    const std::array<float, 4> normals = standard_normals(philox({block, 0, 0, 0}, 2024));
    neighbours += static_cast<double>(normals[0]) * static_cast<double>(normals[1]) +
                  static_cast<double>(normals[2]) * static_cast<double>(normals[3]);
    for (const float normal : normals) {
      const double n = static_cast<double>(normal);
      double power = 1.0;
      for (double& sum : moment) {
        sum += power;
        power *= n;
      }
      const double probability = 0.5 * std::erfc(-n / std::sqrt(2.0));
      ++histogram[std::min(bins - 1, static_cast<std::size_t>(probability * bins))];
    }
  }
  // Five standard deviations of each mean; the deviates are fixed, so this is no lottery.
  CHECK(std::abs(moment[1] / count) < 5.0 * std::sqrt(1.0 / count));
  CHECK(std::abs(moment[2] / count - 1.0) < 5.0 * std::sqrt(2.0 / count));
  CHECK(std::abs(moment[3] / count) < 5.0 * std::sqrt(15.0 / count));
  CHECK(std::abs(moment[4] / count - 3.0) < 5.0 * std::sqrt(96.0 / count));
  CHECK(std::abs(neighbours / (count / 2)) < 5.0 * std::sqrt(2.0 / count));
  double chi_squared = 0.0;
  for (const double observed : histogram) {
    chi_squared += (observed - count / bins) * (observed - count / bins) / (count / bins);
  }
  CHECK(chi_squared < 111.0);  // with 63 degrees of freedom, one in 5000 would be larger
  CHECK(chi_squared > 25.0);   // one in 100000 smaller: too even to be random
}

TEST_CASE("random: normal deviates have the same bits on every platform", "[random]") {
  // Found equal with g++ 12 and clang++ 14 at -O0, -O2 and -O3, for SSE2, AVX2 and AVX-512, with
  // -ffp-contract=off, on and fast. A change means that noise can no longer be replayed.
  std::uint64_t hash = 0xCBF29CE484222325u;
  for (std::uint32_t i = 0; i < 1u << 20; ++i) {
    const float normal = standard_normal(i * 4097u + (i >> 3));
    hash = (hash ^ std::bit_cast<std::uint32_t>(normal)) * 0x100000001B3u;
  }
  CHECK(hash == 0x758cddff81363a0bu);
}

TEST_CASE("random: deviates do not depend on how many are made at once", "[random]") {
  std::array<std::uint32_t, 32> bits{};
  for (std::uint32_t i = 0; i < 32; ++i) bits[i] = (i * 2654435761u) >> (i % 5 * 7);
  const std::array<float, 32> normals = standard_normals(bits);
  for (std::size_t i = 0; i < 32; ++i) CHECK(normals[i] == standard_normal(bits[i]));
}

TEST_CASE("random: Gumbel deviates are the quantiles of their bits", "[random]") {
  double sum = 0;
  double squares = 0;
  constexpr std::uint32_t count = 1u << 20;
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint32_t bits = i * 4096u + (i >> 9);
    const double u = (std::floor(bits / 512.0) + 0.5) / 8388608;
    const double deviate = static_cast<double>(standard_gumbel(bits));
    REQUIRE(std::abs(deviate + std::log(-std::log(u))) < 2e-6);
    sum += deviate;
    squares += deviate * deviate;
  }
  // Euler's constant and pi² / 6. The bits are in equal steps, so these are the sums of an integral.
  const double mean = sum / count;
  CHECK(std::abs(mean - 0.57721566) < 1e-4);
  CHECK(std::abs(squares / count - mean * mean - 1.64493407) < 1e-3);
  CHECK(std::abs(standard_gumbel(0) + 2.81f) < 0.01f);
  CHECK(std::abs(standard_gumbel(0xFFFFFFFF) - 16.64f) < 0.01f);
  CHECK(standard_gumbel(511) == standard_gumbel(0));
  CHECK(standard_gumbel(512) > standard_gumbel(0));
}

TEST_CASE("random: the portable logarithm agrees with the standard one", "[random]") {
  double worst = 0.0;
  for (double exponent = -125.9; exponent < 127.9; exponent += 1.0 / 1024) {
    const float x = static_cast<float>(std::exp2(exponent));
    const double expected = std::log(static_cast<double>(x));
    const double error = std::abs(static_cast<double>(detail::portable_log(x)) - expected);
    worst = std::max(worst, error / std::max(std::abs(expected), 1e-6));
  }
  CHECK(worst < 4e-7);
  CHECK(detail::portable_log(1.0f) == 0.0f);
}

TEST_CASE("random: uniform deviates are in the half-open unit interval", "[random]") {
  CHECK(uniform(0) == 0.0f);
  CHECK(uniform(0xFF) == 0.0f);
  CHECK(uniform(0x100) == 0x1p-24f);
  CHECK(uniform(0x80000000) == 0.5f);
  CHECK(uniform(0xFFFFFFFF) == 1.0f - 0x1p-24f);
}

TEST_CASE("random: noise differs by seed, step, token and column", "[random]") {
  std::set<Words> seen;
  std::size_t expected = 0;
  for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1} << 32}) {
    for (const std::uint64_t step : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1} << 32}) {
      for (Index token = 0; token < 8; ++token) {
        for (Index block = 0; block < 8; ++block) {
          seen.insert(detail::noise_words(seed, {.step = step}, token, block));
          ++expected;
        }
      }
    }
  }
  CHECK(seen.size() == expected);
}

TEST_CASE("random: noise belongs to the token and not to its place in the batch", "[random]") {
  for (Index row = 0; row < 5; ++row) {
    CHECK(detail::noise_words(3, {.step = 7, .first_token = 10}, row, 2) ==
          detail::noise_words(3, {.step = 7, .first_token = 0}, row + 10, 2));
  }
}

TEMPLATE_TEST_CASE("random: filled matrices can be filled again", "[random]", float, double) {
  Matrix<TestType> a(37, 29);
  Matrix<TestType> b(37, 29);
  SECTION("uniform") {
    const TestType bound{0.25};
    fill_uniform(a, bound, 42);
    CHECK(a.minCoeff() >= -bound);
    CHECK(a.maxCoeff() < bound);
    CHECK(a.minCoeff() < TestType{-0.234375});
    CHECK(a.maxCoeff() > TestType{0.234375});
    CHECK(std::abs(a.mean()) < TestType{5 * 0.25} / std::sqrt(TestType{3 * 37 * 29}));
    fill_uniform(b, bound, 42);
    CHECK(test::same_bits(a, b));
    fill_uniform(b, TestType{0.5}, 42);
    CHECK(b == 2 * a);
    fill_uniform(b, bound, 43);
    CHECK((a.array() != b.array()).count() > 1000);
  }
  SECTION("normal") {
    fill_normal(a, TestType{3}, 42);
    CHECK(std::abs(a.mean()) < TestType{5 * 3} / std::sqrt(TestType{37 * 29}));
    CHECK(std::abs(a.squaredNorm() / TestType{37 * 29} - 9) < TestType{2});
    for (Index i = 0; i < a.size(); ++i) {
      const Words words = detail::noise_words(42, {.step = 0}, 0, i / 4);
      const float expected = standard_normal(words[detail::to_size(i % 4)]);
      REQUIRE(a.data()[i] == TestType{3} * static_cast<TestType>(expected));
    }
    fill_normal(b, TestType{3}, 42);
    CHECK(test::same_bits(a, b));
    fill_normal(b, TestType{3}, 43);
    CHECK((a.array() != b.array()).count() > 1000);
  }
  SECTION("no two entries of a large one are drawn from the same words") {
    Matrix<TestType> large(64, 64);
    fill_normal(large, TestType{1}, 1);
    const std::set<TestType> values(large.data(), large.data() + large.size());
    CHECK(values.size() > 4085);  // 4096 draws from 2^32 seldom meet, but floats are coarser
  }
  SECTION("nothing in an empty one") {
    Matrix<TestType> empty(0, 5);
    CHECK_NOTHROW(fill_uniform(empty, TestType{1}, 1));
    CHECK_NOTHROW(fill_normal(empty, TestType{1}, 1));
  }
}
