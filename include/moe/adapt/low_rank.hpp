#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "moe/experts/expert.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/parameter.hpp"
#include "moe/random.hpp"

/// \file
/// A trained matrix of low rank that is added to a frozen one, and its products. The matrix itself is
/// never formed: x·(A·B) is (x·A)·B.

namespace moe::detail {

/// factor·A·B, K x N. With rank 0 it is zero and has no parameters.
template <class Scalar>
struct LowRank {
  Parameter<Scalar> a;  ///< K x r
  Parameter<Scalar> b;  ///< r x N
  double factor = 0;

  LowRank() = default;
  /// A is uniform in ±1/sqrt(K), as in PEFT, and B is zero, so that initially the sum is the frozen matrix.
  LowRank(Index inputs, Index outputs, Index rank, double scale, std::uint64_t seed)
      : a(inputs, rank), b(rank, outputs), factor(scale) {
    fill_uniform(a.value, Scalar{1} / std::sqrt(static_cast<Scalar>(inputs)), seed);
  }

  Index rank() const { return a.value.cols(); }
  Index size() const { return a.size() + b.size(); }

  /// Rows of the gradients as add_low_rank_gradients() takes them, of A and of the transposed B. Both counts
  /// are rounded up to a multiple of gradient_block_rows, so that ranges of B's gradient begin at
  /// multiples of gradient_block_rows columns, and seldom share a cache line.
  Index gradient_rows() const {
    return rank() == 0 ? 0 : in_blocks(a.value.rows()) + in_blocks(b.value.cols());
  }
  static Index in_blocks(Index rows) { return round_up(rows, gradient_block_rows); }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    if (self.rank() == 0) return;
    visit("lora_A.weight", self.a);
    visit("lora_B.weight", self.b);
  }
};

/// Multiplies rows by the factor.
template <class Scalar>
void scale_rows(double factor, MatrixView<Scalar> rows) {
  rows *= static_cast<Scalar>(factor);
}

// A product with A·B is computed as two products. The first, n x r, is computed once, before the second, whose
// columns may be split.

/// t = factor·x·A.
template <class Scalar>
void multiply_by_a(const LowRank<Scalar>& w, const GatheredRows<Scalar>& x, MatrixView<Scalar> t) {
  gemm(GemmNN<Scalar>{.a = x, .b = w.a.value, .c = t});
  scale_rows(w.factor, t);
}
/// t = factor·dy·Bᵀ.
template <class Scalar>
void multiply_by_b(const LowRank<Scalar>& w, const GatheredRows<Scalar>& dy, MatrixView<Scalar> t) {
  gemm(GemmNT<Scalar>{.a = dy, .b = w.b.value, .c = t});
  scale_rows(w.factor, t);
}

/// C = t·B of a GemmNN, C = t·Aᵀ of a GemmNT, with the columns and the start of the product, whose own B, bias
/// and epilogue come later.
template <template <class, class> class Form, class Scalar, class Operand>
void multiply_low_rank(const LowRank<Scalar>& w, const MatrixView<Scalar>& t,
                       const Form<Scalar, Operand>& product) {
  using Product = Form<Scalar, MatrixOperand<Scalar>>;
  constexpr bool transposed = std::is_same_v<Product, GemmNT<Scalar>>;
  gemm_serial(Product{.a = t,
                      .b = transposed ? w.a.value : w.b.value,
                      .c = product.c,
                      .columns = product.columns,
                      .start = product.start});
}

/// Adds to, or overwrites, the range `rows` of the gradient_rows() of A and B, where they are
/// trained. With G = xᵀ·dy, the gradient of the sum of the matrices, dA = factor·G·Bᵀ = xᵀ·t_b and
/// dB = factor·Aᵀ·G = t_aᵀ·dy; t_a = factor·x·A and t_b = factor·dy·Bᵀ are n x r, and G is not
/// formed.
template <class Scalar>
void add_low_rank_gradients(LowRank<Scalar>& w, const GatheredRows<Scalar>& x,
                            const GatheredRows<Scalar>& dy, const MatrixView<Scalar>& t_a,
                            const MatrixView<Scalar>& t_b, Range rows, Start start) {
  const Index first_of_b = w.in_blocks(x.width());
  const Range of_a = common_range(rows, {0, x.width()});
  const Range of_b = common_range(rows, {first_of_b, dy.width()});
  if (w.a.trained && of_a.count > 0) {
    gemm(GemmTN<Scalar>{.a = x, .b = t_b, .c = view(w.a.gradient()), .rows = of_a, .start = start});
  }
  if (w.b.trained && of_b.count > 0) {
    gemm(GemmTN<Scalar>{.a = t_a,
                        .b = dy,
                        .c = view(w.b.gradient()),
                        .columns = {of_b.first - first_of_b, of_b.count},
                        .start = start});
  }
}

/// sum += factor·A·B (K x N). `scaled` is scratch.
template <class Scalar>
void add_low_rank(const LowRank<Scalar>& w, Matrix<Scalar>& scaled, Matrix<Scalar>& sum) {
  if (w.rank() == 0) return;
  copy_matrix<Scalar>(w.a.value, scaled);
  scale_rows(w.factor, view(scaled));
  gemm(GemmNN<Scalar>{.a = scaled, .b = w.b.value, .c = sum, .start = Start::accumulate});
}

}  // namespace moe::detail
