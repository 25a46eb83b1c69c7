#include <cmath>
#include <limits>

#include "../kernels/gemm_support.hpp"
#include "formats.hpp"
#include "moe/flush_denormals.hpp"
#include "moe/weights/narrow_gemm.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)
using namespace moe::test;    // NOLINT(google-build-using-namespace)

namespace {

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// C = A·B by the definition: of formats with scales these are applied to the sums of blocks.
template <class Format>
Matrix<float> multiply_naively(const Matrix<float>& a, const NarrowMatrix<Format>& b,
                               Matrix<float> c) {
  Matrix<float> columns(b.cols(), b.rows());
  for (Index j = 0; j < b.cols(); ++j) {
    for (Index k = 0; k < b.rows(); ++k) columns(j, k) = Format::decode(b.code(k, j), 1);
  }
  for (Index r = 0; r < c.rows(); ++r) {
    for (Index j = 0; j < c.cols(); ++j) {
      const float* activation = a.data() + r * a.cols();
      const float* weight = columns.data() + j * b.rows();
      for (Index first = 0; first < b.rows(); first += 32) {
        const Index end = std::min<Index>(first + 32, b.rows());
        float sum = Format::scaled ? 0 : c(r, j);
        for (Index k = first; k < end; ++k) sum = add_product(activation[k], weight[k], sum);
        c(r, j) = Format::scaled ? add_product(sum, b.scale(first, j), c(r, j)) : sum;
      }
    }
  }
  return c;
}

/// A product of narrow weights, and the same by its definition.
template <class Format>
struct Both {
  Both(Index depth, Index columns)
      : weights(random_matrix<float>(depth, columns, 1, 0.05)), decoded(weights.decoded()) {}

  template <class Change>
  Matrix<float> narrow(const GatheredRows<float>& a, Matrix<float> c, const Change& change) const {
    GemmNN<float, NarrowOperand<Format>> product{.a = a, .b = weights.operand(), .c = c};
    change(product);
    gemm(product);
    return c;
  }

  NarrowMatrix<Format> weights;
  Matrix<float> decoded;
};

}  // namespace

TEMPLATE_TEST_CASE("narrow product: the bits of its definition", "[weights]", MOE_TEST_FORMATS) {
  const Index rows = GENERATE(1, 2, 3, 4, 5, 6, 7, 9, 11, 25, 49, 70);
  const Index depth = GENERATE(0, 1, 7, 32, 33, 131, 300);
  const Index columns = GENERATE(1, 15, 64, 67, 201);
  CAPTURE(rows, depth, columns);
  const Both<TestType> both(depth, columns);
  const auto a = random_matrix<float>(rows, depth, 2);
  const auto before = random_matrix<float>(rows, columns, 3);
  const auto bias = random_matrix<float>(1, columns, 4);
  const auto factors = random_matrix<float>(rows, 1, 5);
  const Matrix<float> nothing = Matrix<float>::Constant(rows, columns, not_a_number);
  const Matrix<float> y = both.narrow(a, nothing, [](auto&) {});
  CHECK(same_bits(y, multiply_naively(a, both.weights, Matrix<float>::Zero(rows, columns))));
  const Matrix<double> exact = a.cast<double>() * both.decoded.template cast<double>();
  CHECK((depth == 0 || relative_error(y.cast<double>(), exact) < 1e-6));
  const auto all = [&](auto& product) {
    product.start = Start::accumulate;
    product.bias = {.values = bias.data(), .factors = {factors.data(), 1}};
  };
  Matrix<float> start = before;
  for (Index r = 0; r < rows; ++r) {
    for (Index j = 0; j < columns; ++j) {
      start(r, j) = add_product(factors(r, 0), bias(0, j), before(r, j));
    }
  }
  CHECK(same_bits(both.narrow(a, before, all), multiply_naively(a, both.weights, start)));
}

TEMPLATE_TEST_CASE(
    "narrow product: without scales the bits of the product with the decoded weights", "[weights]",
    BFloat16, Float16) {
  const Index rows = GENERATE(1, 7, 70);
  const Both<TestType> both(131, 201);
  const auto a = random_matrix<float>(rows, 131, 2);
  Matrix<float> wide(rows, 201);
  gemm(GemmNN<float>{.a = a, .b = both.decoded, .c = wide});
  CHECK(same_bits(both.narrow(a, Matrix<float>(rows, 201), [](auto&) {}), wide));
}

namespace {

/// How many codes a scaled format has, and the one of row k and column j where each row has all of them.
template <class Format>
constexpr Index codes_of = std::is_same_v<Format, Int4> ? 16 : 255;
template <class Format>
Index code_at(Index k, Index j) {
  const Index least = std::is_same_v<Format, Int4> ? -8 : -127;
  return (j + 7 * k) % codes_of<Format> + least;
}

}  // namespace

