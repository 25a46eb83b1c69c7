#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "moe/io/safetensors/messages.hpp"
#include "moe/io/safetensors/posix.hpp"

#if MOE_HAS_POSIX_FILES
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#endif

/// \file
/// A file that appears at its path whole or not at all: a temporary file in the same folder is written,
/// flushed to the disk and then renamed. If anything fails before, the temporary is removed and the old
/// file is unchanged; after the rename nothing can fail. Only a regular file is replaced, not a directory,
/// a device, a FIFO or a socket, nor a symbolic link to one of these; another link is replaced by the file
/// and not followed.

namespace moe::detail {

inline constexpr std::string_view not_written = "cannot be written";

/// Uses only the standard library, which cannot flush a file to the disk.
class PortableAtomicFile {
 public:
  explicit PortableAtomicFile(const std::string& path)
      : path_(path), temporary_(path + ".moe-part") {
    std::error_code error;
    const std::filesystem::file_status old = std::filesystem::status(path_, error);
    require_file(!std::filesystem::exists(old) || std::filesystem::is_regular_file(old), path,
                 not_written, ": it is not a regular file");
    errno = 0;
    file_.reset(std::fopen(temporary_.string().c_str(), "wb"));
    if (file_ == nullptr) fail_errno(path, not_written, errno);
  }
  PortableAtomicFile(const PortableAtomicFile&) = delete;
  PortableAtomicFile& operator=(const PortableAtomicFile&) = delete;
  ~PortableAtomicFile() {
    if (is_committed_) return;
    file_.reset();
    std::error_code error;
    std::filesystem::remove(temporary_, error);
  }

  void write(const void* data, std::size_t size) {
    check(size == 0 || std::fwrite(data, 1, size, file_.get()) == size);
  }

  void commit() {
    check(std::fclose(file_.release()) == 0);
    std::error_code error;
    std::filesystem::rename(temporary_, path_, error);
    if (error) fail_file(path_.string(), not_written, ": ", error.message());
    is_committed_ = true;
  }

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };

  void check(bool succeeded) {
    if (!succeeded) fail_errno(path_.string(), not_written, errno);
  }

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  std::unique_ptr<std::FILE, Close> file_;
  bool is_committed_ = false;
};

#if MOE_HAS_POSIX_FILES

/// The temporary is locked as long as the process that writes it lives: a temporary that can be
/// locked was left by a process that was killed, and the next save to the same path removes it. The
/// new file gets the permissions of the file it replaces, and its owner and group if the system
/// permits that.
class PosixAtomicFile {
 public:
  explicit PosixAtomicFile(const std::string& path) : path_(path) {
    const std::size_t slash = path.rfind('/');
    folder_ = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    prefix_ = path.substr(slash == std::string::npos ? 0 : slash + 1) + ".moe-part-";
    replaces_ = ::stat(path.c_str(), &old_) == 0;
    if (!replaces_ && errno != ENOENT) fail_errno(path, not_written, errno);
    if (replaces_ && !S_ISREG(old_.st_mode)) {
      fail_file(path, not_written, ": ", irregular_kind(old_.st_mode));
    }
    remove_abandoned();
    create();
  }
  PosixAtomicFile(const PosixAtomicFile&) = delete;
  PosixAtomicFile& operator=(const PosixAtomicFile&) = delete;
  ~PosixAtomicFile() {
    if (file_.is_open()) ::unlink(temporary_.c_str());
  }

  void write(const void* data, std::size_t size) {
    const auto* next = static_cast<const std::byte*>(data);
    while (size > 0) {
      const std::size_t count = std::min(size, buffer_size - buffered_);
      // Data larger than the buffer need not be copied.
      if (buffered_ == 0 && size >= buffer_size) return write_through(next, size);
      std::memcpy(buffer_.get() + buffered_, next, count);
      buffered_ += count;
      next += count;
      size -= count;
      if (buffered_ == buffer_size) flush();
    }
  }

