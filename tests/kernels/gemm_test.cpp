#include "moe/kernels/gemm.hpp"

#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../support.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)
using test::random_matrix;
using test::same_bits;

namespace {

using List = std::vector<Index>;

enum class Form { nn, nt, tn };

/// A block of a larger matrix, off its first row and column; around it are NaNs, so a value that
/// is read from outside shows in the product, and one that is written outside shows here.
template <class Scalar>
class Framed {
 public:
  explicit Framed(const Matrix<Scalar>& inside)
      : all_(Matrix<Scalar>::Constant(inside.rows() + 3, inside.cols() + 5,
                                      std::numeric_limits<Scalar>::quiet_NaN())),
        rows_(inside.rows()),
        columns_(inside.cols()) {
    view() = inside;
  }

  MatrixView<Scalar> view() { return columns_of(rows_of(all_, 1, rows_), 3, columns_); }
  ConstMatrixView<Scalar> view() const { return columns_of(rows_of(all_, 1, rows_), 3, columns_); }
  bool frame_is_whole() const {
    Index nans = 0;
    for (Index i = 0; i < all_.size(); ++i) nans += std::isnan(all_.data()[i]) ? 1 : 0;
    return nans == all_.size() - rows_ * columns_;
  }

 private:
  Matrix<Scalar> all_;
  Index rows_;
  Index columns_;
};

/// `count` rows out of `rows`, chosen with repeats and in no order.
List random_list(Index count, Index rows, std::uint64_t seed) {
  List list(to_size(count));
  for (Index i = 0; i < count; ++i) {
    list[to_size(i)] = static_cast<Index>(noise_words(seed, {.step = 0}, i, 0)[0]) % rows;
  }
  return list;
}

template <class Scalar>
Matrix<Scalar> gather(const Matrix<Scalar>& matrix, const List& list) {
  Matrix<Scalar> rows(static_cast<Index>(list.size()), matrix.cols());
  for (Index i = 0; i < rows.rows(); ++i) rows.row(i) = matrix.row(list[to_size(i)]);
  return rows;
}

/// What a product is to give, as plain matrices: left (M x K) times right (K x N) from `initial`.
template <class Scalar>
struct Expected {
  Matrix<Scalar> left;
  Matrix<Scalar> right;
  Matrix<Scalar> initial;

  /// Adds a bias: one product more, ahead of the others.
  void add_bias(const Matrix<Scalar>& factors, const Matrix<Scalar>& bias) {
    Matrix<Scalar> wider(left.rows(), left.cols() + 1);
    wider << factors, left;
    Matrix<Scalar> deeper(right.rows() + 1, right.cols());
    deeper << bias, right;
    left = wider;
    right = deeper;
  }

  /// Each element the chain of multiply-adds that the header promises.
  Matrix<Scalar> chain() const {
    Matrix<Scalar> c = initial;
    for (Index i = 0; i < c.rows(); ++i) {
      for (Index j = 0; j < c.cols(); ++j) {
        Packet<Scalar> sum = broadcast(c(i, j));
        for (Index k = 0; k < left.cols(); ++k) {
          sum = Eigen::internal::pmadd(broadcast(left(i, k)), broadcast(right(k, j)), sum);
        }
        c(i, j) = Eigen::internal::pfirst(sum);
      }
    }
    return c;
  }

