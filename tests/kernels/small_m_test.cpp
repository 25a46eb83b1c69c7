#include "moe/kernels/small_m.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "gemm_support.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)
using namespace moe::test;    // NOLINT(google-build-using-namespace)

TEMPLATE_TEST_CASE("small M: few rows with all columns of B, which is read sequentially",
                   "[kernels][gemm]", float, double) {
  using S = TestType;
  constexpr Index packet = packet_size<S>;
  constexpr Index longest = 64 * cache_line<S>;
  STATIC_REQUIRE(is_small_m<S>(small_m_rows, longest, longest));
  STATIC_REQUIRE_FALSE(is_small_m<S>(small_m_rows + 1, longest, longest));
  STATIC_REQUIRE_FALSE(is_small_m<S>(1, longest, 2 * longest));
  STATIC_REQUIRE_FALSE(is_small_m<S>(1, 2 * longest, 2 * longest));
  constexpr Index no_tile = (small_m_packets - 1) * packet;
  STATIC_REQUIRE_FALSE(is_small_m<S>(1, no_tile, no_tile));
  const List all_columns = {0,          packet,     2 * packet, 3 * packet,
                            4 * packet, 5 * packet, longest,    longest + packet};
  for (Index rows = 1; rows <= small_m_rows + 1; ++rows) {
    for (const Index columns : all_columns) {
      for (const Index depth : {0, 1, 2, 3, 8, 131}) {
        CAPTURE(rows, columns, depth);
        const Matrix<S> a = random_matrix<S>(3, depth, 1);
        const List list = random_list(rows, 3, 2);
        List backwards(to_size(rows));
        for (Index i = 0; i < rows; ++i) backwards[to_size(i)] = rows - 1 - i;
        // Rows of NaN around it, but nothing between its rows.
        Matrix<S> framed_b =
            Matrix<S>::Constant(depth + 2, columns, std::numeric_limits<S>::quiet_NaN());
        framed_b.middleRows(1, depth) = random_matrix<S>(depth, columns, 3);
        const ConstMatrixView<S> b = rows_of(std::as_const(framed_b), 1, depth);
        const Matrix<S> before = random_matrix<S>(rows, columns, 4);
        const Matrix<S> bias = random_matrix<S>(1, columns, 5);
        const Matrix<S> factors = random_matrix<S>(rows, 1, 6);
        const Bias<S> scaled{bias.data(), {factors.data(), 1}};
        for (const auto& [start, added] :
             {std::pair(Start::zero, Bias<S>{}), std::pair(Start::accumulate, Bias<S>{}),
              std::pair(Start::accumulate, scaled)}) {
          Expected<S> expected;
          expected.left = gather(a, list);
          expected.right = b;
          expected.initial = gather(before, backwards);
          if (start == Start::zero) expected.initial.setZero();
          if (added.values != nullptr) expected.add_bias(factors, bias);
          const Matrix<S> product = expected.chain();
          Framed<S> c(before);
          const ScatteredRows<S> to(c.view().data(), c.view().outerStride(), rows, columns,
                                    backwards.data());
          Eigen::MatrixXi finished = Eigen::MatrixXi::Zero(rows, columns);
          const auto epilogue = [&](Index row, Index count, Index column, Index width) {
            finished.block(row, column, count, width).array() += 1;
            for (Index i = row; i < row + count; ++i) {
              CHECK(same_bits(c.view().row(rows - 1 - i).segment(column, width),
                              product.row(i).segment(column, width)));
            }
          };
          const GatheredRows<S> left(a, list.data(), rows);
          gemm_serial(GemmNN<S>{
              .a = left, .b = b, .c = to, .start = start, .bias = added, .epilogue = epilogue});
          CHECK(finished.isOnes(0));
          CHECK(c.frame_is_whole());
          if (start != Start::zero) continue;
          for (const int threads : {1, 2}) {
            const test::Threads scope(threads);
            Matrix<S> split = before;
            gemm(GemmNN<S>{.a = left, .b = b, .c = split});
            CHECK(same_bits(split, product));
          }
        }
      }
    }
  }
}

TEST_CASE("small M: all of B that is not read at once is prefetched once, then the next B",
          "[kernels][gemm]") {
  STATIC_REQUIRE(first_prefetched(10, 100, 35) == 40);  // 3 blocks ahead of the second
  STATIC_REQUIRE(first_prefetched(10, 103, 35) == 43);  // and after 6 more at the end
  STATIC_REQUIRE(first_prefetched(10, 100, 5) == 10);
  STATIC_REQUIRE(first_prefetched(10, 36, 35) == 36);  // all of it is read before
  STATIC_REQUIRE(first_prefetched(10, 0, 35) == 0);
}

TEMPLATE_TEST_CASE("small M: prefetching the next B changes nothing", "[kernels][gemm]", float,
                   double) {
  using S = TestType;
  constexpr Index width = panel_columns<S>;
  STATIC_REQUIRE(is_small_m<S>(1, width, width));
  STATIC_REQUIRE(is_small_m<S>(small_m_rows, width, width));
  for (const Index panels : {1, 3}) {
    for (const Index depth : {3, 71}) {
      const Matrix<S> b = random_matrix<S>(depth, panels * width, 1);
      const Matrix<S> next = random_matrix<S>(depth, panels * width, 2);
      for (const Index rows : {1, 2, 3, 4, 5, 9, 70}) {
        const Matrix<S> a = random_matrix<S>(rows, depth, 3);
        for (Index first = 0; first < std::min(panels, Index{2}) * width; first += width) {
          CAPTURE(panels, depth, rows, first);
          Matrix<S> c = random_matrix<S>(rows, panels * width, 4);
          Matrix<S> alone = c;
          const auto multiply = [&](Matrix<S>& to, const S* next_b) {
            gemm_serial(GemmNN<S>{.a = a,
                                  .b = b,
                                  .c = to,
                                  .columns = {first, width},
                                  .start = Start::accumulate,
                                  .prefetch_next = next_b});
          };
          multiply(alone, nullptr);
          multiply(c, next.data());
          CHECK(same_bits(c, alone));
        }
      }
    }
  }
}
