#pragma once

#include <algorithm>
#include <utility>

#include "moe/kernels/packet.hpp"

/// \file
/// The innermost loop of every product: a small tile of C that stays in registers while k runs.
///
///     C[r, v] = start[r, v] + Σ_k left[r][k·step]·right[k, v]      R rows, V packets of columns
///
/// A step of k takes V loads of `right`, R broadcasts of `left` and R·V multiply-adds. With 8 x 3
/// packets where there are 32 registers, and 4 x 3 where there are 16, the multiply-adds are what
/// limits it, and there are more independent chains than a multiply-add is long in cycles.

// A packet as a template argument of Eigen's PacketBlock loses its alignment attribute, which is
// harmless there; Eigen's own headers silence it the same way.
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace moe::detail {

/// What an element of C is before the first product is added.
enum class Start { zero, bias, accumulate };

#if defined(EIGEN_VECTORIZE_AVX512) || EIGEN_ARCH_ARM64
inline constexpr Index tile_rows = 8;
#else
inline constexpr Index tile_rows = 4;
#endif
inline constexpr Index tile_packets = 3;
/// A tile of one packet needs that many rows to have enough chains.
inline constexpr Index max_tile_rows = 8;

template <class Scalar>
inline constexpr Index tile_columns = tile_packets* packet_size<Scalar>;

template <Index... indices, class F>
EIGEN_ALWAYS_INLINE void unroll(std::integer_sequence<Index, indices...>, F&& f) {
  (f(std::integral_constant<Index, indices>{}), ...);
}
/// f(0), f(1), ... f(N - 1) with constant arguments, so that arrays they index become registers.
template <Index N, class F>
EIGEN_ALWAYS_INLINE void unroll(F&& f) {
  unroll(std::make_integer_sequence<Index, N>{}, f);
}

/// Calls f with `value`, which is from 1 to N, as a constant.
template <Index N, class F>
void with_constant(Index value, F&& f) {
  if constexpr (N > 1) {
    if (value < N) return with_constant<N - 1>(value, f);
  }
  f(std::integral_constant<Index, N>{});
}

inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

/// The left operand: where each row starts, and how far its values along the depth are apart.
template <class Scalar>
struct Left {
  const Scalar* row[to_size(max_tile_rows)];
  Index step = 1;
};

/// Rows of the right operand along the depth, `stride` apart.
template <class Scalar>
struct Panel {
  const Scalar* data;
  Index stride;
};

/// Memory that will be wanted soon: two cache lines at each of `count` places. A tile asks for some
/// of them every few steps, so that they come while it calculates; the processor does not foresee
/// them itself, since they are short pieces at a long stride.
template <class Scalar>
struct Ahead {
  const Scalar* place = nullptr;
  Index stride = 0;
  Index count = 0;
  Index each = 2;  ///< places at a time
};

/// One tile, whose start is zero, a bias (V packets), or what C holds.
template <Index R, Index V, class Scalar>
#if defined(__GNUC__)
[[gnu::noinline]]  // else its registers mix with those of the loops around it
#endif
void multiply_tile(const Left<Scalar>& left, Panel<Scalar> right, Index depth, Start start,
                   const Scalar* bias, Scalar* const* c, Ahead<Scalar> ahead) {
  constexpr Index size = packet_size<Scalar>;
  constexpr Index stretch = 8;  // steps between looks ahead
  // Pointers in variables of their own are registers; through `left` they would be loaded anew.
  const Scalar* row[to_size(R)];
  unroll<R>([&](auto r) { row[r] = left.row[r]; });
  const Index step = left.step;
  Packet<Scalar> sum[to_size(R)][to_size(V)];
  if (start == Start::accumulate) {
    unroll<R>([&](auto r) { unroll<V>([&](auto v) { sum[r][v] = load(c[r] + v * size); }); });
  } else if (start == Start::bias) {
    unroll<R>([&](auto r) { unroll<V>([&](auto v) { sum[r][v] = load(bias + v * size); }); });
  } else {
    unroll<R>([&](auto r) { unroll<V>([&](auto v) { sum[r][v] = broadcast(Scalar{0}); }); });
  }
  const Scalar* b = right.data;
  Index at = 0;
  for (Index k = 0; k < depth; k += stretch) {
    for (Index i = 0; i < ahead.each && ahead.count > 0; ++i, --ahead.count) {
      prefetch(ahead.place);
      prefetch(ahead.place + 64 / sizeof(Scalar));
      ahead.place += ahead.stride;
    }
    const Index end = std::min(depth, k + stretch) * step;
    for (; at < end; at += step, b += right.stride) {
      Packet<Scalar> packet[to_size(V)];
      unroll<V>([&](auto v) {
        packet[v] = load(b + v * size);
        EIGEN_OPTIMIZATION_BARRIER(packet[v]);  // else GCC loads it anew for every row
      });
      unroll<R>([&](auto r) {
        const Packet<Scalar> a = broadcast(row[r][at]);
        unroll<V>([&](auto v) { sum[r][v] = Eigen::internal::pmadd(a, packet[v], sum[r][v]); });
      });
    }
  }
  unroll<R>([&](auto r) { unroll<V>([&](auto v) { store(c[r] + v * size, sum[r][v]); }); });
}

/// The same with `rows` from 1 to tile_rows (max_tile_rows where there is one packet) and `packets`
/// from 1 to tile_packets known at run time, of whose columns `width` belong to C: a tile that sticks out is computed beside C and copied.
template <class Scalar>
void multiply_tile(Index rows, Index packets, Index width, const Left<Scalar>& left,
                   Panel<Scalar> right, Index depth, Start start, const Scalar* bias,
                   Scalar* const* c, Ahead<Scalar> ahead = {}) {
  const auto run = [&](Start from, const Scalar* initial, Scalar* const* to) {
    with_constant<tile_packets>(packets, [&](auto V) {
      constexpr Index highest = V == 1 ? max_tile_rows : tile_rows;
      with_constant<highest>(rows, [&](auto R) {
        multiply_tile<R, V>(left, right, depth, from, initial, to, ahead);
      });
    });
  };
  if (width == packets * packet_size<Scalar>) return run(start, bias, c);

  constexpr Index columns = tile_columns<Scalar>;
  Scalar beside[to_size(max_tile_rows * columns)] = {};
  Scalar* to[to_size(max_tile_rows)] = {};
  for (Index r = 0; r < rows; ++r) {
    to[r] = beside + r * columns;
    if (start == Start::accumulate) std::copy_n(c[r], width, to[r]);
    if (start == Start::bias) std::copy_n(bias, width, to[r]);
  }
  run(Start::accumulate, nullptr, to);
  for (Index r = 0; r < rows; ++r) std::copy_n(to[r], width, c[r]);
}

}  // namespace moe::detail

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
