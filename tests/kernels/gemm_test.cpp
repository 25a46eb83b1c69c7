#include "moe/kernels/gemm.hpp"

#include <array>
#include <limits>
#include <string>

#include "gemm_support.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)
using namespace moe::test;    // NOLINT(google-build-using-namespace)

TEMPLATE_TEST_CASE("gemm: worked by hand", "[kernels][gemm]", float, double) {
  Matrix<TestType> a(2, 3);
  a << 1, 2, 3, 4, 5, 6;
  Matrix<TestType> b(3, 2);
  b << 1, 0, -1, 2, 1, 1;
  Matrix<TestType> ab(2, 2);
  ab << 2, 7, 5, 16;
  Matrix<TestType> c = Matrix<TestType>::Constant(2, 2, 100);
  const std::array<TestType, 2> bias = {10, 20};
  using S = TestType;

  gemm(GemmNN<S>{.a = a, .b = b, .c = c});
  CHECK(c == ab);
  gemm(GemmNN<S>{.a = a, .b = b, .c = c, .start = Start::accumulate});
  CHECK(c == 2 * ab);
  gemm(GemmNN<S>{.a = a, .b = b, .c = c, .bias = {bias.data()}});
  CHECK(c.row(0) == ab.row(0) + Eigen::Matrix<TestType, 1, 2>(10, 20));
  CHECK(c.row(1) == ab.row(1) + Eigen::Matrix<TestType, 1, 2>(10, 20));
  const std::array<TestType, 2> factors = {3, -1};
  gemm(GemmNN<S>{.a = a,
                 .b = b,
                 .c = c,
                 .start = Start::accumulate,
                 .bias = {bias.data(), {factors.data(), 1}}});
  CHECK(c.row(0) == 2 * ab.row(0) + Eigen::Matrix<TestType, 1, 2>(10 + 30, 20 + 60));
  CHECK(c.row(1) == 2 * ab.row(1) + Eigen::Matrix<TestType, 1, 2>(10 - 10, 20 - 20));

  const Matrix<TestType> bt = b.transpose();
  gemm(GemmNT<S>{.a = a, .b = bt, .c = c});
  CHECK(c == ab);
  const Matrix<TestType> at = a.transpose();
  gemm(GemmTN<S>{.a = at, .b = b, .c = view(c), .start = Start::accumulate});
  CHECK(c == 2 * ab);
  gemm(GemmTN<S>{.a = at, .b = b, .c = view(c)});
  CHECK(c == ab);

  const std::array<Index, 3> list = {1, 1, 0};
  Matrix<TestType> listed(3, 2);
  gemm(GemmNN<S>{.a = {a, list.data(), 3}, .b = b, .c = listed});
  CHECK(listed.row(0) == ab.row(1));
  CHECK(listed.row(1) == ab.row(1));
  CHECK(listed.row(2) == ab.row(0));
}

TEST_CASE("gemm: shapes that do not match are refused", "[kernels][gemm]") {
  const Matrix<double> a(2, 3);
  const Matrix<double> b(4, 5);
  Matrix<double> c = Matrix<double>::Constant(2, 5, 7);
  using S = double;
  const auto rows_of_b = [](const char* form, const char* a_is, const char* must, const char* has) {
    return std::string("moe: gemm(") + form + "): A, transposed where the form says so, is " +
           a_is + ", so B, likewise, must have " + must + " rows, and has " + has;
  };
  CHECK_THROWS_WITH(gemm(GemmNN<S>{.a = a, .b = b, .c = c}),
                    rows_of_b("GemmNN", "2 x 3", "3", "4"));
  CHECK_THROWS_WITH(gemm(GemmNT<S>{.a = a, .b = b, .c = c}),
                    rows_of_b("GemmNT", "2 x 3", "3", "5"));
  CHECK_THROWS_WITH(gemm(GemmTN<S>{.a = a, .b = b, .c = view(c)}),
                    rows_of_b("GemmTN", "3 x 2", "2", "4"));
  const Matrix<double> fits(3, 5);
  Matrix<double> tall(3, 5);
  CHECK_THROWS_WITH(gemm(GemmNN<S>{.a = a, .b = fits, .c = tall}),
                    "moe: gemm(GemmNN): C is 3 x 5, must be 2 x 5");
  Matrix<double> narrow(2, 4);
  CHECK_THROWS_WITH(gemm(GemmNN<S>{.a = a, .b = fits, .c = narrow}),
                    "moe: gemm(GemmNN): C is 2 x 4, must be 2 x 5");
  CHECK(c == Matrix<double>::Constant(2, 5, 7));
}

