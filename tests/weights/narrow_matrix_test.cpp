#include <cmath>
#include <limits>
#include <string>

#include "formats.hpp"

using namespace moe;
using namespace moe::test;  // NOLINT(google-build-using-namespace)

namespace {

/// One column of weights.
Matrix<float> column(const std::vector<float>& values) {
  Matrix<float> weights(static_cast<Index>(values.size()), 1);
  std::copy(values.begin(), values.end(), weights.data());
  return weights;
}

template <class Format>
std::vector<float> round_trip(const std::vector<float>& values) {
  const Matrix<float> weights = NarrowMatrix<Format>(column(values)).decoded();
  return {weights.data(), weights.data() + weights.size()};
}

}  // namespace

TEST_CASE("bfloat16: rounded to nearest, ties to even", "[weights]") {
  // A unit in the last place of 1 is 2^-7.
  const std::vector<float> in{1, 1 + 0x1p-8f, 1 + 0x3p-8f, -1 - 0x1.8p-8f, 0, 1e-40f, 3e38f};
  const std::vector<float> out = round_trip<BFloat16>(in);
  CHECK(out[0] == 1);
  CHECK(out[1] == 1);
  CHECK(out[2] == 1 + 0x1p-6f);
  CHECK(out[3] == -1 - 0x1p-7f);
  CHECK(out[4] == 0);
  CHECK(std::abs(out[5] - 1e-40f) < 0x1p-134f);  // denormal, half a unit of 2^-133
  CHECK(std::abs(out[6] / 3e38f - 1) < 0x1p-8f);
}

TEST_CASE("float16: rounded to nearest, ties to even, denormals too", "[weights]") {
  // A unit in the last place of 1 is 2^-10, the smallest number 2^-24.
  const std::vector<float> in{1 + 0x1p-11f, 1 + 0x3p-11f, -65504, 0x1p-24f, 0x1p-25f, 0x3p-25f};
  CHECK(round_trip<Float16>(in) ==
        std::vector<float>{1, 1 + 0x1p-9f, -65504, 0x1p-24f, 0, 0x1p-23f});
}

TEST_CASE("int8: a block's largest weight is 127 times its scale", "[weights]") {
  // Scale 1; then, in another block, scale 2; then one of zeros.
  std::vector<float> in{127, 1.5f, -2.5f, 0.4f, -127};
  in.resize(32);
  in.insert(in.end(), {-254, 3, 5, 1});
  in.resize(64);
  in.resize(70);
  const std::vector<float> out = round_trip<Int8>(in);
  CHECK(std::vector<float>(out.begin(), out.begin() + 5) ==
        std::vector<float>{127, 2, -3, 0, -127});
  CHECK(std::vector<float>(out.begin() + 32, out.begin() + 36) ==
        std::vector<float>{-254, 4, 6, 2});  // 1.5, 2.5 and 0.5 are rounded away from 0
  CHECK(std::all_of(out.begin() + 64, out.end(), [](float v) { return v == 0; }));
}

TEST_CASE("int4: a block's weight of largest magnitude is -8 times its scale", "[weights]") {
  // Scale 1, then scale -1, whose codes are the negatives.
  std::vector<float> in{-8, 7, 7.6f, 3.5f, -0.4f};
  in.resize(32);
  in.insert(in.end(), {8, -7.6f, 2.5f, 1.4f});
  in.resize(64);
  const std::vector<float> out = round_trip<Int4>(in);
  CHECK(std::vector<float>(out.begin(), out.begin() + 5) == std::vector<float>{-8, 7, 7, 4, 0});
  CHECK(std::vector<float>(out.begin() + 32, out.begin() + 36) == std::vector<float>{8, -7, 3, 1});
}

