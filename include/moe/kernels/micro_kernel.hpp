#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "moe/kernels/gemm_descriptor.hpp"
#include "moe/kernels/simd.hpp"

/// \file
/// The micro-kernel, the innermost loop of every product: a small tile of C that stays in registers
/// while k runs.
///
///     C[r, v] = start[r, v] + factor[r]·bias[v] + Σ_k left[r][k·step]·right[k, v]
///                                                                  R rows, V packets of columns
///
/// A step of k takes V loads of `right`, R broadcasts of `left` and R·V multiply-adds. With 8 x 3
/// packets where there are 32 registers, and 6 x 2 where there are 16, it is limited by the
/// multiply-adds, and has more independent chains than a multiply-add has cycles of latency. Of two
/// tiles with the same number of multiply-adds, the higher one reads fewer bytes of `right`: 4 x 3
/// packets would need half as many again as 6 x 2.

// GCC warns that a packet as a template argument loses its alignment attribute, which is harmless
// here; Eigen's own headers turn this warning off in the same way.
MOE_PACKETS_BEGIN

namespace moe::detail {

#if defined(EIGEN_VECTORIZE_AVX512) || EIGEN_ARCH_ARM64
inline constexpr Index tile_rows = 8;
#else
inline constexpr Index tile_rows = 6;
#endif
/// The highest tile on any processor: of one packet, with enough independent chains.
inline constexpr Index max_tile_rows = 8;
/// Whether a tile is so large, with 32 registers, that L2 can feed it from rows of B in place: 8 x 3
/// packets of 64 bytes read 8 bytes of B for each multiply-add, 8 bytes per cycle at one a cycle. 6 x 2
/// packets of 32 bytes read 5.3, 11 bytes per cycle at two a cycle, which L2 delivers only where a tile
/// reads contiguous memory: for many rows of A these tiles need B packed.
inline constexpr bool l2_feeds_tiles = tile_rows == max_tile_rows;
inline constexpr Index tile_packets = l2_feeds_tiles ? 3 : 2;
/// The highest tile of a product that reads B in place: 32 registers hold one row more if the
/// broadcasts of A share one. On ARM64 GCC uses one for each row.
#if defined(EIGEN_VECTORIZE_AVX512)
inline constexpr Index direct_rows = 9;
#else
inline constexpr Index direct_rows = tile_rows;
#endif

template <class Scalar>
inline constexpr Index tile_columns = tile_packets* packet_size<Scalar>;

/// Calls f with `value`, which is from 1 to N, as a constant.
template <Index N, class F>
void with_constant(Index value, F&& f) {
  if constexpr (N > 1) {
    if (value < N) return with_constant<N - 1>(value, f);
  }
  f(std::integral_constant<Index, N>{});
}

/// The address some bytes after another, to prefetch only: it may be beyond the memory there, or in another
/// matrix, so it is computed as an integer.
EIGEN_ALWAYS_INLINE std::uintptr_t address_after(const void* place, Index bytes) {
  return reinterpret_cast<std::uintptr_t>(place) + to_size(bytes);
}

/// Prefetches the cache line some bytes after an address.
EIGEN_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* place,
                                  [[maybe_unused]] Index bytes = 0) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(address_after(place, bytes)));
  asm volatile("");  // else GCC leaves out a function that does nothing but prefetch
#endif
}

/// The number of cache lines of a row that are prefetched for a tile: those that it reads, at least
/// two. All are prefetched, since the hardware prefetcher does not fetch any that are left out.
inline constexpr Index strip_lines =
    std::max<Index>(2, (tile_columns<float> + cache_line<float> - 1) / cache_line<float>);

template <class Scalar>
EIGEN_ALWAYS_INLINE void prefetch_strip(const Scalar* place) {
  MOE_UNROLL
  for (Index line = 0; line < strip_lines; ++line) prefetch(place, 64 * line);
}

/// Prefetches `lines` cache lines, `further` elements after an address, into L2, since L1 would not
/// hold them until they are read.
template <Index lines, class Scalar>
EIGEN_ALWAYS_INLINE void prefetch_far([[maybe_unused]] const Scalar* place,
                                      [[maybe_unused]] Index further = 0) {
#if defined(__GNUC__)
  const std::uintptr_t first = address_after(place, further * Index{sizeof(Scalar)});
  MOE_UNROLL
  for (std::uintptr_t line = 0; line < lines; ++line) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + 64 * line), 0, 2);
  }
  asm volatile("");
#endif
}

