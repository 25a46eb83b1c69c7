#pragma once

#include <mpi.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <utility>

#include "moe/mpi/error.hpp"

/// \file
/// MPI's start and end, and what becomes of exceptions that nobody handles.

namespace moe::mpi {

/// Starts MPI, unless that was done, and ends it with the scope. Where an exception leaves the
/// scope it ends the processes of all ranks instead, with MPI_Abort(), since the others would wait
/// for this one for ever. The message is lost then, unless it was printed before; see run().
///
/// Threads of OpenMP may compute, while only the thread that made this calls into MPI
/// (MPI_THREAD_FUNNELED).
class Environment {
 public:
  /// Throws std::runtime_error when MPI allows no threads.
  explicit Environment(int* argc = nullptr, char*** argv = nullptr)
      : exceptions_(std::uncaught_exceptions()) {
    int initialized = 0;
    MPI_Initialized(&initialized);
    int provided = MPI_THREAD_SINGLE;
    if (initialized != 0) {
      MPI_Query_thread(&provided);
    } else {
      MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
      owns_ = true;
    }
    if (provided < MPI_THREAD_FUNNELED) {
      throw std::runtime_error("moe: MPI was built or started without MPI_THREAD_FUNNELED");
    }
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

/// Runs a program between MPI's start and end:
///
///     int main(int argc, char** argv) {
///       return moe::mpi::run(&argc, &argv, [&] { ...; return 0; });
///     }
///
/// Returns what `program` does. An exception that leaves it is printed on stderr, with the rank,
/// and ends all ranks within seconds; an Error, if all ranks throw it, is printed once and makes
/// all return 1.
template <class Program>
int run(int* argc, char*** argv, Program&& program) {
  const Environment environment(argc, argv);
  int rank = 0;
  int size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const auto abort_with = [&](const char* message) {
    std::fprintf(stderr, "rank %d: %s\n", rank, message);
    std::fflush(nullptr);
    MPI_Abort(MPI_COMM_WORLD, 1);
  };
  try {
    return std::forward<Program>(program)();
  } catch (const Error& error) {
    if (error.rank() == 0) std::fprintf(stderr, "%s\n", error.what());
    if (error.size() < size) abort_with("not all ranks had this error");
  } catch (const std::exception& error) {
    abort_with(error.what());
  } catch (...) {
    abort_with("an exception that is no std::exception");
  }
  return 1;
}

}  // namespace moe::mpi
