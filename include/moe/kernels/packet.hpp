#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>
#include <type_traits>
#include <utility>

#include "moe/matrix.hpp"

/// \file
/// The vector registers of the processor, portably: Eigen's packet types, so that one source serves
/// SSE, AVX2, AVX-512 and NEON, float and double.
///
/// Every element of a row goes through the same packet operation, the last few in a packet that is
/// filled up with zeros. (Eigen's array expressions use other, scalar functions at the ends of a
/// row, and where the ends are depends on the address; a token would get other bits in another
/// row.)

// A packet as a template argument loses its alignment attribute, which is harmless there; Eigen's
// own headers silence it the same way.
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace moe::detail {

template <class Scalar>
using Packet = typename Eigen::internal::packet_traits<Scalar>::type;

template <class Scalar>
inline constexpr Index packet_size = Eigen::internal::unpacket_traits<Packet<Scalar>>::size;

/// A packet half as wide, of which the processor can do two at once; the packet itself where there
/// is none.
template <class Scalar>
using HalfPacket = typename Eigen::internal::unpacket_traits<Packet<Scalar>>::half;
template <class Scalar>
inline constexpr Index half_packet_size =
    Eigen::internal::unpacket_traits<HalfPacket<Scalar>>::size;

template <class Scalar>
Packet<Scalar> load(const Scalar* from) {
  return Eigen::internal::ploadu<Packet<Scalar>>(from);
}
template <class Scalar>
Packet<Scalar> broadcast(Scalar value) {
  return Eigen::internal::pset1<Packet<Scalar>>(value);
}
template <class Scalar>
void store(Scalar* to, const Packet<Scalar>& packet) {
  Eigen::internal::pstoreu(to, packet);
}

/// The first `count` < packet_size elements; the rest are zero. Not inline: it is rare, and there
/// would be very many.
template <class Scalar>
MOE_NOINLINE Packet<Scalar> load_first(const Scalar* from, Index count) {
  Scalar buffer[packet_size<Scalar>] = {};
  for (Index i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}
template <class Scalar>
MOE_NOINLINE void store_first(Scalar* to, Index count, const Packet<Scalar>& packet) {
  Scalar buffer[packet_size<Scalar>];
  store(buffer, packet);
  for (Index i = 0; i < count; ++i) to[i] = buffer[i];
}

/// A packet's place in a row: `count` elements from `first` on, those beyond, if any, being read as
/// zero and not written.
struct Place {
  Index first;
  Index count;
  template <class Scalar>
  Packet<Scalar> load(const Scalar* row) const {
    return count == packet_size<Scalar> ? detail::load(row + first)
                                        : load_first(row + first, count);
  }
  template <class Scalar>
  void store(Scalar* row, const Packet<Scalar>& packet) const {
    if (count == packet_size<Scalar>) return detail::store(row + first, packet);
    store_first(row + first, count, packet);
  }
};

/// Calls f(place) for the packets of a row. (One f for whole and partial ones, since what is called
/// here is compiled in very many forms.)
template <class Scalar, class F>
void for_each_packet(Index count, F f) {
  constexpr Index size = packet_size<Scalar>;
  for (Index i = 0; i < count; i += size) f(Place{i, std::min(size, count - i)});
}

/// out[i] = f(in[i]...), a packet at a time; out may be one of the inputs.
template <class Scalar, class F, class... In>
void map(Index count, Scalar* out, F f, const In*... in) {
  for_each_packet<Scalar>(count, [&](const Place& at) { at.store(out, f(at.load(in)...)); });
}

/// Σ a[i]·b[i] in one fixed order that depends on `count` alone.
template <class Scalar>
Scalar dot(Index count, const Scalar* a, const Scalar* b) {
  using Eigen::internal::pmadd;
  constexpr Index size = packet_size<Scalar>;
  Packet<Scalar> sum0 = broadcast(Scalar{0});
  Packet<Scalar> sum1 = sum0;
  Packet<Scalar> sum2 = sum0;
  Packet<Scalar> sum3 = sum0;
  Index i = 0;
  for (; i + 4 * size <= count; i += 4 * size) {
    sum0 = pmadd(load(a + i), load(b + i), sum0);
    sum1 = pmadd(load(a + i + size), load(b + i + size), sum1);
    sum2 = pmadd(load(a + i + 2 * size), load(b + i + 2 * size), sum2);
    sum3 = pmadd(load(a + i + 3 * size), load(b + i + 3 * size), sum3);
  }
  for (; i + size <= count; i += size) sum0 = pmadd(load(a + i), load(b + i), sum0);
  if (i < count) sum0 = pmadd(load_first(a + i, count - i), load_first(b + i, count - i), sum0);
  using Eigen::internal::padd;
  return Eigen::internal::predux(padd(padd(sum0, sum1), padd(sum2, sum3)));
}

/// Σ a[i], in the order of dot().
template <class Scalar>
Scalar sum(Index count, const Scalar* a) {
  constexpr Index size = packet_size<Scalar>;
  using Eigen::internal::padd;
  Packet<Scalar> total = broadcast(Scalar{0});
  Index i = 0;
  for (; i + size <= count; i += size) total = padd(total, load(a + i));
  if (i < count) total = padd(total, load_first(a + i, count - i));
  return Eigen::internal::predux(total);
}

/// y[i] += scale·x[i].
template <class Scalar>
void add_scaled(Index count, Scalar scale, const Scalar* x, Scalar* y) {
  const Packet<Scalar> s = broadcast(scale);
  map(
      count, y,
      [s](const Packet<Scalar>& xi, const Packet<Scalar>& yi) {
        return Eigen::internal::pmadd(s, xi, yi);
      },
      x, y);
}

/// Rows that are summed in one chain of additions, at most: the sums of longer columns are made of
/// such blocks, so that their rounding errors do not grow with the number of rows.
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
    const Place at{column, std::min(size, rows.width() - column)};
    Packet<Scalar> sum = zero;
    for (Index i = 0; i < rows.count(); ++i) {
      sum = pmadd(broadcast(*factors.at(i)), at.load(rows.row(i)), sum);
    }
    at.store(y, padd(at.load(y), sum));
  }
}