  void commit() {
    flush();
    if (replaces_) keep_owner();
    check(::fsync(file_.number()) == 0);
    check(::rename(temporary_.c_str(), path_.c_str()) == 0);
    file_ = Descriptor();
    // The rename survives a power failure only if the folder is flushed too. Not every file system can do
    // that, and the file is whole either way.
    const Descriptor folder(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (folder.is_open()) ::fsync(folder.number());
  }

 private:
  static constexpr std::size_t buffer_size = 1 << 16;
  static constexpr mode_t permissions = 0777;

  /// Locks a file for this process alone. On a file system without locks this fails, so no file counts as
  /// abandoned there.
  static bool lock(int file) { return ::flock(file, LOCK_EX | LOCK_NB) == 0; }

  bool is_temporary(std::string_view name) const {
    if (!name.starts_with(prefix_)) return false;
    name.remove_prefix(prefix_.size());
    const auto digits = [&] {
      const std::size_t count = std::min(name.size(), name.find_first_not_of("0123456789"));
      name.remove_prefix(count);
      return count > 0;
    };
    if (!digits() || !name.starts_with('-')) return false;
    name.remove_prefix(1);
    return digits() && name.empty();
  }

  /// Removes abandoned temporaries; those that cannot be opened stay.
  void remove_abandoned() const {
    struct Close {
      void operator()(DIR* folder) const { ::closedir(folder); }
    };
    const std::unique_ptr<DIR, Close> folder(::opendir(folder_.c_str()));
    if (folder == nullptr) return;
    const int at = ::dirfd(folder.get());
    while (const dirent* entry = ::readdir(folder.get())) {
      if (!is_temporary(entry->d_name)) continue;
      const Descriptor file(
          ::openat(at, entry->d_name, O_RDWR | O_NONBLOCK | O_NOFOLLOW | O_NOCTTY | O_CLOEXEC));
      struct stat opened {};
      struct stat named {};
      // Before it was locked, the process that wrote it may have renamed it: then it is a finished
      // file.
      if (file.is_open() && ::fstat(file.number(), &opened) == 0 && S_ISREG(opened.st_mode) &&
          lock(file.number()) && ::fstatat(at, entry->d_name, &named, AT_SYMLINK_NOFOLLOW) == 0 &&
          named.st_dev == opened.st_dev && named.st_ino == opened.st_ino) {
        ::unlinkat(at, entry->d_name, 0);
      }
    }
  }

  void create() {
    buffer_ = std::make_unique<std::byte[]>(buffer_size);
    // If the old file is private, the temporary must be so too.
    const mode_t mode = replaces_ ? 0600 : 0666;
    for (int attempt = 0;; ++attempt) {
      temporary_ = (folder_ == "." ? "" : folder_) + prefix_ + std::to_string(::getpid()) + '-' +
                   std::to_string(attempt);
      Descriptor file(::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode));
      if (!file.is_open()) {
        if (errno == EEXIST && attempt < 1000) continue;
        fail_errno(path_, not_written, errno);
      }
      // Until it is locked, another process may take it for abandoned and remove it.
      const bool is_taken = !lock(file.number()) && errno == EWOULDBLOCK;
      struct stat status {};
      if (is_taken || (::fstat(file.number(), &status) == 0 && status.st_nlink == 0)) continue;
      file_ = std::move(file);
      return;
    }
  }

  void keep_owner() {
    struct stat status {};
    check(::fstat(file_.number(), &status) == 0);
    // Permissions first: after a change of owner this process may not change them.
    if ((status.st_mode & permissions) != (old_.st_mode & permissions)) {
      check(::fchmod(file_.number(), old_.st_mode & permissions) == 0);
    }
    if (status.st_uid == old_.st_uid && status.st_gid == old_.st_gid) return;
    if (::fchown(file_.number(), old_.st_uid, old_.st_gid) == 0) return;
    [[maybe_unused]] const int refused =
        ::fchown(file_.number(), static_cast<uid_t>(-1), old_.st_gid);
  }

  void flush() { write_through(buffer_.get(), std::exchange(buffered_, 0)); }

  void write_through(const std::byte* data, std::size_t size) {
    while (size > 0) {
      const ssize_t count = ::write(file_.number(), data, size);
      if (count < 0 && errno == EINTR) continue;
      check(count >= 0);
      data += count;
      size -= static_cast<std::size_t>(count);
    }
  }

  void check(bool succeeded) const {
    if (!succeeded) fail_errno(path_, not_written, errno);
  }

  std::string path_;
  std::string folder_;
  std::string prefix_;  // of the names of temporaries
  bool replaces_ = false;
  struct stat old_ {};
  std::string temporary_;
  Descriptor file_;
  std::unique_ptr<std::byte[]> buffer_;
  std::size_t buffered_ = 0;
};
using AtomicFile = PosixAtomicFile;

#else
using AtomicFile = PortableAtomicFile;
#endif

}  // namespace moe::detail