TEMPLATE_TEST_CASE("narrow product: every code of every step", "[weights]",
                   MOE_TEST_SCALED_FORMATS) {
  // Row k of the identity picks step k, in tiles of all heights.
  const Index rows = GENERATE(1, 2, 3, 4, 5, 6, 9, 50);
  const NarrowMatrix<TestType> weights(
      50, codes_of<TestType>,
      [](Index k, Index j) {
        return static_cast<typename TestType::Code>(code_at<TestType>(k, j));
      },
      [](Index block, Index) { return block == 0 ? 0.5f : 0x1p-24f; });
  for (Index first = 0; first < 50; first += rows) {
    const Index count = std::min(rows, 50 - first);
    const Matrix<float> a = Matrix<float>::Identity(50, 50).middleRows(first, count);
    Matrix<float> c(count, codes_of<TestType>);
    gemm(GemmNN<float, NarrowOperand<TestType>>{.a = a, .b = weights.operand(), .c = c});
    for (Index i = 0; i < count; ++i) {
      const Index k = first + i;
      for (Index j = 0; j < codes_of<TestType>; ++j) {
        const auto code = static_cast<float>(code_at<TestType>(k, j));
        REQUIRE(c(i, j) == code * (k < 32 ? 0.5f : 0x1p-24f));
      }
    }
  }
}

TEMPLATE_TEST_CASE("narrow product: activations near the largest and the smallest numbers",
                   "[weights]", MOE_TEST_SCALED_FORMATS) {
  // Up to 2^92, see narrow_product.hpp, and down to where a product with a weight is denormal.
  const float value = GENERATE(0x1p92f, 0x1p-100f);
  const Index rows = GENERATE(1, 30);
  const NarrowMatrix<TestType> weights(random_matrix<float>(64, 20, 1));
  const Matrix<float> a = random_matrix<float>(rows, 64, 2).cwiseMax(-1).cwiseMin(1);
  const Matrix<float> scaled = a * value;
  Matrix<float> c(rows, 20);
  Matrix<float> plain(rows, 20);
  gemm(GemmNN<float, NarrowOperand<TestType>>{.a = scaled, .b = weights.operand(), .c = c});
  gemm(GemmNN<float, NarrowOperand<TestType>>{.a = a, .b = weights.operand(), .c = plain});
  CHECK(same_bits(c, Matrix<float>(plain * value)));
}

TEMPLATE_TEST_CASE("narrow product: gathered and scattered rows, and nothing beside them",
                   "[weights]", MOE_TEST_FORMATS) {
  const Index rows = GENERATE(3, 40, 57);
  const Both<TestType> both(50, 70);
  const Framed<float> a(random_matrix<float>(60, 50, 2));
  const List list = random_list(rows, 60, 3);
  List to(to_size(rows));
  for (Index i = 0; i < rows; ++i) to[to_size(i)] = rows - 1 - i;
  Framed<float> c(Matrix<float>::Zero(rows, 70));
  MatrixView<float> view = c.view();
  gemm(GemmNN<float, NarrowOperand<TestType>>{
      .a = GatheredRows<float>(a.view(), list.data(), rows),
      .b = both.weights.operand(),
      .c = ScatteredRows<float>(view.data(), view.outerStride(), rows, 70, to.data())});
  CHECK(c.frame_is_whole());
  const Matrix<float> dense = gather(Matrix<float>(a.view()), list);
  const Matrix<float> expected =
      multiply_naively(dense, both.weights, Matrix<float>::Zero(rows, 70)).colwise().reverse();
  CHECK(same_bits(Matrix<float>(view), expected));
}

