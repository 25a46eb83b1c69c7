#pragma once

#include <cmath>
#include <numbers>
#include <type_traits>

#include "moe/kernels/simd.hpp"

/// \file
/// Functions of packets: roots, exponentials, and the functions that activations and gates are made
/// of.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// f of every lane, for functions that have no vector form.
template <class Scalar, class F>
Packet<Scalar> for_each_lane(const Packet<Scalar>& x, F f) {
  Scalar lanes[packet_size<Scalar>];
  store(lanes, x);
  for (Scalar& lane : lanes) lane = f(lane);
  return load(lanes);
}

// Eigen marks some of pexp, ptanh and psqrt as unused, and clang warns of calls of them. So they
// are called through Eigen's functors: the warnings then stay in Eigen's headers.

template <class Scalar>
Packet<Scalar> sqrt(const Packet<Scalar>& x) {
  return Eigen::internal::scalar_sqrt_op<Scalar>().packetOp(x);
}

template <class Scalar>
Packet<Scalar> exp(const Packet<Scalar>& x) {
  if constexpr (Eigen::internal::packet_traits<Scalar>::HasExp) {
    return Eigen::internal::scalar_exp_op<Scalar>().packetOp(x);
  } else {
    return for_each_lane<Scalar>(x, [](Scalar v) { return std::exp(v); });
  }
}

/// 1 / (1 + e^-x).
template <class Scalar>
Packet<Scalar> sigmoid(const Packet<Scalar>& x) {
  const Packet<Scalar> one = broadcast(Scalar{1});
  using namespace Eigen::internal;
  return pdiv(one, padd(one, moe::detail::exp<Scalar>(pnegate(x))));
}

template <class Scalar>
Packet<Scalar> tanh(const Packet<Scalar>& x) {
  if constexpr (Eigen::internal::packet_traits<Scalar>::HasTanh) {
    using namespace Eigen::internal;
    const Packet<Scalar> inside = scalar_tanh_op<Scalar>().packetOp(x);
    if constexpr (!std::is_same_v<Scalar, float>) return inside;
    // Eigen's rational function does not reach 1 where Eigen takes a processor with fused
    // multiply-adds for one without, as on ARM.
    const Packet<Scalar> above = pcmp_le(broadcast(Scalar{8}), x);
    const Packet<Scalar> below = pcmp_le(x, broadcast(Scalar{-8}));
    return pselect(above, broadcast(Scalar{1}), pselect(below, broadcast(Scalar{-1}), inside));
  } else {
    return for_each_lane<Scalar>(x, [](Scalar v) { return std::tanh(v); });
  }
}

/// log(1 + e^x), exact to rounding at both ends: max(x, 0) + log1p(e^-|x|), and
/// log1p(t) = 2·atanh(t / (2 + t)), a series in (t / (2 + t))², at most 1/9, which is accurate for
/// small t too.
template <class Scalar>
Packet<Scalar> softplus(const Packet<Scalar>& x) {
  using namespace Eigen::internal;
  constexpr int terms = sizeof(Scalar) == sizeof(float) ? 8 : 17;
  const Packet<Scalar> t = moe::detail::exp<Scalar>(pnegate(pabs(x)));
  const Packet<Scalar> s = pdiv(t, padd(broadcast(Scalar{2}), t));
  const Packet<Scalar> s2 = pmul(s, s);
  Packet<Scalar> series = broadcast(Scalar{1} / Scalar{2 * terms + 1});
  for (int i = terms - 1; i >= 0; --i) {
    series = pmadd(series, s2, broadcast(Scalar{1} / static_cast<Scalar>(2 * i + 1)));
  }
  // Whether pmax returns a NaN of x depends on the processor, but t is NaN too then, so the sum is
  // NaN.
  return padd(pmax(broadcast(Scalar{0}), x), pmul(pmul(broadcast(Scalar{2}), s), series));
}

/// φ, the density of the standard normal.
template <class Scalar>
Packet<Scalar> normal_density(const Packet<Scalar>& x) {
  using namespace Eigen::internal;
  constexpr Scalar factor = std::numbers::inv_sqrtpi_v<Scalar> / std::numbers::sqrt2_v<Scalar>;
  return pmul(broadcast(factor),
              moe::detail::exp<Scalar>(pmul(pmul(broadcast(Scalar{-0.5}), x), x)));
}

/// Φ, the distribution function of the standard normal, with a small relative error in the lower
/// tail too.
///
/// In float Φ(-√2·u) = erfc(u)/2 = t·exp(p(t) - u²)/2 with t = 1/(1 + u/2); the polynomial p was
/// fitted to log(erfc(u)·exp(u²)/t) at Chebyshev nodes of t in (0.07, 1], to 9e-8 everywhere.
template <class Scalar>
Packet<Scalar> normal_cdf(const Packet<Scalar>& x) {
  using namespace Eigen::internal;
  if constexpr (std::is_same_v<Scalar, float>) {
    const Packet<float> one = broadcast(1.0f);
    const Packet<float> u = pmul(pabs(x), broadcast(std::numbers::sqrt2_v<float> / 2));
    const Packet<float> t = pdiv(one, pmadd(u, broadcast(0.5f), one));
    Packet<float> p = broadcast(0.178103084f);
    for (const float c : {-0.8568689f, 1.55886856f, -1.21342226f, 0.330784135f, -0.207254182f,
                          0.101809811f, 0.373428012f, 1.00006485f, -1.26551303f}) {
      p = pmadd(p, t, broadcast(c));
    }
    const Packet<float> lower =
        pmul(pmul(broadcast(0.5f), t), moe::detail::exp<float>(psub(p, pmul(u, u))));
    return pselect(pcmp_lt(x, broadcast(0.0f)), lower, psub(one, lower));
  } else {
    return for_each_lane<Scalar>(x, [](Scalar v) {
      return Scalar{0.5} * std::erfc(-v * (std::numbers::sqrt2_v<Scalar> / 2));
    });
  }
}

}  // namespace moe::detail

MOE_PACKETS_END
