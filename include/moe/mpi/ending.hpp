#pragma once

#include <mpi.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

/// \file
/// Ways to end processes that depend neither on other ranks nor on the launcher.

namespace moe::mpi {

/// Ends this process with a message unless the scope is left within `seconds`. For calls of MPI that
/// cannot be cancelled. The launcher then ends the other ranks.
class Deadline {
 public:
  /// Starts it for a call, whose name is for the message; seconds <= 0 means no deadline.
  Deadline(const char* call, double seconds) {
    if (seconds <= 0) return;
    thread_ = std::thread([this, call, seconds] {
      std::unique_lock lock(mutex_);
      if (met_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return is_met_; })) {
        return;
      }
      std::fprintf(stderr, "moe: %s was not over after %f s\n", call, seconds);
      std::fflush(nullptr);
      std::_Exit(1);
    });
  }
  ~Deadline() {
    if (!thread_.joinable()) return;
    {
      const std::lock_guard lock(mutex_);
      is_met_ = true;
    }
    met_.notify_one();
    thread_.join();
  }
  Deadline(const Deadline&) = delete;
  Deadline& operator=(const Deadline&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable met_;
  bool is_met_ = false;
  std::thread thread_;
};

/// Ends the processes of all ranks. This one ends within half a second even if the launcher does not
/// respond to MPI_Abort(): that of Open MPI 4.1 may hang.
inline void end_all_ranks() {
  std::fflush(nullptr);
  const Deadline deadline("MPI_Abort()", 0.5);
  MPI_Abort(MPI_COMM_WORLD, 1);
}

}  // namespace moe::mpi
