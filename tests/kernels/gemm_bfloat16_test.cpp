#include "moe/kernels/gemm_bfloat16.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "../rounding.hpp"
#include "gemm_support.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)
using namespace moe::test;    // NOLINT(google-build-using-namespace)

namespace {

/// The products of either kind of words, whose operands are rounded.
template <class Words>
struct RoundedProducts {
  template <class Product>
  static void multiply(const Product& product) {
    gemm_bfloat16<Words>(product);
  }
  static Matrix<float> rounded(const Matrix<float>& operand) { return round_to_8_bits(operand); }
};

template <class Words, class F>
void for_each_form(const F& f) {
  for_each_form_and_start<float>([&](Form form, Start start, Added added) {
    f([=](Index m, Index n, Index k, bool listed) {
      // A word of one float is multiplied and added like any float.
      const bool exactly = std::is_same_v<Words, FloatWords>;
      check_product<float, RoundedProducts<Words>>(form, m, n, k, start, added, listed, exactly);
    });
  });
}

/// Rows of A that take two blocks, and a depth for which such a block is cut in two, on any processor.
constexpr Index cut_rows = 2 * left_rows - 1;
template <class Words>
constexpr Index cut_depth = (left_depth + panel_depth) * Words::steps + 1;
static_assert(left_rows * (left_depth + panel_depth) > left_capacity);

/// a·b by each form, between other numbers and at each place of a word.
template <class Words>
std::vector<float> products_of(float a, float b) {
  std::vector<float> products;
  for (const Index depth : {1, 2, 3, 70}) {
    for (const Index k : {Index{0}, depth / 2, depth - 1}) {
      constexpr Index columns = 20;
      Matrix<float> left = Matrix<float>::Zero(1, depth);
      Matrix<float> right = Matrix<float>::Zero(depth, columns);
      left(0, k) = a;
      right(k, columns - 1) = b;
      const Matrix<float> left_t = left.transpose();
      const Matrix<float> right_t = right.transpose();
      Matrix<float> c(1, columns);
      gemm_bfloat16<Words>(GemmNN<float>{.a = left, .b = right, .c = c});
      products.push_back(c(0, columns - 1));
      gemm_bfloat16<Words>(GemmNT<float>{.a = left, .b = right_t, .c = c});
      products.push_back(c(0, columns - 1));
      gemm_bfloat16<Words>(GemmTN<float>{.a = left_t, .b = right, .c = view(c)});
      products.push_back(c(0, columns - 1));
    }
  }
  return products;
}

}  // namespace

TEMPLATE_TEST_CASE("bfloat16 gemm: worked by hand", "[kernels][gemm]", FloatWords, BFloat16Words) {
  Matrix<float> a(2, 3);
  a << 1, 2, 3, 4, 5, 6;
  Matrix<float> b(3, 2);
  b << 1, 0, -1, 2, 1, 1;
  Matrix<float> ab(2, 2);
  ab << 2, 7, 5, 16;
  Matrix<float> c = Matrix<float>::Constant(2, 2, 100);
  const std::array<float, 2> bias = {10, 1 + 0x1p-20f};  // which stays a float
  gemm_bfloat16<TestType>(GemmNN<float>{.a = a, .b = b, .c = c, .bias = {bias.data()}});
  CHECK(same_bits(c, Matrix<float>{{12, 8 + 0x1p-20f}, {15, 17 + 0x1p-19f * 0.5f}}));
  const Matrix<float> bt = b.transpose();
  gemm_bfloat16<TestType>(GemmNT<float>{.a = a, .b = bt, .c = c});
  CHECK(c == ab);
  const Matrix<float> at = a.transpose();
  gemm_bfloat16<TestType>(GemmTN<float>{.a = at, .b = b, .c = view(c), .start = Start::accumulate});
  CHECK(c == 2 * ab);
}

