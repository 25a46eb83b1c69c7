#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>

#include "moe/io/safetensors/messages.hpp"
#include "moe/io/safetensors/posix.hpp"

#if MOE_HAS_POSIX_FILES
#include <fcntl.h>
#include <sys/mman.h>
#endif

/// \file
/// A file that is opened once and read at any offset, also by several threads at once.

namespace moe::detail {

/// Uses only the standard library.
class PortableInputFile {
 public:
  explicit PortableInputFile(const std::string& path) : path_(path) {
    const std::filesystem::file_status status = std::filesystem::status(path);
    require_file(!std::filesystem::exists(status) || std::filesystem::is_regular_file(status), path,
                 "cannot be read: it is not a regular file");
    errno = 0;
    file_.open(path, std::ios::binary | std::ios::ate);
    if (!file_.is_open()) fail_errno(path, "cannot be read", errno);
    size_ = static_cast<std::uint64_t>(std::max<std::streamoff>(0, file_.tellg()));
  }

  /// The number of bytes of the file when it was opened.
  std::uint64_t size() const { return size_; }

  void read(std::uint64_t offset, void* to, std::size_t size) const {
    const std::lock_guard lock(mutex_);
    file_.clear();
    file_.seekg(static_cast<std::streamoff>(offset));
    file_.read(static_cast<char*>(to), static_cast<std::streamsize>(size));
    require_file(file_.good(), path_, "cannot be read any more: it ends too early");
  }

  /// Files are not mapped here.
  std::shared_ptr<const std::byte> map() const { return nullptr; }
  void check_unchanged() const {}

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
    changed_ = time_of_change(status);
  }

  /// The number of bytes of the file when it was opened.
  std::uint64_t size() const { return size_; }

  /// The whole file as memory that is only read; null if the system cannot map it. Later changes of the file
  /// are visible, and access to a part that was cut off ends the program by a signal: call
  /// check_unchanged() before.
  std::shared_ptr<const std::byte> map() const {
    const std::size_t size = size_;
    void* const memory = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file_.number(), 0);
    if (memory == MAP_FAILED) return nullptr;
    return {static_cast<const std::byte*>(memory),
            [size](const std::byte* mapped) { ::munmap(const_cast<std::byte*>(mapped), size); }};
  }

  /// Throws std::runtime_error if the file has another size than when it was opened, or was written to.
  void check_unchanged() const {
    struct stat status {};
    if (::fstat(file_.number(), &status) != 0) fail_errno(path_, "cannot be read any more", errno);
    require_file(static_cast<std::uint64_t>(status.st_size) == size_, path_,
                 "was changed while it is in use: it had ", size_, " bytes and has ",
                 static_cast<std::uint64_t>(status.st_size));
    require_file(time_of_change(status) == changed_, path_,
                 "was changed while it is in use: it was written to");
  }

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
  /// The time of the last change of the file, in nanoseconds.
  static std::int64_t time_of_change(const struct stat& status) {
#if defined(__APPLE__)
    const auto& time = status.st_mtimespec;
#else
    const auto& time = status.st_mtim;
#endif
    return std::int64_t{1'000'000'000} * time.tv_sec + time.tv_nsec;
  }

  std::string path_;
  Descriptor file_;
  std::uint64_t size_ = 0;
  std::int64_t changed_ = 0;
};
using InputFile = PosixInputFile;

#else
using InputFile = PortableInputFile;
#endif

}  // namespace moe::detail
