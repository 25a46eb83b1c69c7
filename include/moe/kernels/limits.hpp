#pragma once

#include <limits>

#include "moe/kernels/simd.hpp"

/// \file
/// Limits of the inputs of an activation and of the gated form, forward and backward. NaN is within every
/// limit.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// y[r][i] = min(x[r][i], limit).
template <class Scalar>
void limit_above(Scalar limit, const GatheredRows<Scalar>& x, const ScatteredRows<Scalar>& y) {
  using namespace Eigen::internal;
  const Packet<Scalar> most = broadcast(limit);
  for (Index r = 0; r < x.count(); ++r) {
    // Not a minimum: its result for NaN depends on the processor.
    map(
        x.width(), y.row(r),
        [=](const Packet<Scalar>& v) { return pselect(pcmp_lt(most, v), most, v); }, x.row(r));
  }
}

/// dx[r][i] = 0 where x[r][i] is above the limit.
template <class Scalar>
void limit_above_backward(Scalar limit, const GatheredRows<Scalar>& x,
                          const ScatteredRows<Scalar>& dx) {
  using namespace Eigen::internal;
  const Packet<Scalar> most = broadcast(limit);
  for (Index r = 0; r < x.count(); ++r) {
    map(
        x.width(), dx.row(r),
        [=](const Packet<Scalar>& v, const Packet<Scalar>& d) {
          return pselect(pcmp_lt(most, v), broadcast(Scalar{0}), d);
        },
        x.row(r), dx.row(r));
  }
}

/// The second factor of a gated form: x within ±limit, plus an offset.
template <class Scalar>
class LinearFactor {
 public:
  using P = Packet<Scalar>;

  /// A limit of 0 means no limit.
  LinearFactor(Scalar limit, Scalar offset)
      : most_(broadcast(limit > Scalar{0} ? limit : std::numeric_limits<Scalar>::infinity())),
        offset_(broadcast(offset)) {}

  P value(const P& x) const {
    using namespace Eigen::internal;
    const P least = pnegate(most_);
    const P above = pselect(pcmp_lt(x, least), least, x);
    return padd(pselect(pcmp_lt(most_, above), most_, above), offset_);
  }
  /// The gradient with respect to x, from that with respect to the value.
  P backward(const P& x, const P& gradient) const {
    using namespace Eigen::internal;
    return pselect(pcmp_lt(most_, pabs(x)), broadcast(Scalar{0}), gradient);
  }

 private:
  P most_;
  P offset_;
};

/// The same without limit and offset.
template <class Scalar>
struct PlainFactor {
  using P = Packet<Scalar>;
  P value(const P& x) const { return x; }
  P backward(const P&, const P& gradient) const { return gradient; }
};

}  // namespace moe::detail

MOE_PACKETS_END
