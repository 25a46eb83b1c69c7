#pragma once

#include <algorithm>

#include "moe/matrix.hpp"

/// \file
/// The vector registers of the processor, portably: Eigen's packet types, so that one source serves
/// SSE, AVX2, AVX-512 and NEON, float and double.
///
/// Every element of a row goes through the same packet operation, the last few in a packet that is
/// padded with zeros. (Eigen's array expressions use other, scalar functions at the ends of a
/// row, and where the ends are depends on the address; a token would get other bits in another
/// row.)

// GCC warns that a packet as a template argument loses its alignment attribute, which is harmless
// here; Eigen's own headers turn this warning off in the same way.
MOE_PACKETS_BEGIN

namespace moe::detail {

template <class Scalar>
using Packet = typename Eigen::internal::packet_traits<Scalar>::type;

template <class Scalar>
inline constexpr Index packet_size = Eigen::internal::unpacket_traits<Packet<Scalar>>::size;

/// A packet half as wide, of which the processor computes two at once; the packet itself where there
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

/// The first `count` < packet_size elements; the rest are zero. Not inline: it is called rarely,
/// but from very many places.
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

/// The elements of a row that a packet holds: `count` of them from `first` on. Lanes beyond are read
/// as zero and not written.
struct PacketSpan {
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

/// Calls f(span) for the packets of a row. (There is one f for whole and partial packets, since it
/// is compiled in very many forms.)
template <class Scalar, class F>
void for_each_packet(Index count, F f) {
  constexpr Index size = packet_size<Scalar>;
  for (Index i = 0; i < count; i += size) f(PacketSpan{i, std::min(size, count - i)});
}

/// out[i] = f(in[i]...), a packet at a time; out may be one of the inputs.
template <class Scalar, class F, class... In>
void map(Index count, Scalar* out, F f, const In*... in) {
  for_each_packet<Scalar>(count, [&](const PacketSpan& at) { at.store(out, f(at.load(in)...)); });
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

/// Σ a[i] in one fixed order that depends on `count` alone, not that of dot().
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

}  // namespace moe::detail

MOE_PACKETS_END
