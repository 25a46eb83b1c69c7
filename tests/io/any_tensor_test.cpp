#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "files.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/nn/linear.hpp"
#include "moe/nn/rms_norm.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;

// Tensors that are read without knowing what they are, and the types of other people's files.

namespace {

/// A file of one tensor, "t", by its bytes.
SafetensorsFile one_tensor(const TemporaryFolder& folder, const std::string& type,
                           const std::string& shape, const std::string& bytes) {
  const std::string path = folder.file(type);
  write_file(path,
             R"({"t":{"dtype":")" + type + R"(","shape":)" + shape + R"(,"data_offsets":[0,)" +
                 std::to_string(bytes.size()) + "]}}",
             bytes);
  return SafetensorsFile(path);
}

}  // namespace

TEST_CASE("safetensors: numbers of 8 to 64 bits are widened", "[io]") {
  const TemporaryFolder folder;
  const std::string halves("\x00\x3c\x00\xc0\x01\x00\xff\x7b\x00\x7c", 10);
  const Matrix<double> half = one_tensor(folder, "F16", "[5]", halves).matrix<double>("t");
  CHECK(half.rows() == 1);
  CHECK(half(0, 0) == 1);
  CHECK(half(0, 1) == -2);
  CHECK(half(0, 2) == std::ldexp(1.0, -24));
  CHECK(half(0, 3) == 65504);
  CHECK(half(0, 4) == std::numeric_limits<double>::infinity());

  const std::string brain("\x80\x3f\x00\xc0\x01\x00\x7f\x7f", 8);
  const Matrix<double> bfloat = one_tensor(folder, "BF16", "[2,2]", brain).matrix<double>("t");
  CHECK(bfloat(0, 0) == 1);
  CHECK(bfloat(0, 1) == -2);
  CHECK(bfloat(1, 0) == std::ldexp(1.0, -133));
  CHECK(bfloat(1, 1) == std::ldexp(255.0, 120));

  const std::string eight("\x00\x01\x07\x08\x38\x3c\x7e\xfe\x81\x7f\xff", 11);
  const Matrix<float> e4m3 = one_tensor(folder, "F8_E4M3", "[11]", eight).matrix<float>("t");
  const float expected[] = {0, 1.0f / 512, 7.0f / 512, 1.0f / 64, 1, 1.5, 448, -448, -1.0f / 512};
  for (Index i = 0; i < 9; ++i) CHECK(e4m3(0, i) == expected[i]);
  CHECK(std::isnan(e4m3(0, 9)));
  CHECK(std::isnan(e4m3(0, 10)));

  const std::string single("\x00\x00\x80\x3f\x00\x00\x00\xc0", 8);
  CHECK(one_tensor(folder, "F32", "[2]", single).matrix<double>("t")(0, 1) == -2);
  const std::string whole("\x00\x00\x00\x00\x00\x00\xf0\x3f", 8);
  CHECK(one_tensor(folder, "F64", "[]", whole).matrix<float>("t")(0, 0) == 1);
}

TEST_CASE("safetensors: every code of F8_E4M3 by its formula", "[io]") {
  for (int code = 0; code < 256; ++code) {
    if ((code & 127) == 127) continue;
    const int exponent = (code % 128) / 8;
    const double mantissa = code % 8 / 8.0;
    const double size =
        exponent == 0 ? std::ldexp(mantissa, -6) : std::ldexp(1 + mantissa, exponent - 7);
    const auto value = static_cast<double>(detail::e4m3_values[static_cast<std::size_t>(code)]);
    CHECK(value == (code < 128 ? size : -size));
  }
  CHECK(detail::e8m0_values[127] == 1);
  CHECK(detail::e8m0_values[130] == 8);
  CHECK(static_cast<double>(detail::e8m0_values[0]) == std::ldexp(1.0, -127));
  CHECK(static_cast<double>(detail::e8m0_values[254]) == std::ldexp(1.0, 127));
  CHECK(std::isnan(detail::e8m0_values[255]));
}

