#pragma once

#include <exception>

#include "moe/flush_denormals.hpp"
#include "moe/function_ref.hpp"
#include "moe/matrix.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

/// \file
/// The only file that computes with several threads: those of OpenMP if the program is compiled with it,
/// else none.
///
/// Work is split by what it writes, and the terms of every sum are added in one order, so the number
/// of threads (omp_set_num_threads, OMP_NUM_THREADS) never changes a bit of any result. Workers
/// also compute with the calling thread's rounding mode and its treatment of denormals. Compile all
/// files of a program with OpenMP or all without: these are inline functions, and the linker keeps
/// one copy of each.

namespace moe {

/// The largest number of workers that parallel_for() uses: 1 without OpenMP and inside a parallel region.
inline Index worker_count() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

/// Calls f(i, worker) once for every i in [0, count), in any order, worker in [0, worker_count()).
/// Two calls with the same worker never overlap, so each worker can have its own scratch. If several
/// calls throw, the exception of the smallest i is thrown, whatever the number of threads; which
/// other calls were made is unspecified.
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

/// The work of a loop, measured in multiply-adds of a matrix product, of which a core does about
/// twenty to fifty per nanosecond.
struct Work {
  Index multiply_adds = 0;  ///< of the whole loop
};

/// The work of reading, changing and writing elements of matrices.
constexpr Work element_work(Index elements) { return {16 * elements}; }
/// The work of an exponential, or of drawing a random number, for each element.
constexpr Work function_work(Index elements) { return {64 * elements}; }

/// A loop with less work than this stays on the calling thread: to wake other threads takes
/// microseconds, and milliseconds where other programs use the cores too, since OpenMP's threads wait
/// for each other in a busy loop. bench/threads.cpp measures the work from which two threads are
/// faster than one.
inline constexpr Work least_shared_work{Index{1} << 20};

/// The number of workers that a loop with this much work uses.
inline Index worker_count(Work work) {
  return work.multiply_adds < least_shared_work.multiply_adds ? 1 : worker_count();
}

/// parallel_for() of a loop with this much work in all; below least_shared_work it stays on the calling
/// thread.
inline void parallel_for(Index count, Work work, detail::FunctionRef<void(Index, Index)> f) {
  if (worker_count(work) > 1) return parallel_for(count, f);
  for (Index i = 0; i < count; ++i) f(i, Index{0});
}

/// Calls f(first, size) for consecutive blocks of `block` >= 1 steps, the last perhaps smaller,
/// that cover [0, count): parallel_for for loops whose single step is too small to be a task.
inline void parallel_for_blocks(Index count, Index block, Work work,
                                detail::FunctionRef<void(Index, Index)> f) {
  parallel_for((count + block - 1) / block, work, [&](Index i, Index) {
    const Index first = i * block;
    f(first, first + block < count ? block : count - first);
  });
}

}  // namespace moe