TEMPLATE_TEST_CASE("bfloat16 gemm: operands are rounded to nearest even, sums are floats",
                   "[kernels][gemm]", FloatWords, BFloat16Words) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float largest = std::numeric_limits<float>::max();
  const std::array<std::pair<float, float>, 14> cases = {{
      {1.0f + 0x1p-8f, 1.0f},                // a tie, to the even one below
      {1.0f + 3 * 0x1p-8f, 1.0f + 0x1p-6f},  // a tie, to the even one above
      {1.0f + 0x1p-8f + 0x1p-20f, 1.0f + 0x1p-7f},
      {-1.0f - 0x1p-9f, -1.0f},
      {257.0f, 256.0f},
      {259.0f, 260.0f},
      {0x1p-126f, 0x1p-126f},
      {0x1p-126f - 0x1p-149f, 0.0f},  // would round to 2^-126
      {-0x1p-130f, 0.0f},
      {0x1p-149f, 0.0f},
      {infinity, infinity},
      {-infinity, -infinity},
      {largest, infinity},
      {0x1.FEp127f, 0x1.FEp127f},  // the largest of 8 bits
  }};
  for (const auto& [value, expected] : cases) {
    CAPTURE(value, expected);
    for (const float product : products_of<TestType>(value, 1)) CHECK(product == expected);
    for (const float product : products_of<TestType>(1, value)) CHECK(product == expected);
  }
  // A NaN all of whose payload would be cut off, too.
  for (const std::uint32_t bits : {0x7F800001U, 0x7FFFFFFFU, 0xFF800001U, 0x7FC00000U}) {
    CAPTURE(bits);
    const auto nan = std::bit_cast<float>(bits);
    for (const float product : products_of<TestType>(nan, 1)) CHECK(std::isnan(product));
    for (const float product : products_of<TestType>(1, nan)) CHECK(std::isnan(product));
  }
  // 2^-7 and less are lost beside 1 in an operand, not in a sum.
  const Matrix<float> a{{1, 0x1p-20f, 0x1p-20f}};
  const Matrix<float> b{{1}, {1}, {1}};
  Matrix<float> c(1, 1);
  gemm_bfloat16<TestType>(GemmNN<float>{.a = a, .b = b, .c = c});
  CHECK(c(0, 0) == 1 + 0x1p-19f);
}

TEMPLATE_TEST_CASE("bfloat16 gemm: small and odd shapes", "[kernels][gemm]", FloatWords,
                   BFloat16Words) {
  constexpr Index packet = packet_size<float>;
  constexpr Index tile = tile_columns<float>;
  for_each_form<TestType>([&](const auto& check) {
    for (const Index m : {Index{0}, Index{1}, Index{2}, tile_rows, tile_rows + 1, Index{33}}) {
      for (const Index n : {Index{0}, Index{1}, packet, packet + 1, tile - 1, tile + 1}) {
        for (const Index k : {0, 1, 2, 3, 17, 31, 32, 33}) check(m, n, k, (m + n + k) % 2 == 1);
      }
    }
  });
}

TEMPLATE_TEST_CASE(
    "bfloat16 gemm: of depth 0, C keeps its initial values and operands need no memory",
    "[kernels][gemm]", FloatWords, BFloat16Words) {
  constexpr Index rows = 3;
  const Index columns = tile_columns<float> + 3;
  const Matrix<float> rows_without(rows, 0);
  const Matrix<float> columns_without(columns, 0);
  const Matrix<float> a(0, rows);
  const Matrix<float> b(0, columns);
  REQUIRE(b.data() == nullptr);
  Vector<float> bias(columns);
  for (Index j = 0; j < columns; ++j) bias[j] = static_cast<float>(j + 1);
  const std::array<float, rows> factors{2, 3, 5};
  Matrix<float> c = Matrix<float>::Constant(rows, columns, 7);
  gemm_bfloat16<TestType>(GemmNN<float>{.a = rows_without,
                                        .b = b,
                                        .c = c,
                                        .start = Start::accumulate,
                                        .bias = {bias.data(), {factors.data(), 1}}});
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < columns; ++j) {
      CHECK(c(i, j) == 7 + factors[to_size(i)] * static_cast<float>(j + 1));
    }
  }
  gemm_bfloat16<TestType>(GemmNT<float>{.a = rows_without, .b = columns_without, .c = c});
  CHECK(c == Matrix<float>::Zero(rows, columns));
  c.setConstant(7);
  gemm_bfloat16<TestType>(
      GemmTN<float>{.a = a, .b = b, .c = view(c), .rows = {1, 2}, .columns = {0, columns}});
  CHECK(c.row(0) == Matrix<float>::Constant(1, columns, 7));
  CHECK(c.bottomRows(2) == Matrix<float>::Zero(2, columns));
}