TEST_CASE("safetensors: a tensor of any shape is a matrix, comes in blocks or in part", "[io]") {
  const TemporaryFolder folder;
  const Matrix<float> numbers = random_matrix<float>(3 * 7, 1000, 1);
  SafetensorsWriter writer;
  writer.add_made<float>("t", {3, 7, 1000}, [&] { return numbers; });
  writer.add_made<float>("none", {0, 5}, [] { return Matrix<float>(); });
  writer.write(folder.file("a"));
  const SafetensorsFile file(folder.file("a"));
  CHECK(file.tensor("t").shape == std::vector<std::uint64_t>{3, 7, 1000});
  CHECK(same_bits(file.matrix<float>("t"), numbers));
  CHECK(file.matrix<double>("t") == numbers.cast<double>());
  CHECK(file.matrix<float>("none").rows() == 0);
  CHECK(file.matrix<float>("none").cols() == 5);

  std::vector<double> collected;
  std::size_t largest = 0;
  file.for_each_block<double>("t", [&](std::uint64_t first, std::span<const double> block) {
    CHECK(first == collected.size());
    collected.insert(collected.end(), block.begin(), block.end());
    largest = std::max(largest, block.size());
  });
  CHECK(largest == 16384);
  CHECK(Eigen::Map<const Matrix<double>>(collected.data(), 21, 1000) == numbers.cast<double>());
  file.for_each_block<float>("none", [](std::uint64_t, std::span<const float>) { CHECK(false); });

  std::vector<float> part(3);
  file.read_range<float>("t", 20998, std::span<float>(part).first(2));
  CHECK(part[1] == numbers(20, 999));
  file.read_range<float>("t", 1000, std::span<float>(part));
  CHECK(part[2] == numbers(1, 2));
  CHECK_THROWS_WITH(file.read_range<float>("t", 20998, std::span<float>(part)),
                    Contains("numbers 20998 to 21001 of tensor \"t\", which has 21000"));
  std::vector<std::byte> bytes(5);
  CHECK_THROWS_WITH(file.read_bytes("t", 83996, bytes),
                    Contains("bytes 83996 to 84001 of tensor \"t\", which has 84000"));
}

TEST_CASE("safetensors: a mapped tensor is read where it is, and outlives its file", "[io]") {
  const TemporaryFolder folder;
  const Matrix<float> numbers = random_matrix<float>(3 * 7, 10, 1);
  SafetensorsWriter writer;
  writer.add_made<float>("t", {3, 7, 10}, [&] { return numbers; });
  writer.add_made<double>("vector", {2}, [] { return Matrix<double>{{1, -2}}; });
  writer.add_made<float>("none", {0, 5}, [] { return Matrix<float>(); });
  const Matrix<Eigen::half> half{{Eigen::half(1.f)}, {Eigen::half(-2.f)}};
  writer.add("half", half);
  const Matrix<Eigen::bfloat16> brain{{Eigen::bfloat16(1.f), Eigen::bfloat16(-2.f)}};
  writer.add("brain", brain);
  writer.write(folder.file("a"));

  auto file = std::make_unique<SafetensorsFile>(folder.file("a"));
  if (!file->map()) {
    CHECK_THROWS_WITH(file->mapped_matrix<float>("t"), Contains("cannot be mapped"));
    return;
  }
  const MappedMatrix<double> vector = file->mapped_matrix<double>("vector");
  CHECK(vector.rows() == 1);
  CHECK(vector.cols() == 2);
  CHECK(vector.view()(0, 1) == -2);
  CHECK(file->tensor("half").type == "F16");
  CHECK(file->mapped_matrix<Eigen::half>("half").view() == half);
  CHECK(file->matrix<float>("half")(1, 0) == -2);
  CHECK(file->tensor("brain").type == "BF16");
  CHECK(file->mapped_matrix<Eigen::bfloat16>("brain").view() == brain);
  CHECK(file->matrix<float>("brain")(0, 1) == -2);
  const MappedMatrix<float> none = file->mapped_matrix<float>("none");
  CHECK(none.rows() == 0);
  CHECK(none.cols() == 5);
  auto first = std::make_unique<MappedMatrix<float>>(file->mapped_matrix<float>("t"));
  const MappedMatrix<float> mapped = *first;
  CHECK(mapped.view().data() == first->view().data());
  MappedMatrix<float> assigned = none;
  assigned = *first;
  first.reset();
  file.reset();
  CHECK(assigned.view() == numbers);
  CHECK(mapped.view() == numbers);
}

