#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <moe/moe.hpp>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "clock.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

/// \file
/// What this machine can do, measured in the same run as everything that is compared with it. Every
/// figure is the best of several tries, since other programs only ever make it slower.

// A packet as a template argument loses its alignment attribute, which is harmless here.
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace bench {

using moe::Index;

/// Runs the rest of a benchmark on this number of threads.
inline void use_threads([[maybe_unused]] Index threads) {
#ifdef _OPENMP
  omp_set_num_threads(static_cast<int>(threads));
#endif
}

inline Index all_cores() {
#ifdef _OPENMP
  return omp_get_num_procs();
#else
  return 1;
#endif
}

/// Bytes of the L3, or of the last cache there is. Where the sources differ, the smallest: in a virtual
/// machine one of them may name what is shared with machines that are not ours.
inline double last_level_cache() {
  static const double bytes = [] {
    double smallest = 0;
    const auto consider = [&](double found) {
      if (found > 0 && (smallest == 0 || found < smallest)) smallest = found;
    };
#ifdef _SC_LEVEL3_CACHE_SIZE
    const long level3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
    consider(static_cast<double>(level3 > 0 ? level3 : sysconf(_SC_LEVEL2_CACHE_SIZE)));
#endif
    // "32768K" in the folder of each cache; the last one is the outermost.
    double outermost = 0;
    for (int i = 0; i < 8; ++i) {
      std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/size");
      double size = 0;
      char unit = ' ';
      if (!(file >> size >> unit)) break;
      const double scale = unit == 'M' ? 1048576 : unit == 'K' ? 1024 : 1;
      outermost = std::max(outermost, size * scale);
    }
    consider(outermost);
    return smallest > 0 ? smallest : 32.0 * 1048576;
  }();
  return bytes;
}

namespace detail {

template <class Scalar>
using Packet = typename Eigen::internal::packet_traits<Scalar>::type;

template <Index... i, class F>
EIGEN_ALWAYS_INLINE void unroll(std::integer_sequence<Index, i...>, F&& f) {
  (f(std::integral_constant<Index, i>{}), ...);
}
template <Index N, class F>
EIGEN_ALWAYS_INLINE void unroll(F&& f) {
  unroll(std::make_integer_sequence<Index, N>{}, f);
}

/// Operations a second of multiply-adds in registers. Not inlined, because the compiler takes what
/// initialises a static variable for cold and makes it small, not fast.
template <class Scalar>
[[gnu::noinline]] double try_multiply_adds(Scalar factor) {
  using namespace Eigen::internal;
  constexpr Index size = unpacket_traits<Packet<Scalar>>::size;
  constexpr Index chains = 12;  // enough to hide the latency of one
  constexpr Index rounds = 400000;
  Packet<Scalar> sum[chains];
  unroll<chains>([&](auto i) { sum[i] = pset1<Packet<Scalar>>(static_cast<Scalar>(i)); });
  const Packet<Scalar> a = pset1<Packet<Scalar>>(factor);
  const double start = seconds_now();
  for (Index round = 0; round < rounds; ++round) {
    unroll<chains>([&](auto i) { sum[i] = pmadd(sum[i], a, a); });
  }
  Packet<Scalar> total = sum[0];
  unroll<chains>([&](auto i) { total = padd(total, sum[i]); });
  Scalar result = predux(total);
  benchmark::DoNotOptimize(result);
  return static_cast<double>(2 * chains * rounds * size) / (seconds_now() - start);
}

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
/// Operations a second of step(sum), `operations` each, on sums in registers.
template <class Register, class Step>
[[gnu::noinline]] double try_dots(Index operations, Step step) {
  constexpr Index chains = 12;
  constexpr Index rounds = 400000;
  Register sum[chains] = {};
  const double start = seconds_now();
  for (Index round = 0; round < rounds; ++round) {
    unroll<chains>([&](auto i) {
      sum[i] = step(sum[i]);
      asm("" : "+v"(sum[i]));  // else GCC moves sums to memory and back
    });
  }
  const double seconds = seconds_now() - start;
  // DoNotOptimize() would want them in memory all the time.
  unroll<chains>([&](auto i) { asm volatile("" : : "v"(sum[i])); });
  return static_cast<double>(operations * chains * rounds) / seconds;
}
#endif

// The dot products that some processors have: each adds to a lane the products of two pairs of bfloat16, or
// of four pairs of bytes.

#ifdef __AVX512BF16__
inline double try_bfloat16_dots() {
  const auto a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3F003F00));  // 0.5
  return try_dots<__m512>(2 * 2 * 16, [a](__m512 sum) { return _mm512_dpbf16_ps(sum, a, a); });
}
#endif