/// address_after() `further` elements, as a pointer.
template <class Scalar>
EIGEN_ALWAYS_INLINE const Scalar* prefetched_after(const Scalar* place, Index further) {
  return reinterpret_cast<const Scalar*>(address_after(place, further * Index{sizeof(Scalar)}));
}

/// The left operand: the first value of each row, and the distance of its values along the depth.
template <class Scalar>
struct Left {
  const Scalar* row[to_size(std::max(max_tile_rows, direct_rows))];
  Index step = 1;
};

/// Rows of the right operand along the depth, `stride` apart.
template <class Scalar>
struct Panel {
  const Scalar* data;
  Index stride;
};

/// What a tile prefetches while it multiplies: strip_lines cache lines at each of `count` addresses,
/// some of them every few steps. The hardware prefetcher does not fetch them, since they are short
/// pieces at a long stride.
template <class Scalar>
struct Prefetch {
  const Scalar* address = nullptr;
  Index stride = 0;
  Index count = 0;
  Index each = 2;  ///< addresses at a time, prefetch_stretch steps apart
};

inline constexpr Index prefetch_stretch = 8;

/// A packet that the compiler must keep in a register; GCC would reload it for every row.
template <class P>
EIGEN_ALWAYS_INLINE P to_register(P packet) {
#if defined(__GNUC__) && defined(EIGEN_VECTORIZE_AVX512)
  asm("" : "+v"(packet));
#elif defined(__GNUC__) && defined(EIGEN_VECTORIZE_SSE)
  asm("" : "+x"(packet));
#elif defined(__GNUC__) && EIGEN_ARCH_ARM64
  asm("" : "+w"(packet));
#else
  EIGEN_OPTIMIZATION_BARRIER(packet);  // which allows memory too
#endif
  return packet;
}
/// The same for a packet of integers, which is a class around the processor's own type: clang takes no class.
template <class P, int id>
EIGEN_ALWAYS_INLINE Eigen::internal::eigen_packet_wrapper<P, id> to_register(
    Eigen::internal::eigen_packet_wrapper<P, id> packet) {
  packet.m_val = to_register(packet.m_val);
  return packet;
}

/// What a step does with an element of A, one of B and the sum so far. Another operation may read
/// several numbers from the 32 bits of an element: see bfloat16_words.hpp. prefetches_far says
/// whether a tile prefetches into L2 only.
struct MultiplyAdd {
  static constexpr bool prefetches_far = false;
  template <class P>
  EIGEN_ALWAYS_INLINE static P apply(const P& a, const P& b, const P& sum) {
    return Eigen::internal::pmadd(a, b, sum);
  }
};

/// One step of k. If it `packs`, it stores the packets of `right` in `panel`, for the tiles that come
/// after it. The packets are variables, since GCC sometimes leaves an array of them in memory.
template <bool packs = false, class Operation = MultiplyAdd, class P, class Scalar, std::size_t R,
          std::size_t V>
EIGEN_ALWAYS_INLINE void add_products(const Scalar* const (&row)[R], Index at, const Scalar* b,
                                      P (&sum)[R][V], [[maybe_unused]] Scalar* panel = nullptr) {
  using namespace Eigen::internal;
  static_assert(V <= 4);
  constexpr Index size = unpacket_traits<P>::size;
  const P b0 = to_register(ploadu<P>(b));
  const P b1 = V > 1 ? to_register(ploadu<P>(b + size)) : b0;
  const P b2 = V > 2 ? to_register(ploadu<P>(b + 2 * size)) : b0;
  const P b3 = V > 3 ? to_register(ploadu<P>(b + 3 * size)) : b0;
  if constexpr (packs) {
    pstoreu(panel, b0);
    if constexpr (V > 1) pstoreu(panel + size, b1);
    if constexpr (V > 2) pstoreu(panel + 2 * size, b2);
    if constexpr (V > 3) pstoreu(panel + 3 * size, b3);
  }
  MOE_UNROLL
  for (std::size_t r = 0; r < R; ++r) {
    const P a = pset1<P>(row[r][at]);
    sum[r][0] = Operation::apply(a, b0, sum[r][0]);
    if constexpr (V > 1) sum[r][1] = Operation::apply(a, b1, sum[r][1]);
    if constexpr (V > 2) sum[r][2] = Operation::apply(a, b2, sum[r][2]);
    if constexpr (V > 3) sum[r][3] = Operation::apply(a, b3, sum[r][3]);
  }
}