TEMPLATE_TEST_CASE("narrow matrix: every weight is what the format's definition says", "[weights]",
                   MOE_TEST_FORMATS) {
  const Index rows = GENERATE(1, 2, 31, 32, 33, 100);
  const Index columns = GENERATE(1, 3, 16, 17, 64, 70, 131);
  CAPTURE(rows, columns);
  const auto weights = random_matrix<float>(rows, columns, 1, 0.03);
  const NarrowMatrix<TestType> narrow(weights);
  const Matrix<float> decoded = narrow.decoded();
  REQUIRE(decoded.rows() == rows);
  REQUIRE(decoded.cols() == columns);
  for (Index j = 0; j < columns; ++j) {
    const std::vector<double> expected = rounded_column<TestType>(weights, j);
    for (Index k = 0; k < rows; ++k) {
      CAPTURE(k, j);
      REQUIRE(static_cast<double>(decoded(k, j)) == expected[detail::to_size(k)]);
    }
  }
  // The same from its codes.
  const NarrowMatrix<TestType> again(
      rows, columns, [&](Index k, Index j) { return narrow.code(k, j); },
      [&](Index block, Index j) { return narrow.scale(block * TestType::block, j); });
  CHECK(same_bits(again.decoded(), decoded));
}

TEMPLATE_TEST_CASE("narrow matrix: bytes are those of the format", "[weights]", MOE_TEST_FORMATS) {
  const Index bits = std::is_same_v<TestType, Int8> ? 8 : std::is_same_v<TestType, Int4> ? 4 : 16;
  const Index scales = TestType::scaled ? 64 / 32 * 2 : 0;  // bytes for a column of 64
  CHECK(NarrowMatrix<TestType>::bytes_of(64, 192) == 192 * (64 * bits / 8 + scales));
}

TEMPLATE_TEST_CASE("narrow matrix: a weight that cannot be narrowed is named", "[weights]",
                   MOE_TEST_FORMATS) {
  using Limits = std::numeric_limits<float>;
  const float value = GENERATE(Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN());
  Matrix<float> weights = random_matrix<float>(40, 5, 1);
  weights(33, 2) = value;
  CHECK_THROWS_WITH(NarrowMatrix<TestType>(weights, "experts.3.up.weight"),
                    Catch::Matchers::Contains("experts.3.up.weight(33, 2) = ") &&
                        Catch::Matchers::Contains("cannot be narrowed to"));
}

TEST_CASE("narrow matrix: a weight beyond the format's range is named", "[weights]") {
  const auto refused = [](auto format, float value, const char* why) {
    using Format = decltype(format);
    CHECK_THROWS_WITH(NarrowMatrix<Format>(column({1e-9f, value}), "w"),
                      Catch::Matchers::Contains("w(1, 0) = ") && Catch::Matchers::Contains(why));
  };
  refused(Float16(), 65520, "is too large for float16");
  refused(BFloat16(), 3.4e38f, "is too large for bfloat16");
  refused(Int8(), 1e7f, "is too large for int8");
  refused(Int4(), 1e6f, "is too large for int4");
  // 127 · 2^-25 rounds to a scale of 0, and so does 8 · 2^-25.
  refused(Int8(), 127 * 0x1p-26f, "the largest of its block, is too small for int8");
  refused(Int4(), 8 * 0x1p-26f, "the largest of its block, is too small for int4");
  // The smallest scales are denormal halves, and hold.
  CHECK(round_trip<Int8>({127 * 0x1p-24f, 0x1p-24f}) ==
        std::vector<float>{127 * 0x1p-24f, 0x1p-24f});
  CHECK(round_trip<Int4>({-8 * 0x1p-24f, 0x1p-24f}) == std::vector<float>{-8 * 0x1p-24f, 0x1p-24f});
  CHECK(round_trip<Int8>({127 * 60000.0f, 60000.0f})[1] == 60000);
}

TEMPLATE_TEST_CASE("narrow matrix: empty ones", "[weights]", MOE_TEST_FORMATS) {
  CHECK(NarrowMatrix<TestType>().bytes() == 0);
  CHECK(NarrowMatrix<TestType>(Matrix<float>(0, 7)).decoded().rows() == 0);
  CHECK(NarrowMatrix<TestType>(Matrix<float>(7, 0)).decoded().cols() == 0);
}
