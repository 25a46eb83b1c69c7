#pragma once

#include <mpi.h>

#include <exception>

/// \file
/// MPI's start and end, tied to a scope.

namespace moe::mpi {

/// Starts MPI, unless that was done, and ends it with the scope. A program has one, at the top of
/// main():
///
///     int main(int argc, char** argv) {
///       const moe::mpi::Environment environment(&argc, &argv);
///       ...
///     }
///
/// Where an exception leaves the scope it ends the processes of all ranks instead, with MPI_Abort():
/// the others would wait for this one for ever. So let exceptions out, into a handler around the
/// Environment or none at all, unless all ranks handle them alike (an Error is thrown by all).
///
/// Threads of OpenMP may compute, while only the thread that made this calls into MPI
/// (MPI_THREAD_FUNNELED).
class Environment {
 public:
  explicit Environment(int* argc = nullptr, char*** argv = nullptr)
      : exceptions_(std::uncaught_exceptions()) {
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (initialized != 0) return;
    int provided = MPI_THREAD_SINGLE;
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
    owns_ = true;
  }
  ~Environment() {
    if (std::uncaught_exceptions() > exceptions_) MPI_Abort(MPI_COMM_WORLD, 1);
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (owns_ && finalized == 0) MPI_Finalize();
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  int exceptions_;
  bool owns_ = false;
};

}  // namespace moe::mpi