/// Calls f(first, count) for the blocks of rows that are summed by themselves.
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

/// f of every lane, for functions that have no vector form.
template <class Scalar, class F>
Packet<Scalar> for_each_lane(const Packet<Scalar>& x, F f) {
  Scalar lanes[packet_size<Scalar>];
  store(lanes, x);
  for (Scalar& lane : lanes) lane = f(lane);
  return load(lanes);
}

// Eigen marks some of pexp, ptanh and psqrt as unused, and clang warns of who calls them. So they are
// called by Eigen's functors, whose warnings stay in Eigen's headers.

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
    // Eigen's rational function ends short of 1 where it takes a processor that fuses for one that
    // does not, as on ARM.
    const Packet<Scalar> above = pcmp_le(broadcast(Scalar{8}), x);
    const Packet<Scalar> below = pcmp_le(x, broadcast(Scalar{-8}));
    return pselect(above, broadcast(Scalar{1}), pselect(below, broadcast(Scalar{-1}), inside));
  } else {
    return for_each_lane<Scalar>(x, [](Scalar v) { return std::tanh(v); });
  }
}

/// log(1 + e^x), exact to rounding at both ends: max(x, 0) + log1p(e^-|x|), and
/// log1p(t) = 2·atanh(t / (2 + t)), a series in at most 1/9 that is good for small t too.
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
  // Zero goes first: Eigen's pmax keeps a NaN in its first operand's place only on some machines,
  // but x reappears in t, so a NaN reaches the sum either way.
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

/// Φ, its distribution function, with a small relative error in the lower tail too.
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

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
