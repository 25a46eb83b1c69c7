#include "moe/kernels/micro_kernel.hpp"

#include <array>
#include <vector>

#include "../support.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)

TEST_CASE("tile: a number of run time becomes a constant", "[kernels]") {
  for (Index value = 1; value <= 8; ++value) {
    Index seen = 0;
    with_constant<8>(value, [&](auto constant) { seen += constant; });
    CHECK(seen == value);
  }
}

TEMPLATE_TEST_CASE("tile: every height and width, any step of the left operand", "[kernels]", float,
                   double) {
  using S = TestType;
  constexpr Index size = packet_size<S>;
  for (Index packets = 1; packets <= tile_packets; ++packets) {
    for (Index rows = 1; rows <= tile_rows; ++rows) {
      for (const Index width : {packets * size, packets * size - 1}) {
        if (width == 0) continue;  // a processor without packets
        for (const Index step : {1, 3}) {
          for (const Index depth : {0, 1, 7, 8, 21}) {
            CAPTURE(packets, rows, width, step, depth);
            const Matrix<S> a = test::random_matrix<S>(rows, depth * step + 1, 1);
            const Matrix<S> b = test::random_matrix<S>(depth + 1, packets * size, 2);
            Matrix<S> c = test::random_matrix<S>(rows, width, 3);
            // Twice, so that both starts are seen: from zero with a bias, then added to that.
            const Matrix<S> bias = test::random_matrix<S>(1, width, 4);
            const Matrix<S> factors = test::random_matrix<S>(rows, 2, 5);
            Matrix<double> expected =
                factors.col(0).template cast<double>() * bias.template cast<double>();
            for (Index r = 0; r < rows; ++r) {
              for (Index k = 0; k < depth; ++k) {
                for (Index j = 0; j < width; ++j) {
                  expected(r, j) +=
                      2 * static_cast<double>(a(r, k * step)) * static_cast<double>(b(k, j));
                }
              }
            }
            Left<S> left;
            left.step = step;
            std::vector<S*> to;
            for (Index r = 0; r < rows; ++r) {
              left.row[r] = row_data(a, r);
              to.push_back(row_data(c, r));
            }
            for (const Start start : {Start::zero, Start::accumulate}) {
              Bias<S> added{.factors = {factors.data(), 2}};
              if (start == Start::zero) added.values = bias.data();
              // It is only prefetched, so any address will do.
              multiply_tile(rows, packets, width, left, Panel<S>{b.data(), packets * size}, depth,
                            start, added, to.data(), Prefetch<S>{b.data(), 1, 5});
            }
            const Matrix<double> result = c.template cast<double>();
            CHECK(test::relative_error(result, expected) < test::tolerance<S>);
          }
        }
      }
    }
  }
}
