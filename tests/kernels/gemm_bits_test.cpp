#include <array>
#include <limits>

#include "gemm_support.hpp"
#include "moe/kernels/gemm.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)
using namespace moe::test;    // NOLINT(google-build-using-namespace)

TEMPLATE_TEST_CASE("gemm: the same bits on any number of threads", "[kernels][gemm]", float,
                   double) {
  constexpr Index m = 124;
  constexpr Index n = 2 * panel_columns<TestType> + 5;
  constexpr Index k = panel_depth + 30;
  STATIC_REQUIRE(m * n * k > Index{1} << 18);  // or one thread would do it all
  const auto a = random_matrix<TestType>(m, k, 1);
  const auto b = random_matrix<TestType>(k, n, 2);
  const Matrix<TestType> at = a.transpose();
  const Matrix<TestType> bt = b.transpose();
  const auto before = random_matrix<TestType>(m, n, 3);
  Matrix<TestType> nn;
  Matrix<TestType> nt;
  Matrix<TestType> tn;
  for (const int threads : {1, 2, 3, 8}) {
    CAPTURE(threads);
    const test::Threads scope(threads);
    Matrix<TestType> c = before;
    gemm(GemmNN<TestType>{.a = a, .b = b, .c = c, .start = Start::accumulate});
    if (threads == 1) nn = c;
    CHECK(same_bits(c, nn));
    c = before;
    gemm(GemmNT<TestType>{.a = a, .b = bt, .c = c, .start = Start::accumulate});
    if (threads == 1) nt = c;
    CHECK(same_bits(c, nt));
    c = before;
    gemm(GemmTN<TestType>{.a = at, .b = b, .c = view(c), .start = Start::accumulate});
    if (threads == 1) tn = c;
    CHECK(same_bits(c, tn));
  }
  // The three forms add the same products in the same order.
  CHECK(same_bits(nn, nt));
  CHECK(same_bits(nn, tn));
}

TEMPLATE_TEST_CASE("gemm: a row has the same bits whatever rows it is multiplied with",
                   "[kernels][gemm]", float, double) {
  constexpr Index total = 500;
  const Index columns = GENERATE(as<Index>{}, 1, 47, panel_columns<double> + 3);
  const Index depth = GENERATE(as<Index>{}, 3, panel_depth + 44);
  CAPTURE(columns, depth);
  const auto a = random_matrix<TestType>(total, depth, 1);
  const auto b = random_matrix<TestType>(depth, columns, 2);
  const Matrix<TestType> bt = b.transpose();
  const auto bias = random_matrix<TestType>(1, columns, 3);
  const auto product = [&](const List& list, bool transposed) {
    const GatheredRows<TestType> rows(a, list.data(), static_cast<Index>(list.size()));
    Matrix<TestType> c(rows.count(), columns);
    if (transposed) {
      gemm(GemmNT<TestType>{.a = rows, .b = bt, .c = c});
    } else {
      gemm(GemmNN<TestType>{.a = rows, .b = b, .c = c, .bias = {bias.data()}});
    }
    return c;
  };
  for (const bool transposed : {false, true}) {
    CAPTURE(transposed);
    List everything(to_size(total));
    for (Index i = 0; i < total; ++i) everything[to_size(i)] = i;
    const Matrix<TestType> all = product(everything, transposed);
    const std::array<Index, 9> sizes = {1, 2, 3, 7, 8, 2 * tile_rows, 2 * tile_rows + 1, 30, 200};
    for (const Index size : sizes) {
      const List list = random_list(size, total, static_cast<std::uint64_t>(size));
      const Matrix<TestType> some = product(list, transposed);
      for (Index i = 0; i < size; ++i) {
        REQUIRE(same_bits(some.row(i), all.row(list[to_size(i)])));
      }
    }
    for (const Index row : {Index{0}, Index{64}, total - 1}) {
      REQUIRE(same_bits(product({row}, transposed), all.row(row)));
    }
  }
}

TEMPLATE_TEST_CASE("gemm: the same bits wherever in a cache line B begins", "[kernels][gemm]",
                   float, double) {
  constexpr Index n = 2 * panel_columns<TestType>;
  constexpr Index k = 70;
  const Index rows = GENERATE(as<Index>{}, 1, 2, tile_rows, tile_rows + 2, 2 * tile_rows + 1);
  const auto a = random_matrix<TestType>(rows, k, 1);
  const auto b = random_matrix<TestType>(k, n, 2);
  Matrix<TestType> expected(rows, n);
  gemm_serial(GemmNT<TestType>{.a = a, .b = Matrix<TestType>(b.transpose()), .c = expected});
  for (Index offset = 0; offset < cache_line<TestType>; ++offset) {
    CAPTURE(rows, offset);
    // Wider than B, so that few rows do not read it as one piece.
    Matrix<TestType> wider(k + 1, n + cache_line<TestType>);
    wider.block(0, offset, k, n) = b;
    Matrix<TestType> c(rows, n);
    gemm_serial(GemmNN<TestType>{.a = a, .b = wider.block(0, offset, k, n), .c = c});
    CHECK(same_bits(c, expected));
  }
}