  /// Checks against Eigen's product in double.
  void check_accuracy(const ConstMatrixView<Scalar>& c) const {
    REQUIRE(c.rows() == initial.rows());
    REQUIRE(c.cols() == initial.cols());
    if (c.size() == 0) return;
    const Matrix<double> a = left.template cast<double>();
    const Matrix<double> b = right.template cast<double>();
    const Matrix<double> start = initial.template cast<double>();
    Matrix<double> exact = start;
    exact += a.lazyProduct(b);
    Matrix<double> scale = start.cwiseAbs();
    scale += a.cwiseAbs().lazyProduct(b.cwiseAbs());
    const Matrix<double> error = (c.template cast<double>() - exact).cwiseAbs();
    const double epsilon = static_cast<double>(std::numeric_limits<Scalar>::epsilon());
    const double terms = static_cast<double>(left.cols()) + 1.0;
    REQUIRE((error.array() <= 4.0 * epsilon * terms * scale.array()).all());  // NaN fails as well
    REQUIRE(error.sum() <= 4.0 * epsilon * std::sqrt(terms) * scale.sum());
  }
};

/// What is added to all rows, and whether each has a factor of its own.
enum class Added { nothing, bias, scaled_bias };

/// One product of the given form, shape and start, with framed operands and maybe through lists.
template <class Scalar>
void check_product(Form form, Index rows, Index columns, Index depth, Start start, Added added,
                   bool listed, bool exactly) {
  INFO("form " << static_cast<int>(form) << ", start " << static_cast<int>(start) << ", added "
               << static_cast<int>(added) << ", M " << rows << ", N " << columns << ", K " << depth
               << ", listed " << listed);
  const auto seed = static_cast<std::uint64_t>((rows * 1000 + columns) * 1000 + depth);
  const bool tn = form == Form::tn;
  const Index gathered = tn ? depth : rows;  // rows of A that go in
  const Index held = listed ? gathered / 2 + 1 : gathered;
  const Matrix<Scalar> a = random_matrix<Scalar>(held, tn ? rows : depth, seed + 1);
  const List list_a = random_list(gathered, held, seed + 2);
  const Matrix<Scalar> a_rows = listed ? gather(a, list_a) : a;
  const Index b_rows = form == Form::nt ? columns : depth;
  const Index b_held = listed && tn ? depth / 3 + 1 : b_rows;
  const Matrix<Scalar> b =
      random_matrix<Scalar>(b_held, form == Form::nt ? depth : columns, seed + 3);
  const List list_b = tn ? random_list(depth, b_held, seed + 4) : List();
  const Matrix<Scalar> b_gathered = listed && tn ? gather(b, list_b) : b;
  const Matrix<Scalar> before = random_matrix<Scalar>(rows, columns, seed + 5);
  const Matrix<Scalar> bias = random_matrix<Scalar>(1, columns, seed + 6);
  const Matrix<Scalar> factors = added == Added::scaled_bias
                                     ? random_matrix<Scalar>(rows, 1, seed + 7)
                                     : Matrix<Scalar>::Ones(rows, 1);

  Expected<Scalar> expected;
  expected.left = tn ? Matrix<Scalar>(a_rows.transpose()) : a_rows;
  expected.right = form == Form::nt ? Matrix<Scalar>(b.transpose()) : b_gathered;
  expected.initial = start == Start::accumulate ? before : Matrix<Scalar>::Zero(rows, columns);
  if (added != Added::nothing) expected.add_bias(factors, bias);

  const Framed<Scalar> framed_a(a);
  const Framed<Scalar> framed_b(b);
  Framed<Scalar> c(before);
  const GatheredRows<Scalar> left =
      listed ? GatheredRows<Scalar>(framed_a.view(), list_a.data(), gathered)
             : GatheredRows<Scalar>(framed_a.view());
  if (form == Form::nn) {
    // Vectors of their own size, so that a sanitizer sees a read beyond them.
    const std::vector<Scalar> values(bias.data(), bias.data() + columns);
    const std::vector<Scalar> weights(factors.data(), factors.data() + rows);
    const Scalar none{};  // an empty vector may have no memory, and null means no bias
    Bias<Scalar> with{.values = values.empty() ? &none : values.data()};
    if (added == Added::scaled_bias) with.factors = {weights.data(), 1};
    if (added == Added::nothing) with.values = nullptr;
    gemm(GemmNN<Scalar>{
        .a = left, .b = framed_b.view(), .c = c.view(), .start = start, .bias = with});
  } else if (form == Form::nt) {
    gemm(GemmNT<Scalar>{.a = left, .b = framed_b.view(), .c = c.view(), .start = start});
  } else {
    const GatheredRows<Scalar> right =
        listed ? GatheredRows<Scalar>(framed_b.view(), list_b.data(), depth)
               : GatheredRows<Scalar>(framed_b.view());
    gemm(GemmTN<Scalar>{.a = left, .b = right, .c = c.view(), .start = start});
  }
  REQUIRE(c.frame_is_whole());
  expected.check_accuracy(std::as_const(c).view());
  if (exactly) REQUIRE(same_bits(c.view(), expected.chain()));
}

template <class Scalar, class F>
void for_each_form_and_start(const F& f) {
  for (const Start start : {Start::zero, Start::accumulate}) {
    for (const Form form : {Form::nn, Form::nt, Form::tn}) f(form, start, Added::nothing);
  }
  for (const Start start : {Start::zero, Start::accumulate}) {
    for (const Added added : {Added::bias, Added::scaled_bias}) f(Form::nn, start, added);
  }
}

}  // namespace

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
  // More pairs of rows than go at once, and rows of C in several slices.
  check(tile_rows + 1, 7 * task + 3, 3, true);
  check(2 * tile_rows, 3, 2 * 128 + 1, true);
}

TEMPLATE_TEST_CASE("gemm: few rows with all columns of B, which are read in the order of memory",
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

TEMPLATE_TEST_CASE("gemm: columns in groups, the depth in blocks, and every tile finished once",
                   "[kernels][gemm]", float, double) {
  using S = TestType;
  constexpr Index most = 250;
  static_assert(cached_elements<S> / (most * panel_columns<S>) < 3, "several groups");
  // Many, or as many as the highest tile has, for which the columns must be whole packets.
  const bool many = GENERATE(true, false);
  const Index rows = many ? most : direct_rows;
  const Index columns = 5 * panel_columns<S> + (many ? 5 : 0);
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

TEST_CASE("gemm: in order, all of B that is not read at once is asked for once, then the next",
          "[kernels][gemm]") {
  STATIC_REQUIRE(first_prefetched(10, 100, 35) == 40);  // 3 blocks ahead of the second
  STATIC_REQUIRE(first_prefetched(10, 103, 35) == 43);  // and after 6 more at the end
  STATIC_REQUIRE(first_prefetched(10, 100, 5) == 10);
  STATIC_REQUIRE(first_prefetched(10, 36, 35) == 36);  // all of it is read before
  STATIC_REQUIRE(first_prefetched(10, 0, 35) == 0);
}

TEMPLATE_TEST_CASE("gemm: what comes next changes nothing", "[kernels][gemm]", float, double) {
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

TEMPLATE_TEST_CASE("gemm: long sums keep their accuracy", "[kernels][gemm]", float, double) {
  for_each_form_and_start<TestType>([&](Form form, Start start, Added added) {
    check_product<TestType>(form, 9, 35, 5000, start, added, false, false);
  });
}

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
