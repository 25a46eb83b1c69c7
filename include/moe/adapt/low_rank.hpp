#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

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

/// Calls first(rows, ranks, t) and second(rows, ranks, t) for parts of a product's rows and of the rank:
/// t is on the stack, and what first() leaves in it second() finds times the factor.
template <class Scalar, class First, class Second>
void through_rank(double factor, Index rows, Index rank, First&& first, Second&& second) {
  constexpr Index most = 64;
  alignas(64) Scalar memory[to_size(most * most)];
  for (Index row = 0; row < rows; row += most) {
    for (Index r = 0; r < rank; r += most) {
      const Range of_rows{row, std::min(most, rows - row)};
      const Range ranks{r, std::min(most, rank - r)};
      const MatrixView<Scalar> t(memory, of_rows.count, ranks.count,
                                 Eigen::OuterStride<>(ranks.count));
      first(of_rows, ranks, t);
      scale_rows(factor, t);
      second(of_rows, ranks, t);
    }
  }
}

/// Some columns of A.
template <class Scalar>
MatrixOperand<Scalar> columns_of_a(const LowRank<Scalar>& w, Range ranks) {
  return {w.a.value.data() + ranks.first, w.a.value.rows(), ranks.count, w.rank()};
}
/// Some rows of B.
template <class Scalar>
MatrixOperand<Scalar> rows_of_b(const LowRank<Scalar>& w, Range ranks) {
  const Index columns = w.b.value.cols();
  return {row_data(w.b.value, ranks.first), ranks.count, columns, columns};
}

/// C = x·(factor·A·B) of a GemmNN, C = dy·(factor·A·B)ᵀ of a GemmNT, with the rows, the columns and the start
/// of the product, whose own B, bias and epilogue come later.
template <template <class, class> class Form, class Scalar, class Operand>
void multiply_low_rank(const LowRank<Scalar>& w, const Form<Scalar, Operand>& product) {
  using Product = Form<Scalar, MatrixOperand<Scalar>>;
  constexpr bool transposed = std::is_same_v<Product, GemmNT<Scalar>>;
  const auto first = [&](Range ranks) {
    return transposed ? rows_of_b(w, ranks) : columns_of_a(w, ranks);
  };
  const auto second = [&](Range ranks) {
    return transposed ? columns_of_a(w, ranks) : rows_of_b(w, ranks);
  };
  through_rank<Scalar>(
      w.factor, product.a.count(), w.rank(),
      [&](Range rows, Range ranks, MatrixView<Scalar> t) {
        gemm_serial(
            Product{.a = product.a.slice(rows.first, rows.count), .b = first(ranks), .c = t});
      },
      [&](Range rows, Range ranks, MatrixView<Scalar> t) {
        gemm_serial(Product{.a = t,
                            .b = second(ranks),
                            .c = product.c.slice(rows.first, rows.count),
                            .columns = product.columns,
                            .start = ranks.first > 0 ? Start::accumulate : product.start});
      });
}

/// Adds the gradients of A and B, if they are trained. With G = xᵀ·dy, the gradient of the sum of the
/// matrices, dA = factor·G·Bᵀ and dB = factor·Aᵀ·G; G itself is not formed. t is n x r of scratch. With
/// `replace` the gradients are written over.
template <class Scalar>
void add_low_rank_gradients(LowRank<Scalar>& w, const GatheredRows<Scalar>& x,
                            const GatheredRows<Scalar>& dy, MatrixView<Scalar> t, bool replace) {
  const Start start = start_of(replace);
  const GatheredRows<Scalar> rows_of_t(t);
  if (w.b.trained) {
    gemm_serial(GemmNN<Scalar>{.a = x, .b = w.a.value, .c = t});
    scale_rows(w.factor, t);
    gemm_serial(GemmTN<Scalar>{.a = rows_of_t, .b = dy, .c = view(w.b.gradient()), .start = start});
  }
  if (w.a.trained) {
    gemm_serial(GemmNT<Scalar>{.a = dy, .b = w.b.value, .c = t});
    scale_rows(w.factor, t);
    gemm_serial(GemmTN<Scalar>{.a = x, .b = rows_of_t, .c = view(w.a.gradient()), .start = start});
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
