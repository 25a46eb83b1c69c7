#pragma once

#if defined(__unix__) || defined(__APPLE__)
#define MOE_HAS_POSIX_FILES 1
#else
#define MOE_HAS_POSIX_FILES 0
#endif

#if MOE_HAS_POSIX_FILES

#include <sys/stat.h>
#include <unistd.h>

#include <string_view>
#include <utility>

/// \file
/// What reading and writing have in common on POSIX systems.

namespace moe::detail {

/// A file descriptor, closed by the destructor.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~Descriptor() {
    if (is_open()) ::close(number_);
  }

  bool is_open() const { return number_ >= 0; }
  int number() const { return number_; }

 private:
  int number_ = -1;
};

/// The kind of something that is not a regular file, for messages: "it is a directory".
inline std::string_view irregular_kind(mode_t mode) {
  if (S_ISDIR(mode)) return "it is a directory";
  if (S_ISFIFO(mode)) return "it is a FIFO";
  if (S_ISSOCK(mode)) return "it is a socket";
  return "it is a device";
}

}  // namespace moe::detail

#endif
