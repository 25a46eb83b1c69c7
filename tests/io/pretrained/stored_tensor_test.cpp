#include "moe/io/pretrained/stored_tensor.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../../support.hpp"
#include "../../temporary_folder.hpp"
#include "moe/io/safetensors.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;
using detail::StoredTensor;

namespace {

/// A checkpoint of a few tensors of any types.
class Tensors {
 public:
  void add(const std::string& name, const std::string& type, const std::string& shape,
           const std::string& bytes) {
    header_ += (header_.empty() ? "{\"" : ",\"") + name + R"(":{"dtype":")" + type +
               R"(","shape":)" + shape + R"(,"data_offsets":[)" + std::to_string(data_.size()) +
               "," + std::to_string(data_.size() + bytes.size()) + "]}";
    data_ += bytes;
  }
  io::Checkpoint open() const {
    const std::string header = header_ + "}";
    const std::uint64_t length = header.size();
    std::ofstream file(folder_.file("model.safetensors"), std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), 8);
    file << header << data_;
    file.close();
    return io::Checkpoint(folder_.file(""));
  }

 private:
  TemporaryFolder folder_;
  std::string header_;
  std::string data_;
};

std::string bytes_of(const Matrix<float>& matrix) {
  return {reinterpret_cast<const char*>(matrix.data()),
          static_cast<std::size_t>(matrix.size()) * sizeof(float)};
}

Matrix<double> all_rows(const StoredTensor& tensor) {
  Matrix<double> rows(tensor.rows(), tensor.columns());
  tensor.read_rows(0, tensor.rows(), rows.data());
  return rows;
}

}  // namespace

TEST_CASE("stored tensors: F8_E4M3 by blocks of 128 x 128, the last ones smaller",
          "[io][pretrained]") {
  Tensors tensors;
  std::string codes(130 * 257, '\x38');  // 1
  codes[129 * 257 + 256] = '\x3c';       // 1.5
  tensors.add("w", "F8_E4M3", "[130,257]", codes);
  Matrix<float> scales(2, 3);
  scales << 1, 2, 3, 4, 5, 6;
  tensors.add("w_scale_inv", "F32", "[2,3]", bytes_of(scales));
  const io::Checkpoint checkpoint = tensors.open();
  const StoredTensor stored(checkpoint, "w", {130, 257}, 128, 128);
  CHECK(stored.tensors() == std::vector<std::string>{"w", "w_scale_inv"});
  const Matrix<double> rows = all_rows(stored);
  CHECK(rows(0, 0) == 1);
  CHECK(rows(127, 127) == 1);
  CHECK(rows(0, 128) == 2);
  CHECK(rows(127, 256) == 3);
  CHECK(rows(128, 127) == 4);
  CHECK(rows(129, 255) == 5);
  CHECK(rows(129, 256) == 9);
  double one[257];
  stored.read_rows(128, 1, one);
  CHECK(one[256] == 6);
}

TEST_CASE("stored tensors: each of several matrices has blocks of its own", "[io][pretrained]") {
  Tensors tensors;
  tensors.add("w", "F8_E4M3", "[2,3,2]", std::string(12, '\x38'));
  Matrix<float> scales(4, 1);
  scales << 1, 2, 3, 4;
  tensors.add("w_scale_inv", "F32", "[2,2,1]", bytes_of(scales));
  const io::Checkpoint checkpoint = tensors.open();
  const Matrix<double> rows = all_rows(StoredTensor(checkpoint, "w", {2, 3, 2}, 2, 2));
  Vector<double> expected(6);
  expected << 1, 1, 2, 3, 3, 4;
  CHECK(rows.col(0) == expected);
  CHECK(rows.col(1) == expected);
}