TEMPLATE_TEST_CASE("bfloat16 gemm: shapes around the sizes of blocks", "[kernels][gemm]",
                   FloatWords, BFloat16Words) {
  constexpr Index task = panel_columns<float>;
  for_each_form<TestType>([&](const auto& check) {
    for (const Index k : {panel_depth - 1, panel_depth + 1, 2 * panel_depth, 2 * panel_depth + 1}) {
      check(tile_rows + 3, task + 1, k, true);
    }
    check(cut_rows, tile_columns<float> + 2, 2 * cut_depth<TestType>, false);
    // Rows of 101 words lie 112 apart.
    constexpr Index fitting = left_capacity / 112;
    constexpr Index depth = 101 * TestType::steps;
    check(2 * fitting - 41, 20, depth - 1, true);  // several blocks of rows
    check(fitting, 5, depth, true);  // as many rows as fit, but for a packet that is not full
    check(1, 17, (left_capacity / packet_size<float> + 1) * TestType::steps, false);
    check(2, 3 * task + 5, 65, true);
    check(130, 2 * task + 7, 40, true);
  });
}

TEMPLATE_TEST_CASE("bfloat16 gemm: a row has the same bits whatever rows it is multiplied with",
                   "[kernels][gemm]", FloatWords, BFloat16Words) {
  constexpr Index total = 2 * left_rows + 150;
  const Index columns = GENERATE(as<Index>{}, 5, panel_columns<float> + 3);
  const Index depth = GENERATE(as<Index>{}, 3, 2 * cut_depth<TestType>);
  CAPTURE(columns, depth);
  const auto a = random_matrix<float>(total, depth, 1);
  const auto b = random_matrix<float>(depth, columns, 2);
  const Matrix<float> bt = b.transpose();
  const auto bias = random_matrix<float>(1, columns, 3);
  for (const bool transposed : {false, true}) {
    const auto product = [&](Index first, Index rows) {
      Matrix<float> c(rows, columns);
      const GatheredRows<float> left = GatheredRows<float>(a).slice(first, rows);
      if (transposed) {
        gemm_bfloat16<TestType>(GemmNT<float>{.a = left, .b = bt, .c = c});
      } else {
        gemm_bfloat16<TestType>(GemmNN<float>{.a = left, .b = b, .c = c, .bias = {bias.data()}});
      }
      return c;
    };
    const Matrix<float> all = product(0, total);
    for (const Index rows : {Index{1}, Index{2}, Index{7}, Index{9}, Index{64}, cut_rows}) {
      CHECK(same_bits(product(13, rows), all.middleRows(13, rows)));
    }
  }
}

TEMPLATE_TEST_CASE("bfloat16 gemm: parts of C have the bits of the whole, and leave the rest",
                   "[kernels][gemm]", FloatWords, BFloat16Words) {
  constexpr Index panel = panel_columns<float>;
  const auto a = random_matrix<float>(41, 75, 1);
  const auto b = random_matrix<float>(75, 2 * panel + 9, 2);
  const Matrix<float> at = a.transpose();
  const Matrix<float> bt = b.transpose();
  const auto before = random_matrix<float>(a.rows(), b.cols(), 3);
  Matrix<float> whole(a.rows(), b.cols());
  gemm_bfloat16<TestType>(GemmNN<float>{.a = a, .b = b, .c = whole});
  for (const Range columns : {Range{0, panel}, Range{panel, panel + 9}, Range{2 * panel, 5}}) {
    CAPTURE(columns.first, columns.count);
    Matrix<float> expected = before;
    expected.middleCols(columns.first, columns.count) =
        whole.middleCols(columns.first, columns.count);
    Matrix<float> c = before;
    gemm_bfloat16<TestType>(GemmNN<float>{.a = a, .b = b, .c = c, .columns = columns});
    CHECK(same_bits(c, expected));
    c = before;
    gemm_bfloat16<TestType>(GemmNT<float>{.a = a, .b = bt, .c = c, .columns = columns});
    CHECK(same_bits(c, expected));
    const Range rows{7, 20};
    expected = before;
    expected.block(7, columns.first, 20, columns.count) =
        whole.block(7, columns.first, 20, columns.count);
    c = before;
    gemm_bfloat16<TestType>(
        GemmTN<float>{.a = at, .b = b, .c = view(c), .rows = rows, .columns = columns});
    CHECK(same_bits(c, expected));
  }
}

