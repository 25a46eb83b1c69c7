#pragma once

#include <exception>

#include "moe/flush_denormals.hpp"
#include "moe/function_ref.hpp"
#include "moe/matrix.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

/// \file
/// The only place that knows of threads: OpenMP where the user compiles with it, else serial.
///
/// Work is split by what it writes and every sum keeps one order, so the number of threads
/// (omp_set_num_threads, OMP_NUM_THREADS) never changes a bit of any result; for that, workers also
/// round and flush denormals as the calling thread does. Compile all files of a
/// program alike, with OpenMP or without: these are inline functions, of which the linker keeps
/// one.

namespace moe {

/// How many workers the next parallel_for may use: 1 without OpenMP and inside a parallel region.
inline Index worker_count() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

/// Calls f(i, worker) once for every i in [0, count), in any order, worker in [0, worker_count()).
/// Two calls with the same worker never overlap, so a worker may own scratch. Of several
/// exceptions the one with the smallest i is thrown on, whatever the number of threads; which other
/// calls were made by then is unspecified.
inline void parallel_for(Index count, detail::FunctionRef<void(Index, Index)> f) {
#ifdef _OPENMP
  if (count > 1 && worker_count() > 1) {
    std::exception_ptr error;
    Index error_index = count;
    const std::uint64_t float_control = detail::float_control();
#pragma omp parallel
    {
      const detail::FloatControl same(float_control);
#pragma omp for schedule(dynamic, 1)
      for (Index i = 0; i < count; ++i) {
        try {
          f(i, static_cast<Index>(omp_get_thread_num()));
        } catch (...) {
#pragma omp critical(moe_parallel_for)
          if (i < error_index) {
            error_index = i;
            error = std::current_exception();
          }
        }
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  for (Index i = 0; i < count; ++i) f(i, Index{0});
}

/// How much a loop has to do, in multiply-adds of a matrix product, of which a core does some
/// twenty to fifty in a nanosecond.
struct Work {
  Index multiply_adds = 0;
};

/// The work of reading, changing and writing elements of matrices.
constexpr Work element_work(Index elements) { return {16 * elements}; }
/// That of an exponential or a few random bits for each of some elements.
constexpr Work function_work(Index elements) { return {64 * elements}; }

/// Less than this stays on the calling thread: to wake others costs some microseconds, and on a
/// machine that others use some milliseconds, since OpenMP's threads wait for each other in a busy
/// loop. It is compared with the work alone, never with time. bench/threads.cpp has the row that
/// shows where two threads begin to be worth it.
inline constexpr Work least_shared_work{Index{1} << 20};

/// How many workers a loop with this much work uses.
inline Index worker_count(Work work) {
  return work.multiply_adds < least_shared_work.multiply_adds ? 1 : worker_count();
}

/// parallel_for() of a loop that has this much to do in all; too little stays on the calling thread.
inline void parallel_for(Index count, Work work, detail::FunctionRef<void(Index, Index)> f) {
  if (worker_count(work) > 1) return parallel_for(count, f);
  for (Index i = 0; i < count; ++i) f(i, Index{0});
}

/// Calls f(first, size) for consecutive blocks that cover [0, count): parallel_for for loops whose
/// single step is too small to be a task.
inline void parallel_for_blocks(Index count, Index block, Work work,
                                detail::FunctionRef<void(Index, Index)> f) {
  parallel_for((count + block - 1) / block, work, [&](Index i, Index) {
    const Index first = i * block;
    f(first, first + block < count ? block : count - first);
  });
}

}  // namespace moe
