#include "moe/io/safetensors/input_file.hpp"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "../catch.hpp"
#include "../temporary_folder.hpp"

using namespace moe;
using Catch::Matchers::Contains;

namespace fs = std::filesystem;

TEMPLATE_TEST_CASE("input file: why it cannot be read", "[io]", detail::PortableInputFile,
                   detail::PosixInputFile) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const bool says_which = std::is_same_v<TestType, detail::PosixInputFile>;
  const auto fails = [&](const std::string& why) {
    CHECK_THROWS_WITH((TestType(path)), Contains("a: cannot be read: " + why));
    CHECK_THROWS_AS((TestType(path)), std::runtime_error);
  };
  const auto is_no_file = [&](const std::string& what) {
    fails("it is " + (says_which ? what : std::string("not a regular file")));
    fs::remove(path);
  };
  fails("No such file or directory");
  fs::create_directory(path);
  is_no_file("a directory");
  REQUIRE(::mkfifo(path.c_str(), 0666) == 0);
  is_no_file("a FIFO");  // at once, without waiting for a writer
  fs::create_symlink("/dev/zero", path);
  is_no_file("a device");
  const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  REQUIRE(path.size() < sizeof(address.sun_path));
  std::memcpy(address.sun_path, path.c_str(), path.size());
  REQUIRE(::bind(socket, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0);
  is_no_file("a socket");
  ::close(socket);

  std::ofstream(path) << "x";
  REQUIRE(::chmod(path.c_str(), 0) == 0);
  const uid_t user = ::geteuid();
  if (user == 0) {  // to whom nothing is forbidden
    REQUIRE(::chmod(fs::path(path).parent_path().c_str(), 0755) == 0);
    REQUIRE(::seteuid(65534) == 0);
  }
  fails("Permission denied");
  if (user == 0) REQUIRE(::seteuid(user) == 0);
}

TEMPLATE_TEST_CASE("input file: any part of it, from the file that was opened", "[io]",
                   detail::PortableInputFile, detail::PosixInputFile) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  std::string text(300'000, '\0');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * i % 251);
  std::ofstream(path, std::ios::binary) << text;
  const TestType file(path);
  REQUIRE(file.size() == text.size());
  // Another file takes its name.
  std::ofstream(folder.file("b"), std::ios::binary) << std::string(text.size(), 'x');
  fs::rename(folder.file("b"), path);
  const auto part = [&](std::size_t begin, std::size_t size) {
    std::string read(size, '\0');
    file.read(begin, read.data(), size);
    return read;
  };
  CHECK(part(0, text.size()) == text);
  CHECK(part(299'999, 1) == text.substr(299'999));
  CHECK(part(17, 0) == "");
  std::vector<int> right(4, 0);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < right.size(); ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < 100; ++i) {
        const std::size_t begin = (i * 2999 + t * 71) % 200'000;
        right[t] += part(begin, 5000) == text.substr(begin, 5000);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == std::vector<int>(4, 100));
}

TEMPLATE_TEST_CASE("input file: one that shrinks", "[io]", detail::PortableInputFile,
                   detail::PosixInputFile) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  std::ofstream(path) << std::string(100'000, 'x');
  const TestType file(path);
  fs::resize_file(path, 50'000);
  std::string read(60'000, '\0');
  CHECK_THROWS_WITH(file.read(0, read.data(), read.size()), Contains("cannot be read any more"));
  CHECK_THROWS_WITH(file.read(70'000, read.data(), 1), Contains("cannot be read any more"));
  file.read(49'999, read.data(), 1);
  CHECK(read[0] == 'x');
}