TEMPLATE_TEST_CASE("bfloat16 gemm: the epilogue comes once for each element, when it is complete",
                   "[kernels][gemm]", FloatWords, BFloat16Words) {
  const Index depth = GENERATE(as<Index>{}, 0, 9, cut_depth<TestType>);
  const Index rows = GENERATE(as<Index>{}, 3, cut_rows);
  CAPTURE(depth, rows);
  const Index columns = panel_columns<float> + 21;
  const auto a = random_matrix<float>(rows, depth, 1);
  const auto b = random_matrix<float>(depth, columns, 2);
  const Matrix<float> bt = b.transpose();
  for (const bool transposed : {false, true}) {
    Matrix<float> c(rows, columns);
    Matrix<float> seen = Matrix<float>::Zero(rows, columns);
    const auto epilogue = [&](Index row, Index count, Index column, Index width) {
      CHECK(count <= direct_rows);
      CHECK(width <= tile_columns<float>);
      seen.block(row, column, count, width) += c.block(row, column, count, width);
    };
    if (transposed) {
      gemm_bfloat16<TestType>(GemmNT<float>{.a = a, .b = bt, .c = c, .epilogue = epilogue});
    } else {
      gemm_bfloat16<TestType>(GemmNN<float>{.a = a, .b = b, .c = c, .epilogue = epilogue});
    }
    CHECK(seen == c);
    if (depth > 0) CHECK(c.cwiseAbs().minCoeff() > 0);
  }
}

TEMPLATE_TEST_CASE("bfloat16 gemm: NaN and infinity stay in their row and in their column",
                   "[kernels][gemm]", FloatWords, BFloat16Words) {
  const float strange =
      GENERATE(std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity());
  constexpr Index rows = 2 * tile_rows + 3;
  constexpr Index columns = tile_columns<float> + 5;
  constexpr Index depth = 19;
  const auto clean = random_matrix<float>(rows, depth, 1);
  const auto b = random_matrix<float>(depth, columns, 2);
  const Matrix<float> bt = b.transpose();
  const auto product = [&](Form form, const Matrix<float>& left) {
    const Matrix<float> left_t = left.transpose();
    Matrix<float> c(rows, columns);
    if (form == Form::nn) gemm_bfloat16<TestType>(GemmNN<float>{.a = left, .b = b, .c = c});
    if (form == Form::nt) gemm_bfloat16<TestType>(GemmNT<float>{.a = left, .b = bt, .c = c});
    if (form == Form::tn) {
      gemm_bfloat16<TestType>(GemmTN<float>{.a = left_t, .b = b, .c = view(c)});
    }
    return c;
  };
  for (const Form form : {Form::nn, Form::nt, Form::tn}) {
    const Matrix<float> expected = product(form, clean);
    for (Index place = 0; place < rows; ++place) {
      Matrix<float> a = clean;
      a(place, place % depth) = strange;
      const Matrix<float> c = product(form, a);
      CHECK(!c.row(place).array().isFinite().any());
      CHECK(same_bits(c.topRows(place), expected.topRows(place)));
      CHECK(same_bits(c.bottomRows(rows - 1 - place), expected.bottomRows(rows - 1 - place)));
    }
  }
}

TEST_CASE("bfloat16 gemm: both kinds of words give the same but for the rounding of sums",
          "[kernels][gemm]") {
  const auto a = random_matrix<float>(70, 513, 1);
  const auto b = random_matrix<float>(513, 130, 2);
  Matrix<float> c(70, 130);
  Matrix<float> expected = c;
  gemm_bfloat16(GemmNN<float>{.a = a, .b = b, .c = c});
  gemm_bfloat16<FloatWords>(GemmNN<float>{.a = a, .b = b, .c = expected});
  CHECK(relative_error(c, expected) < 1e-6);
  gemm(GemmNN<float>{.a = a, .b = b, .c = expected});
  CHECK(relative_error(c, expected) > 1e-3);
}