TEMPLATE_TEST_CASE("narrow product: some columns, and every element to the epilogue once",
                   "[weights]", MOE_TEST_FORMATS) {
  const Index rows = GENERATE(1, 9, 30, 57);
  // A layer cuts columns at cache lines, which may be inside of a panel.
  const Index first =
      GENERATE(Index{0}, cache_line<float>, panel_columns<float>, 5 * cache_line<float>);
  const Index columns = first + 70 + GENERATE(0, 3, 48);
  const Both<TestType> both(40, columns);
  const auto a = random_matrix<float>(rows, 40, 2);
  Matrix<float> seen = Matrix<float>::Zero(rows, columns);
  Matrix<float> c = Matrix<float>::Constant(rows, columns, not_a_number);
  const auto epilogue = [&](Index row, Index count, Index column, Index width) {
    CHECK(count <= direct_rows);
    CHECK(width <= tile_columns<float>);
    seen.block(row, column, count, width).array() += 1;
    CHECK(c.block(row, column, count, width).allFinite());
  };
  gemm_serial(GemmNN<float, NarrowOperand<TestType>>{
      .a = a, .b = both.weights.operand(), .c = c, .columns = {first, 70}, .epilogue = epilogue});
  CHECK((seen.leftCols(first).array() == 0).all());
  CHECK((seen.middleCols(first, 70).array() == 1).all());
  CHECK((seen.rightCols(columns - first - 70).array() == 0).all());
  CHECK(c.leftCols(first).array().isNaN().all());
  CHECK(c.rightCols(columns - first - 70).array().isNaN().all());
  const Matrix<float> whole = multiply_naively(a, both.weights, Matrix<float>::Zero(rows, columns));
  CHECK(same_bits(Matrix<float>(c.middleCols(first, 70)),
                  Matrix<float>(whole.middleCols(first, 70))));
}

TEMPLATE_TEST_CASE("narrow product: the same bits on any number of threads", "[weights]",
                   MOE_TEST_FORMATS) {
  const auto activations = GENERATE(Activations::float32, Activations::int8);
  if (activations == Activations::int8 && !TestType::scaled) return;
  const NarrowMatrix<TestType> weights(random_matrix<float>(300, 700, 1));
  const auto a = random_matrix<float>(290, 300, 2);
  Matrix<float> one;
  for (const int threads : {1, 2, 3}) {
    const test::Threads scope(threads);
    Matrix<float> c(290, 700);
    gemm(GemmNN<float, NarrowOperand<TestType>>{.a = a, .b = weights.operand(activations), .c = c});
    if (threads == 1) one = c;
    CHECK(same_bits(c, one));
  }
}

TEMPLATE_TEST_CASE("narrow product: NaN and infinity in a row stay in it", "[weights]",
                   MOE_TEST_FORMATS) {
  const auto activations = GENERATE(Activations::float32, Activations::int8);
  if (activations == Activations::int8 && !TestType::scaled) return;
  const Index rows = GENERATE(3, 40);
  const float bad = GENERATE(as<float>{}, not_a_number, std::numeric_limits<float>::infinity());
  const Index place = GENERATE(0, 31, 40);
  const NarrowMatrix<TestType> weights(random_matrix<float>(41, 20, 1));
  Matrix<float> a = random_matrix<float>(rows, 41, 2);
  Matrix<float> clean(rows, 20);
  gemm(GemmNN<float, NarrowOperand<TestType>>{
      .a = a, .b = weights.operand(activations), .c = clean});
  a(1, place) = bad;
  Matrix<float> c(rows, 20);
  gemm(GemmNN<float, NarrowOperand<TestType>>{.a = a, .b = weights.operand(activations), .c = c});
  for (Index i = 0; i < rows; ++i) {
    const Matrix<float> row = c.row(i);
    if (i == 1) {
      CHECK(!row.array().isFinite().any());
    } else {
      CHECK(same_bits(row, Matrix<float>(clean.row(i))));
    }
  }
}

TEMPLATE_TEST_CASE("narrow product: the transposed one against double", "[weights]",
                   MOE_TEST_FORMATS) {
  const Index rows = GENERATE(1, 9, 40);
  const Index inputs = GENERATE(1, 33, 200);
  const Index outputs = GENERATE(1, 70, 131);
  CAPTURE(rows, inputs, outputs);
  const Both<TestType> both(inputs, outputs);
  const auto dy = random_matrix<float>(rows, outputs, 2);
  Matrix<float> dx = random_matrix<float>(rows, inputs, 3);
  const Matrix<double> expected =
      dx.cast<double>() + dy.cast<double>() * both.decoded.template cast<double>().transpose();
  gemm(GemmNT<float, NarrowOperand<TestType>>{
      .a = dy, .b = both.weights.operand(), .c = dx, .start = Start::accumulate});
  CHECK(relative_error(dx.cast<double>(), expected) < 1e-5);
  // A part of the columns is the same.
  if (inputs > 48) {
    Matrix<float> part(rows, inputs);
    gemm_serial(GemmNT<float, NarrowOperand<TestType>>{
        .a = dy, .b = both.weights.operand(), .c = part, .columns = {48, inputs - 48}});
    const Matrix<double> product =
        dy.cast<double>() * both.decoded.template cast<double>().transpose();
    CHECK(relative_error(part.rightCols(inputs - 48).cast<double>(),
                         product.rightCols(inputs - 48)) < 1e-5);
  }
  // A row does not depend on the others.
  Matrix<float> alone(1, inputs);
  const Matrix<float> last = dy.row(rows - 1);
  Matrix<float> all(rows, inputs);
  gemm(GemmNT<float, NarrowOperand<TestType>>{.a = dy, .b = both.weights.operand(), .c = all});
  gemm(GemmNT<float, NarrowOperand<TestType>>{.a = last, .b = both.weights.operand(), .c = alone});
  CHECK(same_bits(alone, Matrix<float>(all.row(rows - 1))));
}