/// The product of a bias, if there is one: a step before the others.
template <class P, class Scalar, std::size_t R, std::size_t V>
EIGEN_ALWAYS_INLINE void add_bias(const Bias<Scalar>& bias, P (&sum)[R][V]) {
  if (bias.values == nullptr) return;
  const Scalar* factor[R];
  MOE_UNROLL
  for (std::size_t r = 0; r < R; ++r) factor[r] = bias.factors.at(static_cast<Index>(r));
  add_products(factor, 0, bias.values, sum);
}

/// One tile of packets P.
// Not inline, since the compiler would otherwise keep values of the loops around it in its
// registers.
template <class P, Index R, Index V, class Operation = MultiplyAdd, class Scalar>
MOE_NOINLINE void multiply_tile(const Left<Scalar>& left, Panel<Scalar> right, Index depth,
                                Start start, const Bias<Scalar>& bias, Scalar* const* c,
                                Prefetch<Scalar> ahead) {
  using namespace Eigen::internal;
  constexpr Index size = unpacket_traits<P>::size;
  // Pointers in variables of their own stay in registers; through the arguments they would be
  // reloaded.
  const Scalar* row[to_size(R)];
  Scalar* to[to_size(R)];
  MOE_UNROLL
  for (Index r = 0; r < R; ++r) {
    row[r] = left.row[r];
    to[r] = c[r];
  }
  const Index step = left.step;
  const Index end = depth * step;
  P sum[to_size(R)][to_size(V)];
  if (start == Start::accumulate) {
    MOE_UNROLL
    for (Index i = 0; i < R * V; ++i) sum[i / V][i % V] = ploadu<P>(to[i / V] + i % V * size);
  } else {
    MOE_UNROLL
    for (Index i = 0; i < R * V; ++i) sum[i / V][i % V] = pset1<P>(Scalar{0});
  }
  add_bias(bias, sum);
  const Scalar* b = right.data;
  Index at = 0;
  while (at < end) {
    for (Index i = 0; i < ahead.each && ahead.count > 0; ++i, --ahead.count) {
      if constexpr (Operation::prefetches_far) {
        prefetch_far<strip_lines>(ahead.address);
      } else {
        prefetch_strip(ahead.address);
      }
      ahead.address += ahead.stride;
    }
    const Index pause = ahead.count > 0 ? std::min(end, at + prefetch_stretch * step) : end;
    for (; at < pause; at += step, b += right.stride) {
      add_products<false, Operation>(row, at, b, sum);
    }
  }
  MOE_UNROLL
  for (Index i = 0; i < R * V; ++i) pstoreu(to[i / V] + i % V * size, sum[i / V][i % V]);
}

/// Calls run(to) for a tile in a buffer, `to` being its tile_rows rows. The buffer holds the
/// initial values of C; its first `rows` rows and `width` columns are copied to C afterwards.
template <class Scalar, class F>
void compute_beside(Index rows, Index width, Start start, const Bias<Scalar>& bias,
                    Scalar* const* c, F&& run) {
  constexpr Index columns = tile_columns<Scalar>;
  Scalar beside[to_size(tile_rows * columns)] = {};
  Scalar* to[to_size(tile_rows)];
  for (Index r = 0; r < tile_rows; ++r) to[r] = beside + r * columns;
  for (Index r = 0; r < rows; ++r) {
    if (start == Start::accumulate) std::copy_n(c[r], width, to[r]);
    if (bias.values != nullptr) add_scaled(width, *bias.factors.at(r), bias.values, to[r]);
  }
  run(to);
  for (Index r = 0; r < rows; ++r) std::copy_n(to[r], width, c[r]);
}

/// multiply_tile() with `rows` from 1 to tile_rows and `packets` from 1 to tile_packets known at run time,
/// of whose columns `width` belong to C: a wider tile is computed in a buffer and copied.
template <class Operation = MultiplyAdd, class Scalar>
void multiply_tile(Index rows, Index packets, Index width, const Left<Scalar>& left,
                   Panel<Scalar> right, Index depth, Start start, const Bias<Scalar>& bias,
                   Scalar* const* c, Prefetch<Scalar> ahead = {}) {
  const auto run = [&](Start from, const Bias<Scalar>& initial, Scalar* const* to) {
    with_constant<tile_packets>(packets, [&](auto V) {
      with_constant<tile_rows>(rows, [&](auto R) {
        multiply_tile<Packet<Scalar>, R, V, Operation>(left, right, depth, from, initial, to,
                                                       ahead);
      });
    });
  };
  if (width == packets * packet_size<Scalar>) return run(start, bias, c);

  compute_beside(rows, width, start, bias, c,
                 [&](Scalar* const* to) { run(Start::accumulate, {}, to); });
}

}  // namespace moe::detail

MOE_PACKETS_END