TEST_CASE("stored tensors: MXFP4 by its definition", "[io][pretrained]") {
  // All 16 codes, 0 to 15 in the first 8 bytes, low halves first; then the same backwards.
  std::string codes;
  for (int i = 0; i < 8; ++i) codes += static_cast<char>(2 * i + 16 * (2 * i + 1));
  for (int i = 7; i >= 0; --i) codes += static_cast<char>(2 * i + 1 + 16 * (2 * i));
  Tensors tensors;
  tensors.add("w_blocks", "U8", "[2,1,2,16]", codes + codes + codes + codes);
  tensors.add("w_scales", "U8", "[2,1,2]", std::string("\x7f\x80\x7d\xff", 4));
  const io::Checkpoint checkpoint = tensors.open();
  const StoredTensor stored(checkpoint, "w_blocks", {2, 1, 64}, 128, 128);
  CHECK(stored.tensors() == std::vector<std::string>{"w_blocks", "w_scales"});
  const Matrix<double> rows = all_rows(stored);
  REQUIRE(rows.rows() == 2);
  const double sizes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  for (Index i = 0; i < 16; ++i) {
    const double value = i < 8 ? sizes[i] : -sizes[i - 8];
    CHECK(rows(0, i) == value);
    CHECK(rows(0, 31 - i) == value);
    CHECK(rows(0, 32 + i) == 2 * value);
    CHECK(rows(1, i) == value / 4);
    CHECK(std::isnan(rows(1, 32 + i)));
  }
  double second[64];
  stored.read_rows(1, 1, second);
  CHECK(second[7] == 1.5);
}

TEST_CASE("stored tensors: another shape, another type and missing scales are named",
          "[io][pretrained]") {
  Tensors tensors;
  tensors.add("f32", "F32", "[2,3]", std::string(24, '\0'));
  tensors.add("i32", "I32", "[2,3]", std::string(24, '\0'));
  tensors.add("f8", "F8_E4M3", "[2,3]", std::string(6, '\0'));
  tensors.add("vector", "F8_E4M3", "[3]", std::string(3, '\0'));
  tensors.add("vector_scale_inv", "F32", "[1]", std::string(4, '\0'));
  tensors.add("odd", "F8_E4M3", "[2,3]", std::string(6, '\0'));
  tensors.add("odd_scale_inv", "F32", "[2,3]", std::string(24, '\0'));
  tensors.add("whole", "F8_E4M3", "[2,3]", std::string(6, '\0'));
  tensors.add("whole_scale_inv", "I32", "[1,1]", std::string(4, '\0'));
  tensors.add("a_blocks", "U8", "[1,1,16]", std::string(16, '\0'));
  tensors.add("b_blocks", "U8", "[1,1,16]", std::string(16, '\0'));
  tensors.add("b_scales", "U8", "[1,2]", std::string(2, '\0'));
  tensors.add("c_blocks", "I8", "[1,1,16]", std::string(16, '\0'));
  tensors.add("d_blocks", "U8", "[1,1,16]", std::string(16, '\0'));
  tensors.add("d_scales", "U8", "[1,1]", std::string(1, '\0'));
  const io::Checkpoint checkpoint = tensors.open();
  const auto fails = [&](const std::string& name, const std::vector<std::uint64_t>& shape,
                         const std::string& message) {
    CHECK_THROWS_WITH(StoredTensor(checkpoint, name, shape, 128, 128), Contains(message));
  };
  fails("f32", {3, 2}, "model.safetensors: tensor \"f32\" has shape [2,3], needed is [3,2]");
  fails("f32", {6}, "has shape [2,3], needed is [6]");
  fails("none", {1}, "has no tensor \"none\"");
  fails("i32", {2, 3}, "tensor \"i32\" is I32, needed is F64, F32, F16, BF16 or F8_E4M3");
  fails("f8", {2, 3}, "has no tensor \"f8_scale_inv\"");
  fails("vector", {3}, "tensor \"vector\" is F8_E4M3 of shape [3], which has no blocks");
  fails("odd", {2, 3}, "tensor \"odd_scale_inv\" has shape [2,3], needed is [1,1]");
  fails("whole", {2, 3}, "tensor \"whole_scale_inv\" is I32, needed is");
  fails("a_blocks", {1, 32}, "has no tensor \"a_scales\"");
  fails("b_blocks", {1, 32}, "tensor \"b_scales\" has shape [1,2], needed is [1,1]");
  fails("b_blocks", {1, 64}, "tensor \"b_blocks\" has shape [1,1,16], needed is [1,2,16]");
  fails("c_blocks", {1, 32}, "tensor \"c_blocks\" is I8, needed is U8");
  fails("d_blocks", {1, 33}, "has rows of 33 numbers, must be a multiple of 32");
  CHECK_NOTHROW(StoredTensor(checkpoint, "d_blocks", {1, 32}, 128, 128));
}
