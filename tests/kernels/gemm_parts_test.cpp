#include <limits>

#include "gemm_support.hpp"
#include "moe/kernels/gemm.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)
using namespace moe::test;    // NOLINT(google-build-using-namespace)

TEMPLATE_TEST_CASE("gemm: columns in groups, the depth in blocks, and every tile finished once",
                   "[kernels][gemm]", float, double) {
  using S = TestType;
  static_assert(cached_elements<S> / (250 * panel_columns<S>) < 3, "several groups");
  // Many, some tiles, or as many as the highest tile has, for which the columns must be whole packets.
  const Index rows = GENERATE(as<Index>{}, 250, 3 * tile_rows + 1, direct_rows);
  const Index columns = 5 * panel_columns<S> + (rows == direct_rows ? 0 : 5);
  const Index depth = GENERATE(Index{60}, 2 * panel_depth + 3);  // nt may copy B for the first
  const Matrix<S> a = random_matrix<S>(rows, depth, 1);
  const Matrix<S> b = random_matrix<S>(depth, columns, 2);
  const Matrix<S> bt = b.transpose();
  Matrix<S> whole(rows, columns);
  gemm(GemmNN<S>{.a = a, .b = b, .c = whole});
  const Matrix<double> expected = a.template cast<double>() * b.template cast<double>();
  for (const bool transposed : {false, true}) {
    Matrix<S> c = Matrix<S>::Constant(rows, columns, 7);
    Eigen::MatrixXi finished = Eigen::MatrixXi::Zero(rows, columns);
    const auto epilogue = [&](Index row, Index count, Index column, Index width) {
      finished.block(row, column, count, width).array() += 1;
      // Nothing is added after this.
      for (Index r = row; r < row + count; ++r) {
        CHECK(same_bits(c.row(r).segment(column, width), whole.row(r).segment(column, width)));
      }
    };
    if (transposed) {
      gemm_serial(GemmNT<S>{.a = a, .b = bt, .c = c, .epilogue = epilogue});
    } else {
      gemm_serial(GemmNN<S>{.a = a, .b = b, .c = c, .epilogue = epilogue});
    }
    CHECK(finished.isOnes(0));
    CHECK(same_bits(c, whole));
    CHECK((c.template cast<double>() - expected).norm() <
          static_cast<double>(std::numeric_limits<S>::epsilon()) * 100 * expected.norm());
  }
}

TEMPLATE_TEST_CASE("gemm: parts of C, scattered rows and an epilogue on any number of workers",
                   "[kernels][gemm]", float, double) {
  using S = TestType;
  constexpr Index rows = 146;
  constexpr Index depth = 70;
  constexpr Index first = 2 * panel_columns<S>;
  constexpr Index columns = first + panel_columns<S> + 3;
  STATIC_REQUIRE(rows * (columns - first) * depth > Index{1} << 18);  // or one worker does it all
  const Matrix<S> a = random_matrix<S>(rows, depth, 1);
  const Matrix<S> b = random_matrix<S>(depth, columns, 2);
  const Matrix<S> at = a.transpose();
  const Matrix<S> bt = b.transpose();
  const Matrix<S> before = random_matrix<S>(2 * rows, columns, 3);
  List list(to_size(rows));  // the odd rows, the last one first
  for (Index i = 0; i < rows; ++i) list[to_size(i)] = 2 * (rows - i) - 1;
  Matrix<S> sums = gather(before, list);
  gemm(GemmNN<S>{.a = a, .b = b, .c = sums, .start = Start::accumulate});
  for (const int threads : {1, 2, 3}) {
    const test::Threads scope(threads);
    for (const Form form : {Form::nn, Form::nt}) {
      CAPTURE(threads, static_cast<int>(form));
      Matrix<S> c = before;
      const ScatteredRows<S> to(c.data(), columns, rows, columns, list.data());
      Eigen::MatrixXi completed = Eigen::MatrixXi::Zero(rows, columns);
      const auto epilogue = [&](Index row, Index count, Index column, Index width) {
        completed.block(row, column, count, width).array() += 1;
        for (Index i = row; i < row + count; ++i) {
          for (Index j = column; j < column + width; ++j) to.row(i)[j] *= 2;
        }
      };
      const Range part{first, columns - first};
      if (form == Form::nn) {
        gemm(GemmNN<S>{.a = a,
                       .b = b,
                       .c = to,
                       .columns = part,
                       .start = Start::accumulate,
                       .epilogue = epilogue});
      } else {
        gemm(GemmNT<S>{.a = a,
                       .b = bt,
                       .c = to,
                       .columns = part,
                       .start = Start::accumulate,
                       .epilogue = epilogue});
      }
      CHECK(completed.leftCols(first).isZero(0));
      CHECK(completed.rightCols(part.count).isOnes(0));
      Matrix<S> expected = before;
      for (Index i = 0; i < rows; ++i) {
        expected.row(list[to_size(i)]).tail(part.count) = 2 * sums.row(i).tail(part.count);
      }
      CHECK(same_bits(c, expected));
    }
    Matrix<S> c = before.topRows(rows);
    gemm(GemmTN<S>{.a = at, .b = b, .c = view(c), .rows = {7, 90}, .columns = {5, columns - 9}});
    Matrix<S> product(rows, columns);
    gemm(GemmNN<S>{.a = a, .b = b, .c = product});
    Matrix<S> expected = before.topRows(rows);
    expected.block(7, 5, 90, columns - 9) = product.block(7, 5, 90, columns - 9);
    CHECK(same_bits(c, expected));
  }
}
