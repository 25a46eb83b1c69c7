#include "moe/io/safetensors/atomic_file.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../temporary_folder.hpp"

using namespace moe;
using Catch::Matchers::Contains;

namespace {

namespace fs = std::filesystem;

std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void make_file(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

template <class AtomicFile = detail::AtomicFile>
void save(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

struct stat status_of(const std::string& path) {
  struct stat status {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  return status;
}

/// A disk that is full: no file may have more than `size` bytes.
class FullDisk {
 public:
  explicit FullDisk(rlim_t size) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    REQUIRE(getrlimit(RLIMIT_FSIZE, &limit_) == 0);
    rlimit full = limit_;
    full.rlim_cur = size;
    REQUIRE(setrlimit(RLIMIT_FSIZE, &full) == 0);
  }
  FullDisk(const FullDisk&) = delete;
  FullDisk& operator=(const FullDisk&) = delete;
  ~FullDisk() {
    setrlimit(RLIMIT_FSIZE, &limit_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit limit_{};
  void (*handler_)(int);
};

/// To root no file is forbidden, so tests of that are not root for a while.
class NotRoot {
 public:
  NotRoot() : user_(::geteuid()) {
    if (user_ == 0) REQUIRE(::seteuid(65534) == 0);
  }
  NotRoot(const NotRoot&) = delete;
  NotRoot& operator=(const NotRoot&) = delete;
  ~NotRoot() {
    if (user_ == 0) CHECK(::seteuid(user_) == 0);
  }

 private:
  uid_t user_;
};

}  // namespace

TEMPLATE_TEST_CASE("atomic file: all that was written, in its order", "[io]",
                   detail::PortableAtomicFile, detail::PosixAtomicFile) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  std::string expected;
  {
    TestType file(path);
    // Pieces below, at and above the size of any buffer.
    for (const std::size_t size :
         {1u, 5u, 65535u, 65536u, 65537u, 3u, 200000u, 0u, 60000u, 7000u}) {
      std::string piece(size, '\0');
      for (char& c : piece) c = static_cast<char>(expected.size() % 251 + size % 7);
      file.write(piece.data(), piece.size());
      expected += piece;
      CHECK_FALSE(fs::exists(path));
    }
    file.commit();
  }
  CHECK(read_all(path) == expected);
  CHECK(folder.files() == std::vector<std::string>{"a"});
}

TEMPLATE_TEST_CASE("atomic file: without commit() the old file stays", "[io]",
                   detail::PortableAtomicFile, detail::PosixAtomicFile) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  make_file(path, "old");
  {
    TestType file(path);
    file.write("new", 3);
  }
  CHECK(read_all(path) == "old");
  CHECK(folder.files() == std::vector<std::string>{"a"});
}

TEMPLATE_TEST_CASE("atomic file: a disk that is full", "[io]", detail::PortableAtomicFile,
                   detail::PosixAtomicFile) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  make_file(path, "old");
  // Found while the buffer takes all, when it is flushed on the way, or past it.
  for (const std::size_t written : {100u, 200'000u, 2'000'000u}) {
    for (const std::size_t piece : {std::size_t{50}, written}) {
      const std::string text(piece, 'x');
      std::string message = "was written";
      {
        const FullDisk full(64);
        try {
          TestType file(path);
          for (std::size_t done = 0; done < written; done += piece) file.write(text.data(), piece);
          file.commit();
        } catch (const std::runtime_error& error) {
          message = error.what();
        }
      }
      CHECK_THAT(message, Contains("a: cannot be written: File too large"));
      CHECK(read_all(path) == "old");
      CHECK(folder.files() == std::vector<std::string>{"a"});
    }
  }
}

TEMPLATE_TEST_CASE("atomic file: what is no file is not replaced", "[io]",
                   detail::PortableAtomicFile, detail::PosixAtomicFile) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const bool says_which = std::is_same_v<TestType, detail::PosixAtomicFile>;
  const auto fails = [&](const std::string& what) {
    CHECK_THROWS_WITH(save<TestType>(path, "new"),
                      Contains("a: cannot be written: it is " +
                               (says_which ? what : std::string("not a regular file"))));
    CHECK(folder.files() == std::vector<std::string>{"a"});
  };
  fs::create_directory(path);
  fails("a directory");
  fs::remove(path);

  REQUIRE(::mkfifo(path.c_str(), 0666) == 0);
  fails("a FIFO");
  CHECK(fs::is_fifo(path));
  fs::remove(path);

  fs::create_symlink("/dev/null", path);  // were it broken, the link alone would be lost
  fails("a device");
  CHECK(fs::is_symlink(path));
}

TEMPLATE_TEST_CASE("atomic file: a symbolic link to a file is replaced, not followed", "[io]",
                   detail::PortableAtomicFile, detail::PosixAtomicFile) {
  const test::TemporaryFolder folder;
  make_file(folder.file("target"), "old");
  fs::create_symlink("target", folder.file("a"));
  save<TestType>(folder.file("a"), "new");
  CHECK(read_all(folder.file("a")) == "new");
  CHECK_FALSE(fs::is_symlink(folder.file("a")));
  CHECK(read_all(folder.file("target")) == "old");
}

TEMPLATE_TEST_CASE("atomic file: why it cannot be written", "[io]", detail::PortableAtomicFile,
                   detail::PosixAtomicFile) {
  const test::TemporaryFolder folder;
  CHECK_THROWS_WITH(TestType(folder.file("no/such/folder/a")),
                    Contains("cannot be written: No such file or directory"));
  make_file(folder.file("file"), "");
  CHECK_THROWS_WITH(TestType(folder.file("file/a")),
                    Contains("cannot be written: Not a directory"));
  const NotRoot not_root;
  CHECK_THROWS_WITH(TestType("/moe-test"), Contains("cannot be written: Permission denied"));
}

TEST_CASE("atomic file: the mode and the owner of the file that is replaced", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const mode_t umask = ::umask(022);
  save(path, "new");
  CHECK((status_of(path).st_mode & 07777) == 0644);
  for (const mode_t mode : {0600u, 0640u, 0666u, 0755u, 0400u}) {
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    save(path, "newer");
    CHECK((status_of(path).st_mode & 07777) == mode);
  }
  ::umask(umask);
  if (::geteuid() == 0) {
    REQUIRE(::chown(path.c_str(), 12345, 54321) == 0);
    save(path, "newest");
    CHECK(status_of(path).st_uid == 12345);
    CHECK(status_of(path).st_gid == 54321);
  }
}

TEST_CASE("atomic file: someone else's file is replaced where its owner cannot be kept", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  make_file(path, "old");
  REQUIRE(::chmod(path.c_str(), 0604) == 0);
  REQUIRE(::chmod(fs::path(path).parent_path().c_str(), 0777) == 0);
  const NotRoot not_root;
  save(path, "new");
  CHECK(read_all(path) == "new");
  CHECK(status_of(path).st_uid == ::geteuid());
  CHECK((status_of(path).st_mode & 07777) == 0604);
}

TEST_CASE("atomic file: what killed savers left is removed, and nothing else", "[io]") {
  const test::TemporaryFolder folder;
  std::vector<std::string> stay{"a",
                                "b.moe-part-1-0",
                                "a.moe-part-",
                                "a.moe-part-1",
                                "a.moe-part-1-",
                                "a.moe-part-1-x",
                                "a.moe-part-1-0x",
                                "xa.moe-part-1-0",
                                "a.moe-part-x-0"};
  for (const std::string& name : stay) make_file(folder.file(name), "");
  for (const char* name : {"a.moe-part-1-0", "a.moe-part-1234-5", "a.moe-part-99999999-1000"}) {
    make_file(folder.file(name), "half a checkpoi");
  }
  fs::create_directory(folder.file("a.moe-part-3-0"));
  fs::create_symlink("b", folder.file("a.moe-part-4-0"));
  // One that a living process has locked.
  make_file(folder.file("a.moe-part-2-0"), "");
  const int held = ::open(folder.file("a.moe-part-2-0").c_str(), O_RDWR);
  REQUIRE(::flock(held, LOCK_EX | LOCK_NB) == 0);
  for (const char* name : {"a.moe-part-2-0", "a.moe-part-3-0", "a.moe-part-4-0"}) {
    stay.push_back(name);
  }
  save(folder.file("a"), "new");
  std::vector<std::string> files = folder.files();
  std::sort(files.begin(), files.end());
  std::sort(stay.begin(), stay.end());
  CHECK(files == stay);

  ::close(held);
  save(folder.file("a"), "newer");
  CHECK_FALSE(fs::exists(folder.file("a.moe-part-2-0")));
}

TEST_CASE("atomic file: two savers of one path at once", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  detail::AtomicFile first(path);
  first.write("first", 5);
  detail::AtomicFile second(path);
  second.write("second", 6);
  CHECK(folder.files().size() == 2);
  second.commit();
  CHECK(read_all(path) == "second");
  first.commit();
  CHECK(read_all(path) == "first");
  CHECK(folder.files() == std::vector<std::string>{"a"});
}

TEST_CASE("atomic file: a path without a folder is in the present one", "[io]") {
  const test::TemporaryFolder folder;
  const fs::path before = fs::current_path();
  fs::current_path(fs::path(folder.file("a")).parent_path());
  make_file("a.moe-part-1-0", "");
  save("a", "new");
  fs::current_path(before);
  CHECK(read_all(folder.file("a")) == "new");
  CHECK(folder.files() == std::vector<std::string>{"a"});
}
