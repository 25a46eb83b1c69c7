#pragma once

#include "moe/kernels/simd.hpp"
#include "moe/matrix.hpp"

/// \file
/// The load of experts that are pairs of keys, of the loads of a row keys and b column keys, as if the
/// choices of the two were independent:
///
///     Load[i,j] = factor · Loadrow_i · Loadcolumn_j
///
/// The factor is a constant. CV² does not depend on it: CV²(Load) = (1 + CV²(Loadrow))·(1 +
/// CV²(Loadcolumn)) − 1.

namespace moe::detail {

/// load (a·b) of the loads of the row keys (a) and of the column keys (b).
template <class Scalar>
void product_load(const Vector<Scalar>& rows, const Vector<Scalar>& columns, Scalar factor,
                  Vector<Scalar>& load) {
  resize(load, rows.size() * columns.size());
  for (Index i = 0; i < rows.size(); ++i) {
    const Scalar share = factor * rows[i];
    Scalar* of_row = load.data() + i * columns.size();
    for (Index j = 0; j < columns.size(); ++j) of_row[j] = share * columns[j];
  }
}

/// With l = ∂L/∂Load: dLoadrow_i = factor·Σ_j l_ij·Loadcolumn_j and
/// dLoadcolumn_j = factor·Σ_i l_ij·Loadrow_i.
template <class Scalar>
void product_load_backward(const Vector<Scalar>& rows, const Vector<Scalar>& columns, Scalar factor,
                           const Vector<Scalar>& dload, Vector<Scalar>& drows,
                           Vector<Scalar>& dcolumns) {
  resize(drows, rows.size());
  resize_to_zero(dcolumns, columns.size());
  for (Index i = 0; i < rows.size(); ++i) {
    const Scalar* of_row = dload.data() + i * columns.size();
    drows[i] = factor * dot(columns.size(), of_row, columns.data());
    add_scaled(columns.size(), factor * rows[i], of_row, dcolumns.data());
  }
}

}  // namespace moe::detail