TEMPLATE_TEST_CASE("gemm: small and odd shapes are right to the last bit", "[kernels][gemm]", float,
                   double) {
  constexpr Index packet = packet_size<TestType>;
  constexpr Index tile = tile_columns<TestType>;
  const List rows = {0, 1, 2, tile_rows - 1, tile_rows, tile_rows + 1, 2 * tile_rows + 1};
  const List columns = {0, 1, packet - 1, packet, packet + 1, tile - 1, tile, tile + 1};
  for (const Index m : rows) {
    for (const Index n : columns) {
      for (const Index k : {0, 1, 2, 9, 17}) {
        const bool listed = (m + n + k) % 2 == 1;
        for_each_form_and_start<TestType>([&](Form form, Start start, Added added) {
          check_product<TestType>(form, m, n, k, start, added, listed, true);
        });
      }
    }
  }
}

TEMPLATE_TEST_CASE("gemm: shapes around the sizes of blocks and tasks", "[kernels][gemm]", float,
                   double) {
  constexpr Index tile = tile_columns<TestType>;
  constexpr Index task = panel_columns<TestType>;
  const auto check = [](Index m, Index n, Index k, bool exactly) {
    for_each_form_and_start<TestType>([&](Form form, Start start, Added added) {
      check_product<TestType>(form, m, n, k, start, added, start == Start::accumulate, exactly);
    });
  };
  for (const Index k : {panel_depth - 1, panel_depth, panel_depth + 1, 2 * panel_depth + 3}) {
    check(tile_rows + 1, tile + 1, k, true);
  }
  // Enough rows that a whole panel of B is copied.
  check(2 * tile_rows + 3, tile, panel_depth + 1, true);
  for (const Index m : {Index{63}, Index{64}, Index{65}, task_rows + 1}) {
    check(m, tile - 1, 5, true);
  }
  for (const Index n : {4 * tile / 3, 5 * tile / 3, 2 * tile + 1, task - 1, task, task + 1}) {
    check(tile_rows + 3, n, 7, true);
  }
  check(64 + 1, task + 1, panel_depth + 1, false);
  constexpr Index packet = packet_size<TestType>;
  // All rows in the highest tile that there is.
  check(direct_rows, task + packet, 2 * panel_depth + 3, true);
  // Halves of packets and several blocks of the depth, where products stream.
  const List few = {1, packet / 2, packet / 2 + 1, packet + 1, 3 * packet + packet / 2};
  for (const Index m : few) {
    check(m, tile_rows + 1, 2 * 1024 + 3, true);
  }
  // A small depth, of which nt copies B, and few columns, of which tn makes the transpose of C.
  for (const Index k : {1, 63, 64, 65}) {
    for (const Index m : {2 * tile_rows - 1, 2 * tile_rows, 2 * tile_rows + 3}) {
      check(m, task + 3, k, true);
    }
  }
  for (const Index n : {Index{1}, packet / 4, packet / 2, tile_rows, tile_rows + 1}) {
    for (const Index m : {tile - 1, tile, 2 * task + 5}) check(m, n, 131, true);
  }
  // More columns than a group has, whose part of C stays in L2, and three blocks of the depth.
  constexpr Index rows = 2 * tile_rows + 5;
  constexpr Index group = cached_elements<TestType> / rows;
  check_product<TestType>(Form::nn, rows, group + tile + 3, 2 * strip_steps + 3, Start::zero,
                          Added::scaled_bias, true, true);
  check_product<TestType>(Form::nn, rows, group + 1, 2 * strip_steps + 1, Start::accumulate,
                          Added::nothing, false, true);
  // More pairs of rows than go at once, and rows of C in several slices.
  check(tile_rows + 1, 7 * task + 3, 3, true);
  check(2 * tile_rows, 3, 2 * 128 + 1, true);
}

