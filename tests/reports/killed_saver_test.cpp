// Report: processes that were killed while they saved left 238 temporary files after 320 kills.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "../catch.hpp"
#include "../temporary_folder.hpp"
#include "moe/io/safetensors/atomic_file.hpp"

using namespace moe;

namespace {

/// Saves a file all of whose bytes are the same.
void save(const std::string& path, char c) {
  const std::string text(1 << 20, c);
  detail::AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

bool is_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  return text.size() == 1 << 20 && std::count(text.begin(), text.end(), text[0]) == 1 << 20;
}

}  // namespace

TEST_CASE("report: killed savers leave a whole file, and the next one removes the rest",
          "[reports]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("checkpoint");
  save(path, 'a');
  for (int kill = 0; kill < 40; ++kill) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (char c = 'a';; c = c == 'z' ? 'a' : static_cast<char>(c + 1)) save(path, c);
    }
    REQUIRE(child > 0);
    std::this_thread::sleep_for(std::chrono::microseconds(500 * kill));
    REQUIRE(::kill(child, SIGKILL) == 0);
    REQUIRE(::waitpid(child, nullptr, 0) == child);
    CHECK(is_whole(path));
    CHECK(folder.files().size() <= 2);  // each saver removes what the one before it left
  }
  save(path, 'a');
  CHECK(folder.files() == std::vector<std::string>{"checkpoint"});
}