#ifdef __AVX512VNNI__
inline double try_byte_dots() {
  const __m512i a = _mm512_set1_epi8(1);
  return try_dots<__m512i>(2 * 4 * 16, [a](__m512i sum) { return _mm512_dpbusd_epi32(sum, a, a); });
}
#endif

/// Memory to measure the bandwidth with: far larger than the cache, written once so that
/// every page is a page of its own, in large pages where wanted and possible.
class Buffer {
 public:
  explicit Buffer(bool large_pages)
      : bytes_(static_cast<std::size_t>(std::max(8 * last_level_cache(), 256.0 * 1048576) / page +
                                        0.5) *
               page),
        data_(static_cast<float*>(std::aligned_alloc(page, bytes_))) {
    if (!data_) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(data_.get(), bytes_, large_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
    static_cast<void>(large_pages);
#endif
    std::fill_n(data_.get(), bytes_ / sizeof(float), 1.0f);
  }
  const float* data() const { return data_.get(); }
  float* data() { return data_.get(); }
  Index size() const { return static_cast<Index>(bytes_ / sizeof(float)); }

 private:
  static constexpr std::size_t page = std::size_t{2} << 20;
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::size_t bytes_;
  std::unique_ptr<float, Free> data_;
};

/// Sums `count` floats as `streams` streams next to each other, prefetching cache lines `ahead`
/// floats early.
template <Index streams>
[[gnu::noinline]] float sum_streams(const float* data, Index count, Index ahead) {
  using namespace Eigen::internal;
  using P = Packet<float>;
  constexpr Index line = 16;  // floats
  constexpr Index size = unpacket_traits<P>::size;
  const Index length = count / streams / line * line;
  P sum[static_cast<std::size_t>(streams)];
  unroll<streams>([&](auto s) { sum[s] = pset1<P>(0.0f); });
  for (Index i = 0; i < length; i += line) {
    unroll<streams>([&](auto s) {
      const float* from = data + s * length + i;
      if (ahead != 0) prefetch(from + ahead);
      unroll<line / size>([&](auto p) { sum[s] = padd(sum[s], ploadu<P>(from + p * size)); });
    });
  }
  P total = sum[0];
  unroll<streams>([&](auto s) { total = padd(total, sum[s]); });
  return predux(total);
}

template <Index streams>
double try_read(const Buffer& buffer, Index threads, Index ahead) {
  const Index part = buffer.size() / threads;
  std::vector<float> sums(static_cast<std::size_t>(threads));
  const double start = seconds_now();
  moe::parallel_for(threads, [&](Index i, Index) {
    sums[static_cast<std::size_t>(i)] = sum_streams<streams>(buffer.data() + i * part, part, ahead);
  });
  const double seconds = seconds_now() - start;
  benchmark::DoNotOptimize(sums.data());
  return static_cast<double>(part * threads) * sizeof(float) / seconds;
}

}  // namespace detail

/// What this number of cores reaches together where each calls `rate`: the best of several tries.
template <class Rate>
double best_rate(Index threads, Rate rate, double seconds) {
  double best = 0;
  const double end = seconds_now() + seconds;
  while (seconds_now() < end) {
    std::vector<double> rates(static_cast<std::size_t>(threads));
    use_threads(threads);
    moe::parallel_for(threads,
                      [&](Index t, Index) { rates[static_cast<std::size_t>(t)] = rate(); });
    best = std::max(best, std::accumulate(rates.begin(), rates.end(), 0.0));
  }
  return best;
}

