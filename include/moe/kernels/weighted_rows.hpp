#pragma once

#include "moe/kernels/simd.hpp"

/// \file
/// A weight on the input of a linear map, applied after the product, which then does not depend on the
/// weight: (w·x)·W + b = w·(x·W) + b.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// y[r][i] = factor[r]·x[r][i] + bias[i]; a null bias means none.
template <class Scalar>
void weigh_rows(const GatheredRows<Scalar>& x, const RowFactors<Scalar>& factors,
                const Scalar* bias, const ScatteredRows<Scalar>& y) {
  using P = Packet<Scalar>;
  using namespace Eigen::internal;
  for (Index r = 0; r < x.count(); ++r) {
    const P w = broadcast(*factors.at(r));
    if (bias == nullptr) {
      map(
          x.width(), y.row(r), [=](const P& v) { return pmul(w, v); }, x.row(r));
    } else {
      map(
          x.width(), y.row(r), [=](const P& v, const P& b) { return pmadd(w, v, b); }, x.row(r),
          bias);
    }
  }
}

/// On entry d holds dy. Adds Σ_i dy[r][i]·x[r][i], the gradient w.r.t. the factor, to dfactor[r],
/// and turns dy into dx = factor[r]·dy.
template <class Scalar>
void weigh_rows_backward(const GatheredRows<Scalar>& x, const RowFactors<Scalar>& factors,
                         const ScatteredRows<Scalar>& d, Scalar* dfactor) {
  using P = Packet<Scalar>;
  for (Index r = 0; r < x.count(); ++r) {
    dfactor[r] += dot(x.width(), x.row(r), d.row(r));
    const P w = broadcast(*factors.at(r));
    map(
        x.width(), d.row(r), [=](const P& v) { return Eigen::internal::pmul(w, v); }, d.row(r));
  }
}

}  // namespace moe::detail

MOE_PACKETS_END
