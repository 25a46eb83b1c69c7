#pragma once

#include <mpi.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <utility>

#include "moe/config.hpp"
#include "moe/mpi/ending.hpp"
#include "moe/mpi/error.hpp"

/// \file
/// Starts and ends MPI, and ends all ranks after an exception that nobody handles.

namespace moe::mpi {

/// Starts MPI and ends it at the end of its scope; does neither if MPI was started before. If an
/// exception leaves the scope, it ends the processes of all ranks with MPI_Abort() instead, since
/// the others would wait for this one for ever. The exception's message is then lost unless it was
/// printed before; run() prints it. After a time-out of a Communicator it ends all ranks too, since
/// MPI cannot be finalized. If another rank does not come while MPI starts or ends, this process
/// ends with a message after `timeout` seconds; 0 is no timeout.
///
/// Threads of OpenMP may compute, but only the thread that made this object may call MPI
/// (MPI_THREAD_FUNNELED).
class Environment {
 public:
  /// Throws std::runtime_error if MPI was built or started without threads, and std::invalid_argument for
  /// a timeout below 0.
  explicit Environment(int* argc = nullptr, char*** argv = nullptr, double timeout = 600)
      : exceptions_(std::uncaught_exceptions()), timeout_(timeout) {
    moe::detail::require(timeout >= 0, "Environment: timeout = ", timeout, ", must be at least 0");
    int initialized = 0;
    MPI_Initialized(&initialized);
    int provided = MPI_THREAD_SINGLE;
    if (initialized != 0) {
      MPI_Query_thread(&provided);
    } else {
      const Deadline deadline("MPI_Init_thread()", timeout);
      MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
      owns_ = true;
    }
    if (provided < MPI_THREAD_FUNNELED) {
      throw std::runtime_error("moe: MPI was built or started without MPI_THREAD_FUNNELED");
    }
  }
  ~Environment() {
    if (std::uncaught_exceptions() > exceptions_) end_all_ranks();
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (!owns_ || finalized != 0) return;
    const Deadline deadline("MPI_Finalize()", timeout_);
    MPI_Finalize();
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  int exceptions_;
  double timeout_;
  bool owns_ = false;
};

/// Runs a program within an Environment:
///
///     int main(int argc, char** argv) {
///       return moe::mpi::run(&argc, &argv, [&] { ...; return 0; });
///     }
///
/// Returns the result of `program`. An exception that leaves it is printed on stderr, with the rank, and
/// ends all ranks within seconds. An Error that all ranks throw is printed once, and all return 1.
/// `timeout` is that of Environment.
template <class Program>
int run(int* argc, char*** argv, Program&& program, double timeout = 600) {
  const Environment environment(argc, argv, timeout);
  int rank = 0;
  int size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const auto abort_with = [&](const char* message) {
    std::fprintf(stderr, "rank %d: %s\n", rank, message);
    end_all_ranks();
  };
  try {
    return std::forward<Program>(program)();
  } catch (const Error& error) {
    if (error.rank() == 0) std::fprintf(stderr, "%s\n", error.what());
    if (error.size() < size) abort_with("not all ranks had this error");
  } catch (const std::exception& error) {
    abort_with(error.what());
  } catch (...) {
    abort_with("an exception that is not a std::exception");
  }
  return 1;
}

}  // namespace moe::mpi
