#pragma once

#include <algorithm>

#include "moe/kernels/gemm.hpp"

/// \file
/// Sums of the columns of a matrix: the gradient with respect to a bias, and the load of an expert.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// Rows that are summed in one chain of additions, at most: longer columns are sums of such blocks,
/// so that their rounding errors do not grow with the number of rows.
inline constexpr Index summed_rows = 256;

/// y[j] += Σ_i factor[i]·rows[i][j] of at most summed_rows rows, from zero, i ascending. The sums of
/// eight packets at a time stay in registers.
template <class Scalar>
void add_block_of_rows(const GatheredRows<Scalar>& rows, const RowFactors<Scalar>& factors,
                       Scalar* y) {
  using Eigen::internal::padd;
  using Eigen::internal::pmadd;
  constexpr Index size = packet_size<Scalar>;
  constexpr Index packets = 8;
  MOE_ASSERT(rows.count() <= summed_rows);
  const Packet<Scalar> zero = broadcast(Scalar{0});
  Index column = 0;
  for (; column + packets * size <= rows.width(); column += packets * size) {
    Packet<Scalar> sum[packets];
    MOE_UNROLL
    for (Index v = 0; v < packets; ++v) sum[v] = zero;
    for (Index i = 0; i < rows.count(); ++i) {
      const Packet<Scalar> factor = broadcast(*factors.at(i));
      const Scalar* row = rows.row(i) + column;
      MOE_UNROLL
      for (Index v = 0; v < packets; ++v) sum[v] = pmadd(factor, load(row + v * size), sum[v]);
    }
    MOE_UNROLL
    for (Index v = 0; v < packets; ++v) {
      Scalar* to = y + column + v * size;
      store(to, padd(load(to), sum[v]));
    }
  }
  for (; column < rows.width(); column += size) {
    const PacketSpan at{column, std::min(size, rows.width() - column)};
    Packet<Scalar> sum = zero;
    for (Index i = 0; i < rows.count(); ++i) {
      sum = pmadd(broadcast(*factors.at(i)), at.load(rows.row(i)), sum);
    }
    at.store(y, padd(at.load(y), sum));
  }
}

/// Calls f(first, count) for each block of rows.
template <class F>
void for_each_summed_block(Index rows, F&& f) {
  for (Index first = 0; first < rows; first += summed_rows) {
    f(first, std::min(summed_rows, rows - first));
  }
}

/// y[j] += Σ_i factor[i]·rows[i][j], block after block.
template <class Scalar>
void add_scaled_rows(const GatheredRows<Scalar>& rows, const RowFactors<Scalar>& factors,
                     Scalar* y) {
  for_each_summed_block(rows.count(), [&](Index first, Index count) {
    add_block_of_rows(rows.slice(first, count), factors.from(first), y);
  });
}

/// The same with the blocks' sums added up in double.
template <class Scalar>
void add_many_scaled_rows(const GatheredRows<Scalar>& rows, const RowFactors<Scalar>& factors,
                          Scalar* y) {
  if (rows.count() <= summed_rows) return add_block_of_rows(rows, factors, y);
  constexpr Index strip = 128;
  for (Index column = 0; column < rows.width(); column += strip) {
    const Index width = std::min(strip, rows.width() - column);
    double total[to_size(strip)];
    for (Index j = 0; j < width; ++j) total[j] = static_cast<double>(y[column + j]);
    for_each_summed_block(rows.count(), [&](Index first, Index count) {
      Scalar sum[to_size(strip)] = {};
      add_block_of_rows(rows.slice(first, count).columns(column, width), factors.from(first), sum);
      for (Index j = 0; j < width; ++j) total[j] += static_cast<double>(sum[j]);
    });
    for (Index j = 0; j < width; ++j) y[column + j] = static_cast<Scalar>(total[j]);
  }
}

/// sums[0, j] += Σ_i factor[i]·rows[i, j], parallel over columns.
template <class Scalar>
void add_column_sums(const GatheredRows<Scalar>& rows, Matrix<Scalar>& sums,
                     const RowFactors<Scalar>& factors = {}) {
  MOE_ASSERT(sums.rows() == 1 && sums.cols() == rows.width());
  for_each_block({0, 1}, {0, rows.width()}, rows.count(), 2 * panel_columns<Scalar>,
                 [&](Range, Range columns) {
                   add_many_scaled_rows(rows.columns(columns.first, columns.count), factors,
                                        sums.data() + columns.first);
                 });
}

}  // namespace moe::detail

MOE_PACKETS_END