TEMPLATE_TEST_CASE("narrow product: the transposed one of depth 0 has the initial values of C",
                   "[weights]", MOE_TEST_FORMATS) {
  const NarrowMatrix<TestType> weights(Matrix<float>(5, 0));
  const Matrix<float> dy(3, 0);
  const auto before = random_matrix<float>(3, 5, 1);
  for (const Start start : {Start::zero, Start::accumulate}) {
    Matrix<float> dx = before;
    gemm(GemmNT<float, NarrowOperand<TestType>>{
        .a = dy, .b = weights.operand(), .c = dx, .start = start});
    CHECK(same_bits(dx, start == Start::zero ? Matrix<float>(Matrix<float>::Zero(3, 5)) : before));
  }
}

TEST_CASE("narrow product: denormal weights and scales, flushed or not", "[weights]") {
  // All of Float16, and scales of Int8 that are denormal halves, but no denormal floats.
  const auto check = [] {
    Matrix<float> tiny(32, 20);
    for (Index i = 0; i < tiny.size(); ++i) tiny.data()[i] = static_cast<float>(i % 50) * 0x1p-24f;
    const Matrix<float> one = Matrix<float>::Identity(3, 32);
    Matrix<float> c(3, 20);
    const NarrowMatrix<Float16> halves(tiny);
    gemm(GemmNN<float, NarrowOperand<Float16>>{.a = one, .b = halves.operand(), .c = c});
    CHECK(same_bits(c, Matrix<float>(tiny.topRows(3))));
    const NarrowMatrix<Int8> bytes(Matrix<float>(127 * tiny));
    gemm(GemmNN<float, NarrowOperand<Int8>>{.a = one, .b = bytes.operand(), .c = c});
    CHECK(same_bits(c, Matrix<float>(bytes.decoded().topRows(3))));
    CHECK(c(1, 0) != 0);
  };
  check();
  const FlushDenormals scope;
  check();
}

TEMPLATE_TEST_CASE("integer product: against the sums over blocks in double", "[weights]",
                   MOE_TEST_SCALED_FORMATS) {
  // All heights of tiles, and 33 and 70 rows, of which 32 are rounded at a time.
  const Index rows = GENERATE(1, 2, 3, 4, 5, 6, 7, 33, 70);
  const Index depth = GENERATE(1, 31, 32, 100, 4096 + 40);
  const Index columns = GENERATE(3, 64, 131);
  CAPTURE(rows, depth, columns);
  const NarrowMatrix<TestType> weights(random_matrix<float>(depth, columns, 1, 0.05));
  Matrix<float> a = random_matrix<float>(rows, depth, 2);
  a.row(0).setZero();
  const auto bias = random_matrix<float>(1, columns, 4);
  Matrix<float> c(rows, columns);
  gemm(GemmNN<float, NarrowOperand<TestType>>{
      .a = a, .b = weights.operand(Activations::int8), .c = c, .bias = {.values = bias.data()}});
  Matrix<double> expected = bias.cast<double>().replicate(rows, 1);
  Matrix<double> magnitude = Matrix<double>::Constant(rows, columns, 1e-30);
  const Matrix<double> decoded = weights.decoded().template cast<double>();
  for (Index r = 0; r < rows; ++r) {
    for (Index k = 0; k < depth; k += 32) {
      const Index count = std::min<Index>(32, depth - k);
      const double largest = static_cast<double>(a.row(r).segment(k, count).cwiseAbs().maxCoeff());
      for (Index i = k; i < k + count; ++i) {
        if (largest == 0) continue;
        const double code = std::nearbyint(static_cast<double>(a(r, i)) * 127 / largest);
        add_row(code * largest / 127, &decoded(i, 0), columns, &expected(r, 0), &magnitude(r, 0));
      }
    }
  }
  // But for a code that the rounding of 127 / largest moves across a tie.
  CHECK(((c.cast<double>() - expected).array().abs() <= 2e-3 * magnitude.array() + 1e-6).all());
  CHECK(relative_error(c.cast<double>(), expected) < 2e-4);
  // And a row alone.
  Matrix<float> alone(1, columns);
  for (const Index r : {Index{0}, rows / 2, rows - 1}) {
    const Matrix<float> row = a.row(r);
    gemm(GemmNN<float, NarrowOperand<TestType>>{.a = row,
                                                .b = weights.operand(Activations::int8),
                                                .c = alone,
                                                .bias = {.values = bias.data()}});
    CHECK(same_bits(alone, Matrix<float>(c.row(r))));
  }
}