/// The most floating-point operations a second of this number of cores.
template <class Scalar>
double multiply_add_peak(Index threads) {
  static std::map<Index, double> known;
  const bool first = known.find(threads) == known.end();
  double& best = known[threads];
  // A few more tries whenever it is asked for, in case the first fell into a busy moment.
  const auto rate = [] { return detail::try_multiply_adds(static_cast<Scalar>(0.5)); };
  best = std::max(best, best_rate(threads, rate, first ? 0.5 : 0.02));
  return best;
}

/// The most bytes a second that this number of cores reads from memory: the best of several streams
/// next to each other, with and without prefetching, in small pages and large ones.
inline double read_bandwidth(Index threads) {
  static std::map<Index, double> known;
  if (known.contains(threads)) return known[threads];
  double best = threads > 1 ? read_bandwidth(1) : 0;
  use_threads(threads);
  for (const bool large_pages : {false, true}) {
    const detail::Buffer buffer(large_pages);
    for (int i = 0; i < 4; ++i) {
      for (const Index ahead : {0, 128, 512, 1024}) {
        best = std::max(best, detail::try_read<1>(buffer, threads, ahead));
        best = std::max(best, detail::try_read<2>(buffer, threads, ahead));
        best = std::max(best, detail::try_read<4>(buffer, threads, ahead));
        best = std::max(best, detail::try_read<8>(buffer, threads, ahead));
      }
    }
  }
  known[threads] = best;
  return best;
}

namespace detail {

/// b = a, or b = b - a, of `count` numbers.
template <bool subtracts>
[[gnu::noinline]] void write_pass(const float* a, float* b, Index count, Index ahead) {
  using namespace Eigen::internal;
  using P = Packet<float>;
  constexpr Index line = 16;  // floats
  constexpr Index size = unpacket_traits<P>::size;
  for (Index i = 0; i < count / line * line; i += line) {
    if (ahead != 0) {
      prefetch(a + i + ahead);
      prefetch(b + i + ahead);
    }
    unroll<line / size>([&](auto p) {
      const P read = ploadu<P>(a + i + p * size);
      float* to = b + i + p * size;
      pstoreu(to, subtracts ? psub(ploadu<P>(to), read) : read);
    });
  }
}

}  // namespace detail

/// Bytes a second that one core moves in the plain passes of a training step over weights and gradients
/// beyond the caches, with ordinary stores: it reads the weights, reads them and writes the gradients,
/// and reads both and writes the weights, six times the bytes of the weights in all. That a line which
/// is written over is read first is not counted as moved.
inline double training_bandwidth() {
  static double best = 0;
  if (best > 0) return best;
  for (const bool large_pages : {false, true}) {
    detail::Buffer buffer(large_pages);
    const Index count = buffer.size() / 2;
    float* weights = buffer.data();
    float* gradients = buffer.data() + count;
    for (int i = 0; i < 4; ++i) {
      for (const Index ahead : {0, 128, 512}) {
        const double start = seconds_now();
        benchmark::DoNotOptimize(detail::sum_streams<4>(weights, count, ahead));
        detail::write_pass<false>(weights, gradients, count, ahead);
        detail::write_pass<true>(gradients, weights, count, ahead);
        benchmark::DoNotOptimize(weights);
        best = std::max(best,
                        static_cast<double>(6 * count) * sizeof(float) / (seconds_now() - start));
      }
    }
  }
  return best;
}

/// Bytes of memory that are free, or 0 where that cannot be told.
inline double free_memory() {
  std::ifstream file("/proc/meminfo");
  std::string word;
  double kilobytes = 0;
  while (file >> word) {
    if (word == "MemAvailable:" && file >> kilobytes) return 1024 * kilobytes;
  }
  return 0;
}

template <class Scalar>
moe::Matrix<Scalar> random_matrix(Index rows, Index columns, std::uint64_t seed) {
  moe::Matrix<Scalar> matrix(rows, columns);
  moe::fill_normal(matrix, Scalar{1}, seed);
  return matrix;
}

}  // namespace bench

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
