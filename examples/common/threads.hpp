#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace examples {

/// How many threads parallel regions have that the calling thread opens.
inline void use_threads([[maybe_unused]] int threads) {
#ifdef _OPENMP
  omp_set_num_threads(threads);
#endif
}

}  // namespace examples