TEST_CASE("safetensors: what cannot be mapped as it is, is refused by name", "[io]") {
  const TemporaryFolder folder;
  std::string header = R"({"byte":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                       R"("odd":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})";
  header.append((4 - header.size() % 4) % 4,
                ' ');  // so that "odd" begins one byte behind a multiple of 4
  write_file(folder.file("a"), header, std::string("\x07\x00\x00\x80\x3f", 5));
  const SafetensorsFile file(folder.file("a"));
  CHECK_THROWS_WITH(file.mapped_matrix<double>("odd"),
                    Contains("tensor \"odd\" is F32, must be F64"));
  CHECK_THROWS_WITH(file.mapped_matrix<float>("even"), Contains("has no tensor \"even\""));
  CHECK_THROWS_WITH(
      file.mapped_matrix<float>("odd"),
      Contains("tensor \"odd\" begins at byte " + std::to_string(8 + header.size() + 1) +
               ", which must be a multiple of 4 to be mapped"));
  CHECK(file.matrix<float>("odd")(0, 0) == 1);

  const SafetensorsFile wide = one_tensor(folder, "F32", "[0,18446744073709551615]", "");
  CHECK_THROWS_WITH(wide.mapped_matrix<float>("t"),
                    Contains("whose size does not fit into 64 bits"));

  if (!file.map()) return;
  SafetensorsWriter writer;
  writer.add_made<float>("t", {2}, [] { return Matrix<float>{{1, -2}}; });
  writer.write(folder.file("b"));
  const SafetensorsFile shrunk(folder.file("b"));
  std::filesystem::resize_file(folder.file("b"), 20);
  CHECK_THROWS_WITH(shrunk.mapped_matrix<float>("t"), Contains("was changed while it is in use"));
}

TEST_CASE("safetensors: what cannot be widened is refused by name", "[io]") {
  const TemporaryFolder folder;
  const SafetensorsFile file = one_tensor(folder, "I32", "[2]", std::string(8, '\1'));
  const std::string message = "tensor \"t\" is I32, must be F64, F32, F16, BF16 or F8_E4M3";
  CHECK_THROWS_WITH(file.matrix<float>("t"), Contains(message));
  CHECK_THROWS_WITH(file.for_each_block<float>("t", [](std::uint64_t, std::span<const float>) {}),
                    Contains(message));
  CHECK_THROWS_WITH(file.matrix<float>("u"), Contains("has no tensor \"u\""));
  CHECK_THROWS_WITH(file.tensor("u"), Contains("has no tensor \"u\""));
  std::vector<std::byte> bytes(3);
  file.read_bytes("t", 5, bytes);
  CHECK(bytes == std::vector<std::byte>(3, std::byte{1}));

  // Nothing is in it, but as many columns as no matrix has.
  const SafetensorsFile wide = one_tensor(folder, "F32", "[0,18446744073709551615]", "");
  CHECK_THROWS_WITH(
      wide.matrix<float>("t"),
      Contains("has shape [0,18446744073709551615], whose size does not fit into 64 bits"));
}

TEST_CASE("safetensors: a bias is a vector in the file, and may be a row", "[io]") {
  const TemporaryFolder folder;
  Linear<float> saved({.inputs = 3, .outputs = 2}, 1);
  saved.bias.value << 5, 7;
  save_parameters(folder.file("a"), saved);
  const SafetensorsFile file(folder.file("a"));
  CHECK(file.tensor("bias").shape == std::vector<std::uint64_t>{2});
  CHECK(file.tensor("weight").shape == std::vector<std::uint64_t>{3, 2});
  Linear<float> loaded({.inputs = 3, .outputs = 2}, 2);
  load_parameters(folder.file("a"), loaded);
  CHECK(same_bits(loaded.bias.value, saved.bias.value));

  write_file(folder.file("row"), R"({"gain":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}})",
             std::string("\x00\x00\x80\x3f\x00\x00\x00\xc0", 8));
  RMSNorm<float> norm({.width = 2});
  load_parameters(folder.file("row"), norm);
  CHECK(norm.gain.value(0, 1) == -2);
  write_file(folder.file("column"),
             R"({"gain":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}})", 8);
  CHECK_THROWS_WITH(load_parameters(folder.file("column"), norm),
                    Contains("tensor \"gain\" has shape [2,1], must be [2]"));
}

TEST_CASE("safetensors: a tensor that is made otherwise than promised leaves no file", "[io]") {
  const TemporaryFolder folder;
  SafetensorsWriter writer;
  writer.add_made<float>("t", {2, 3}, [] { return Matrix<float>(2, 2); });
  CHECK_THROWS_WITH(writer.add_made<float>("t", {1}, [] { return Matrix<float>(1, 1); }),
                    Contains("tensor \"t\" is there already"));
  CHECK_THROWS_WITH(writer.write(folder.file("a")),
                    Contains("tensor \"t\" has 6 numbers, make() returned 4 numbers"));
  CHECK(folder.files().empty());
}
