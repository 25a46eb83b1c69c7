#pragma once

#include <fstream>
#include <string>

#ifdef __GLIBC__
#include <malloc.h>
#endif

/// \file
/// How much memory the process has, by the system's own figures, so allocators' waste and threads'
/// stacks are in it too.

namespace bench {

namespace detail {

/// A figure of /proc/self/status in bytes, 0 where there is none.
inline double process_status(const std::string& name) {
  std::ifstream file("/proc/self/status");
  std::string word;
  double kilobytes = 0;
  while (file >> word) {
    if (word == name && file >> kilobytes) return 1024 * kilobytes;
  }
  return 0;
}

}  // namespace detail

/// What the process had in memory at most since this was made, above what it had then.
class PeakMemory {
 public:
  PeakMemory() {
#ifdef __GLIBC__
    // What was given back must not hide what is taken now.
    mallopt(M_MMAP_THRESHOLD, 1 << 16);
    malloc_trim(0);
#endif
    before_ = detail::process_status("VmRSS:");
    std::ofstream file("/proc/self/clear_refs");
    file << 5 << std::flush;  // from here on VmHWM is the peak
    known_ = file.good() && before_ > 0;
  }

  /// Whether this system says how much it is.
  bool known() const { return known_; }
  double bytes() const { return detail::process_status("VmHWM:") - before_; }

 private:
  double before_ = 0;
  bool known_ = false;
};

}  // namespace bench