TEMPLATE_TEST_CASE("integer product: the largest sums of a block, of either sign", "[weights]",
                   MOE_TEST_SCALED_FORMATS) {
  // 16 bits hold a sum of products of unsigned bytes up to 15, but barely.
  const Index rows = GENERATE(1, 2, 3, 4, 5);
  const int least = std::is_same_v<TestType, Int4> ? -8 : -127;
  const int most = std::is_same_v<TestType, Int4> ? 7 : 127;
  const int code = GENERATE_COPY(least, most);
  const float value = GENERATE(-127.0f, 127.0f);
  CAPTURE(rows, code, value);
  const NarrowMatrix<TestType> weights(
      96, 67, [&](Index, Index) { return static_cast<typename TestType::Code>(code); },
      [](Index, Index) { return 0.5f; });
  const Matrix<float> a = Matrix<float>::Constant(rows, 96, value);
  Matrix<float> c(rows, 67);
  gemm(GemmNN<float, NarrowOperand<TestType>>{
      .a = a, .b = weights.operand(Activations::int8), .c = c});
  CHECK((c.array() == 96 * 0.5f * static_cast<float>(code) * value).all());
}

TEMPLATE_TEST_CASE("integer product: every code of every step", "[weights]",
                   MOE_TEST_SCALED_FORMATS) {
  // Row k of 127 times the identity picks step k, with a scale of 1.
  const Index rows = GENERATE(1, 2, 3, 4, 5);
  const NarrowMatrix<TestType> weights(
      50, codes_of<TestType>,
      [](Index k, Index j) {
        return static_cast<typename TestType::Code>(code_at<TestType>(k, j));
      },
      [](Index, Index) { return 0.5f; });
  for (Index first = 0; first < 50; first += rows) {
    const Index count = std::min(rows, 50 - first);
    const Matrix<float> a = 127 * Matrix<float>::Identity(50, 50).middleRows(first, count);
    Matrix<float> c(count, codes_of<TestType>);
    gemm(GemmNN<float, NarrowOperand<TestType>>{
        .a = a, .b = weights.operand(Activations::int8), .c = c});
    for (Index i = 0; i < count; ++i) {
      for (Index j = 0; j < codes_of<TestType>; ++j) {
        const auto code = static_cast<float>(code_at<TestType>(first + i, j));
        REQUIRE(c(i, j) == 127 * 0.5f * code);
      }
    }
  }
}

TEMPLATE_TEST_CASE("integer product: exact where activations are whole numbers to 127", "[weights]",
                   MOE_TEST_SCALED_FORMATS) {
  // The largest codes of both signs, whose sums are the largest that there are.
  const Index rows = GENERATE(1, 5);
  Matrix<float> w(64, 20);
  Matrix<float> a(rows, 64);
  for (Index i = 0; i < w.size(); ++i) w.data()[i] = i % 3 == 0 ? -127.0f : 127.0f;
  if constexpr (std::is_same_v<TestType, Int4>) w /= 127.0f / 8.0f;
  for (Index i = 0; i < a.size(); ++i) a.data()[i] = i % 5 == 0 ? 127.0f : -127.0f;
  const NarrowMatrix<TestType> weights(w);
  const Matrix<float> decoded = weights.decoded();
  Matrix<float> c(rows, 20);
  gemm(GemmNN<float, NarrowOperand<TestType>>{
      .a = a, .b = weights.operand(Activations::int8), .c = c});
  CHECK((c - a * decoded).isZero(0));
}

TEST_CASE("integer product: activations near the smallest numbers", "[weights]") {
  const NarrowMatrix<Int8> weights(Matrix<float>::Constant(32, 3, 127));
  for (const float value : {1e-38f, 0x1p-140f, 3e38f}) {
    const Matrix<float> a = Matrix<float>::Constant(1, 32, value);
    Matrix<float> c(1, 3);
    gemm(GemmNN<float, NarrowOperand<Int8>>{
        .a = a, .b = weights.operand(Activations::int8), .c = c});
    const double expected = 32.0 * 127.0 * static_cast<double>(value);
    if (expected > 3.4e38) {
      CHECK(std::isinf(c(0, 0)));
    } else {
      CHECK(std::abs(static_cast<double>(c(0, 0)) / expected - 1) < 0.02);
    }
  }
}
