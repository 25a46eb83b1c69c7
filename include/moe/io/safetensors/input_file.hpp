#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <string>
#include <system_error>

#include "moe/io/safetensors/messages.hpp"
#include "moe/io/safetensors/posix.hpp"

#if MOE_HAS_POSIX_FILES
#include <fcntl.h>
#endif

/// \file
/// A file that is opened once and read from at any place, by several threads at once too.

namespace moe::detail {

/// With what the standard library has.
class PortableInputFile {
 public:
  explicit PortableInputFile(const std::string& path) : path_(path) {
    const std::filesystem::file_status status = std::filesystem::status(path);
    require_file(!std::filesystem::exists(status) || std::filesystem::is_regular_file(status), path,
                 "cannot be read: it is no regular file");
    errno = 0;
    file_.open(path, std::ios::binary | std::ios::ate);
    if (!file_.is_open()) fail_errno(path, "cannot be read", errno);
    size_ = static_cast<std::uint64_t>(std::max<std::streamoff>(0, file_.tellg()));
  }

  /// Bytes that it had when it was opened.
  std::uint64_t size() const { return size_; }

  void read(std::uint64_t offset, void* to, std::size_t size) const {
    const std::lock_guard lock(mutex_);
    file_.clear();
    file_.seekg(static_cast<std::streamoff>(offset));
    file_.read(static_cast<char*>(to), static_cast<std::streamsize>(size));
    require_file(file_.good(), path_, "cannot be read any more: it ends too early");
  }

 private:
  std::string path_;
  mutable std::mutex mutex_;
  mutable std::ifstream file_;
  std::uint64_t size_ = 0;
};

#if MOE_HAS_POSIX_FILES

class PosixInputFile {
 public:
  explicit PosixInputFile(const std::string& path) : path_(path) {
    // Opening a FIFO would wait for a writer otherwise.
    file_ = Descriptor(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
    const int error = errno;
    struct stat status {};
    const int found = file_.is_open() ? ::fstat(file_.number(), &status)  // a socket does not open
                                      : ::stat(path.c_str(), &status);
    if (found == 0 && !S_ISREG(status.st_mode)) {
      fail_file(path, "cannot be read: ", irregular_kind(status.st_mode));
    }
    if (!file_.is_open() || found != 0) fail_errno(path, "cannot be read", error);
    size_ = static_cast<std::uint64_t>(status.st_size);
  }

  /// Bytes that it had when it was opened.
  std::uint64_t size() const { return size_; }

  void read(std::uint64_t offset, void* to, std::size_t size) const {
    auto* next = static_cast<std::byte*>(to);
    while (size > 0) {
      const ssize_t count = ::pread(file_.number(), next, size, static_cast<off_t>(offset));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail_errno(path_, "cannot be read any more", errno);
      require_file(count > 0, path_, "cannot be read any more: it ends at byte ", offset);
      next += count;
      offset += static_cast<std::uint64_t>(count);
      size -= static_cast<std::size_t>(count);
    }
  }

 private:
  std::string path_;
  Descriptor file_;
  std::uint64_t size_ = 0;
};
using InputFile = PosixInputFile;

#else
using InputFile = PortableInputFile;
#endif

}  // namespace moe::detail
