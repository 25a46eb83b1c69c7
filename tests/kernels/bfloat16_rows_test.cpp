#include "moe/kernels/bfloat16_rows.hpp"

#include <limits>

#include "../support.hpp"

using namespace moe;
using test::random_matrix;

namespace {

/// One number there and back.
template <class Scalar>
Scalar rounded(Scalar value) {
  std::byte code[2];
  detail::round_to_bfloat16(1, &value, code);
  detail::widen_bfloat16(1, code, &value);
  return value;
}

}  // namespace

TEMPLATE_TEST_CASE("bfloat16 rows: numbers go to the nearest, ties to even", "[kernels]", float,
                   double) {
  const auto check = [](double value, double expected) {
    for (const double sign : {1.0, -1.0}) {
      CAPTURE(value, sign);
      CHECK(rounded(static_cast<TestType>(sign * value)) == static_cast<TestType>(sign * expected));
    }
  };
  // Above 1 there is one number every 2^-7.
  check(0, 0);
  check(1, 1);
  check(1 + 0x1p-7, 1 + 0x1p-7);
  check(1 + 0x1p-8, 1);
  check(1 + 0x1p-8 + 0x1p-20, 1 + 0x1p-7);
  check(1 + 0x3p-8, 1 + 0x1p-6);
  check(1 + 0x3p-8 - 0x1p-20, 1 + 0x1p-7);
  check(2 - 0x1p-20, 2);
  check(0x1.fep127, 0x1.fep127);  // the largest
  check(0x1.fefffep127, 0x1.fep127);
  check(0x1.ffp127, std::numeric_limits<double>::infinity());
  check(std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity());
  check(0x1p-133, 0x1p-133);  // the smallest
  check(0x1.8p-134, 0x1p-133);
  check(0x1p-134, 0);
  CHECK(std::signbit(rounded(static_cast<TestType>(-0.0))));
}

TEST_CASE("bfloat16 rows: NaN stays NaN, wherever its bits are", "[kernels]") {
  for (const std::uint32_t bits :
       {0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu, 0xFF800001u, 0xFFFFFFFFu}) {
    CHECK(std::isnan(rounded(std::bit_cast<float>(bits))));
  }
  CHECK(std::isnan(rounded(std::nan(""))));
}

TEMPLATE_TEST_CASE("bfloat16 rows: a number is the same at every place of a row of any length",
                   "[kernels]", float, double) {
  for (Index count = 0; count <= 3 * detail::lane_count + 1; ++count) {
    const Matrix<TestType> x = random_matrix<TestType>(1, count, 1);
    const auto size = detail::to_size(2 * count);
    std::vector<std::byte> codes(size + 2, std::byte{0x5A});
    detail::round_to_bfloat16(count, x.data(), codes.data());
    CHECK(codes[size] == std::byte{0x5A});
    CHECK(codes[size + 1] == std::byte{0x5A});
    std::vector<TestType> wide(detail::to_size(count) + 1, TestType{7});
    detail::widen_bfloat16(count, codes.data(), wide.data());
    CHECK(wide.back() == 7);
    for (Index i = 0; i < count; ++i) {
      CHECK(wide[detail::to_size(i)] == rounded(x(0, i)));
      CHECK(wide[detail::to_size(i)] ==
            static_cast<TestType>(Eigen::bfloat16(static_cast<float>(x(0, i)))));
    }
  }
}
