#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "../support.hpp"
#include "moe/kernels/gemm.hpp"

/// \file
/// Operands of products, and what a product must give.

namespace moe::test {

using namespace moe::detail;  // NOLINT(google-build-using-namespace)

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
inline List random_list(Index count, Index rows, std::uint64_t seed) {
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

/// a·b + c as the products compute it, fused where the processor fuses.
template <class Scalar>
Scalar add_product(Scalar a, Scalar b, Scalar c) {
#if defined(EIGEN_VECTORIZE_FMA) || EIGEN_ARCH_ARM64
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

/// Adds a row times `factor` to `sums`, and the products' magnitudes to `magnitudes`: by pointers, since an
/// expression of Eigen is slow where nothing is optimised.
inline void add_row(double factor, const double* row, Index count, double* sums,
                    double* magnitudes) {
  for (const double* end = row + count; row != end; ++row, ++sums, ++magnitudes) {
    const double product = factor * *row;
    *sums += product;
    *magnitudes += std::abs(product);
  }
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
    const Matrix<Scalar> columns = right.transpose();
    for (Index i = 0; i < c.rows(); ++i) {
      for (Index j = 0; j < c.cols(); ++j) {
        const Scalar* a = left.data() + i * left.cols();
        const Scalar* b = columns.data() + j * left.cols();
        Scalar sum = c(i, j);
        for (const Scalar* end = a + left.cols(); a != end; ++a, ++b) {
          sum = add_product(*a, *b, sum);
        }
        c(i, j) = sum;
      }
    }
    return c;
  }

  /// Checks against the sums in double, and their rounding against the sums of magnitudes.
  void check_accuracy(const ConstMatrixView<Scalar>& c) const {
    REQUIRE(c.rows() == initial.rows());
    REQUIRE(c.cols() == initial.cols());
    if (c.size() == 0) return;
    const Matrix<double> a = left.template cast<double>();
    const Matrix<double> b = right.template cast<double>();
    Matrix<double> exact = initial.template cast<double>();
    Matrix<double> scale = exact.cwiseAbs();
    for (Index i = 0; i < a.rows(); ++i) {
      for (Index k = 0; k < a.cols(); ++k) {
        add_row(a(i, k), b.data() + k * b.cols(), b.cols(), &exact(i, 0), &scale(i, 0));
      }
    }
    const Matrix<double> error = (c.template cast<double>() - exact).cwiseAbs();
    const double epsilon = static_cast<double>(std::numeric_limits<Scalar>::epsilon());
    const double terms = static_cast<double>(left.cols()) + 1.0;
    REQUIRE((error.array() <= 4.0 * epsilon * terms * scale.array()).all());  // NaN fails as well
    REQUIRE(error.sum() <= 4.0 * epsilon * std::sqrt(terms) * scale.sum());
  }
};

/// What is added to all rows, and whether each has a factor of its own.
enum class Added { nothing, bias, scaled_bias };

/// The products of gemm(), whose operands stay as they are.
template <class Scalar>
struct WholeProducts {
  template <class Product>
  static void multiply(const Product& product) {
    gemm(product);
  }
  static const Matrix<Scalar>& rounded(const Matrix<Scalar>& operand) { return operand; }
};

/// One product of the given form, shape and start, with framed operands and maybe through lists.
template <class Scalar, class Products = WholeProducts<Scalar>>
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
  expected.left = Products::rounded(expected.left);
  expected.right = Products::rounded(expected.right);
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
    Products::multiply(GemmNN<Scalar>{
        .a = left, .b = framed_b.view(), .c = c.view(), .start = start, .bias = with});
  } else if (form == Form::nt) {
    Products::multiply(
        GemmNT<Scalar>{.a = left, .b = framed_b.view(), .c = c.view(), .start = start});
  } else {
    const GatheredRows<Scalar> right =
        listed ? GatheredRows<Scalar>(framed_b.view(), list_b.data(), depth)
               : GatheredRows<Scalar>(framed_b.view());
    Products::multiply(GemmTN<Scalar>{.a = left, .b = right, .c = c.view(), .start = start});
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

}  // namespace moe::test