TEMPLATE_TEST_CASE("gemm: of depth 0, C keeps its initial values and operands need no memory",
                   "[kernels][gemm]", float, double) {
  using S = TestType;
  const Index rows = GENERATE(Index{1}, small_m_rows + 1, 2 * tile_rows + 1, Index{65});
  const Index columns = panel_columns<S> + GENERATE(Index{0}, tile_columns<S>, Index{3});
  const Matrix<S> rows_without(rows, 0);
  const Matrix<S> columns_without(columns, 0);
  const Matrix<S> a(0, rows);
  const Matrix<S> b(0, columns);
  REQUIRE(b.data() == nullptr);
  Vector<S> bias(columns);
  for (Index j = 0; j < columns; ++j) bias[j] = static_cast<S>(j + 1);
  Vector<S> factors(rows);
  for (Index i = 0; i < rows; ++i) factors[i] = static_cast<S>(i + 2);
  const Matrix<S> before = Matrix<S>::Constant(rows, columns, 7);
  Matrix<S> zero_at_end = before;
  zero_at_end.bottomRightCorner(rows - 1, 2).setZero();
  const Range last_two{columns - 2, 2};
  const Range from_one{1, rows - 1};

  for (const bool accumulates : {false, true}) {
    const Start start = start_of(!accumulates);
    const Matrix<S> initial = accumulates ? before : Matrix<S>::Zero(rows, columns);
    Matrix<S> c = before;
    Matrix<int> calls = Matrix<int>::Zero(rows, columns);
    const auto count = [&](Index row, Index height, Index column, Index width) {
      calls.block(row, column, height, width).array() += 1;
    };
    gemm(GemmNN<S>{.a = rows_without,
                   .b = b,
                   .c = c,
                   .start = start,
                   .bias = {bias.data(), {factors.data(), 1}},
                   .epilogue = Epilogue(count)});
    CHECK(c == initial + factors * bias.transpose());
    CHECK(calls == Matrix<int>::Ones(rows, columns));
    c = before;
    gemm(GemmNT<S>{.a = rows_without, .b = columns_without, .c = c, .start = start});
    CHECK(c == initial);
    c = before;
    gemm(GemmTN<S>{.a = a, .b = b, .c = view(c), .start = start});
    CHECK(c == initial);
    c = before;
    gemm_serial(GemmTN<S>{
        .a = a, .b = b, .c = view(c), .rows = from_one, .columns = last_two, .start = start});
    CHECK(c == (accumulates ? before : zero_at_end));
  }
  // Some columns, and no bias.
  Matrix<S> c = before;
  const Range last{panel_columns<S>, columns - panel_columns<S>};
  gemm_serial(GemmNN<S>{.a = rows_without, .b = b, .c = c, .columns = last});
  CHECK(c.leftCols(last.first) == before.leftCols(last.first));
  CHECK((c.rightCols(last.count).array() == 0).all());
}

TEMPLATE_TEST_CASE("gemm: long sums keep their accuracy", "[kernels][gemm]", float, double) {
  for_each_form_and_start<TestType>([&](Form form, Start start, Added added) {
    check_product<TestType>(form, 9, 35, 5000, start, added, false, false);
  });
}

TEMPLATE_TEST_CASE("gemm: NaN and infinity stay in their row and in their column",
                   "[kernels][gemm]", float, double) {
  const TestType strange = GENERATE(std::numeric_limits<TestType>::quiet_NaN(),
                                    std::numeric_limits<TestType>::infinity());
  constexpr Index n = tile_columns<TestType> + 5;
  constexpr Index k = 19;
  const Index rows = GENERATE(as<Index>{}, tile_rows + 3, 4 * tile_rows + 1);
  const auto b = random_matrix<TestType>(k, n, 2);
  const Matrix<TestType> bt = b.transpose();
  const auto clean = random_matrix<TestType>(rows, k, 1);
  for (Index place = 0; place < rows; ++place) {
    Matrix<TestType> a = clean;
    a(place, place % k) = strange;
    const Matrix<TestType> at = a.transpose();
    const Matrix<TestType> clean_t = clean.transpose();
    for (const Form form : {Form::nn, Form::nt, Form::tn}) {
      const auto product = [&](const Matrix<TestType>& left, const Matrix<TestType>& left_t) {
        Matrix<TestType> c = Matrix<TestType>::Zero(rows, n);
        if (form == Form::nn) gemm(GemmNN<TestType>{.a = left, .b = b, .c = c});
        if (form == Form::nt) gemm(GemmNT<TestType>{.a = left, .b = bt, .c = c});
        if (form == Form::tn) gemm(GemmTN<TestType>{.a = left_t, .b = b, .c = view(c)});
        return c;
      };
      const Matrix<TestType> expected = product(clean, clean_t);
      const Matrix<TestType> c = product(a, at);
      for (Index i = 0; i < rows; ++i) {
        if (i == place) {
          REQUIRE(!c.row(i).array().isFinite().any());
        } else {
          REQUIRE(same_bits(c.row(i), expected.row(i)));
        }
      }
    }
  }
  for (const Index column : {Index{0}, Index{7}, n - 1}) {
    Matrix<TestType> changed = b;
    changed(3, column) = strange;
    const Matrix<TestType> strange_b = changed;
    const Matrix<TestType> strange_bt = changed.transpose();
    Matrix<TestType> c(rows, n);
    for (const bool transposed : {false, true}) {
      if (transposed) {
        gemm(GemmNT<TestType>{.a = clean, .b = strange_bt, .c = c});
      } else {
        gemm(GemmNN<TestType>{.a = clean, .b = strange_b, .c = c});
      }
      for (Index j = 0; j < n; ++j) {
        REQUIRE(c.col(j).array().isFinite().any() == (j != column));
        REQUIRE(c.col(j).array().isFinite().all() == (j != column));
      }
    }
  }
}
