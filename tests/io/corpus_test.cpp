// The files that the fuzzer starts from, each named after what is special about it.

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

#include "../catch.hpp"
#include "moe/io/safetensors.hpp"

using namespace moe;

namespace {

namespace fs = std::filesystem;
const fs::path corpus(MOE_TEST_CORPUS);

template <class Check>
void for_each_file(const std::string& kind, std::size_t least, Check&& check) {
  std::size_t count = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(corpus / kind)) {
    INFO(entry.path().filename().string());
    check(entry.path().string());
    ++count;
  }
  CHECK(count >= least);
}

}  // namespace

TEST_CASE("corpus: what others write is read", "[io]") {
  int ones = 0;
  for_each_file("read", 20, [&](const std::string& path) {
    const SafetensorsFile file(path);
    // Most have a tensor "a" that is 1, wherever it lies.
    if (file.tensors().count("a") == 0 || file.tensors().at("a").type != "F32") return;
    if (file.tensors().at("a").shape != std::vector<std::uint64_t>{1, 1}) return;
    Matrix<float> one(1, 1);
    file.read("a", one);
    CHECK(one(0, 0) == 1);
    ++ones;
  });
  CHECK(ones == 14);
}

TEST_CASE("corpus: what is not in order is refused", "[io]") {
  for_each_file("refused", 60, [](const std::string& path) {
    CHECK_THROWS_AS(SafetensorsFile(path), std::runtime_error);
  });
}

TEST_CASE("safetensors: one tensor of an unknown type does not keep the others from being read",
          "[io]") {
  const SafetensorsFile file((corpus / "read" / "dtype_unknown").string());
  CHECK(file.tensors().at("u").type == "F31");
  CHECK(file.tensors().at("u").end == 7);
  CHECK_THROWS_WITH(file.check("u", Matrix<float>(1, 3)),
                    Catch::Matchers::Contains("tensor \"u\" is F31, must be F32"));
  const SafetensorsFile metadata((corpus / "read" / "metadata_null").string());
  CHECK(metadata.metadata().empty());
  CHECK(metadata.tensors().count("a") == 1);
}
