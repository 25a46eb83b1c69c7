#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>

#include <moe/kernels/gemm.hpp>
#include <moe/moe.hpp>

/// \file
/// What this machine can do, measured in the same run as everything that is compared with it.

namespace bench {

using moe::Index;

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Operations a second of a chain of multiply-adds in registers, one attempt. Not inlined, because
/// the compiler takes what initialises a static variable for cold and makes it small, not fast.
template <class Scalar>
[[gnu::noinline]] double try_multiply_adds(Scalar factor) {
  using namespace moe::detail;
  constexpr Index chains = 12;  // enough to hide the latency of one
  constexpr Index rounds = 400000;
  Packet<Scalar> sum[chains];
  unroll<chains>([&](auto i) { sum[i] = broadcast(static_cast<Scalar>(i)); });
  const Packet<Scalar> a = broadcast(factor);
  const double start = seconds_now();
  for (Index round = 0; round < rounds; ++round) {
    unroll<chains>([&](auto i) { sum[i] = Eigen::internal::pmadd(sum[i], a, a); });
  }
  Packet<Scalar> total = sum[0];
  unroll<chains>([&](auto i) { total = Eigen::internal::padd(total, sum[i]); });
  Scalar result = Eigen::internal::predux(total);
  benchmark::DoNotOptimize(result);
  const double seconds = seconds_now() - start;
  return static_cast<double>(2 * chains * rounds * packet_size<Scalar>) / seconds;
}

/// What one core can do at most: the best of several tries, since other programs only ever make it
/// slower.
template <class Scalar>
double multiply_add_peak() {
  static const double peak = [] {
    double best = 0;
    for (int i = 0; i < 20; ++i) best = std::max(best, try_multiply_adds(static_cast<Scalar>(0.5)));
    return best;
  }();
  return peak;
}

/// Runs the rest of a benchmark on so many threads.
inline void use_threads([[maybe_unused]] Index threads) {
#ifdef _OPENMP
  omp_set_num_threads(static_cast<int>(threads));
#endif
}

/// Tokens a second, GFLOP/s, and the share of the multiply-add peak of the cores in use.
template <class Scalar>
void report(benchmark::State& state, Index tokens, double operations, Index threads) {
  using benchmark::Counter;
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["tokens/s"] =
      Counter(iterations * static_cast<double>(tokens), Counter::kIsRate);
  if (operations == 0) return;
  state.counters["GFLOP/s"] = Counter(iterations * operations * 1e-9, Counter::kIsRate);
  state.counters["peak_fraction"] =
      Counter(iterations * operations / (multiply_add_peak<Scalar>() * static_cast<double>(threads)),
              Counter::kIsRate);
}

template <class Scalar>
moe::Matrix<Scalar> random_matrix(Index rows, Index columns, std::uint64_t seed) {
  moe::Matrix<Scalar> matrix(rows, columns);
  moe::fill_normal(matrix, Scalar{1}, seed);
  return matrix;
}

}  // namespace bench
