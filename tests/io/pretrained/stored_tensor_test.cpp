#include "moe/io/pretrained/stored_tensor.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <set>
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

TEST_CASE("stored tensors: F8_E4M3 with one scale, or one for each row, column or matrix",
          "[io][pretrained]") {
  // Two matrices of 2 x 3 ones, and what the scales make of them.
  const auto read = [](const std::string& scale_name, const std::string& shape,
                       const Matrix<float>& scales) {
    INFO(shape);
    Tensors tensors;
    tensors.add("w", "F8_E4M3", "[2,2,3]", std::string(12, '\x38'));
    tensors.add(scale_name, "F32", shape, bytes_of(scales));
    const io::Checkpoint checkpoint = tensors.open();
    const StoredTensor stored(checkpoint, "w", {2, 2, 3}, 128, 128);
    CHECK(stored.tensors() == std::vector<std::string>{"w", scale_name});
    const Matrix<double> rows = all_rows(stored);
    for (Index r = 0; r < 4; ++r) {
      double row[3];
      stored.read_rows(r, 1, row);
      CHECK(std::equal(row, row + 3, rows.row(r).data()));
    }
    return rows;
  };
  const Matrix<double> ones = Matrix<double>::Ones(4, 3);
  const Matrix<float> one = Matrix<float>::Constant(1, 1, 0.25f);
  for (const std::string name : {"w_scale", "w_scale_inv"}) {
    CHECK(read(name, "[]", one) == 0.25 * ones);
    CHECK(read(name, "[1]", one) == 0.25 * ones);
    CHECK(read(name, "[2,1,1]", Matrix<float>{{2, 5}}) ==
          Matrix<double>{{2, 2, 2}, {2, 2, 2}, {5, 5, 5}, {5, 5, 5}});
    CHECK(read(name, "[2,2,1]", Matrix<float>{{2, 3, 5, 7}}) ==
          Matrix<double>{{2, 2, 2}, {3, 3, 3}, {5, 5, 5}, {7, 7, 7}});
    CHECK(read(name, "[2,1,3]", Matrix<float>{{2, 3, 5, 7, 11, 13}}) ==
          Matrix<double>{{2, 3, 5}, {2, 3, 5}, {7, 11, 13}, {7, 11, 13}});
  }
}

TEST_CASE("stored tensors: the scale of a map's input is not used and not left over",
          "[io][pretrained]") {
  Tensors tensors;
  tensors.add("up.weight", "F8_E4M3", "[1,2]", "\x38\x40");
  const Matrix<float> two = Matrix<float>::Constant(1, 1, 2.0f);
  tensors.add("up.weight_scale", "F32", "[1]", bytes_of(two));
  tensors.add("up.input_scale", "F32", "[1]", bytes_of(7 * two));
  tensors.add("down.weight", "F8_E4M3", "[1,2]", "\x38\x40");
  tensors.add("down.weight_scale_inv", "F32", "[]", bytes_of(two));
  tensors.add("down.activation_scale", "F32", "[]", bytes_of(7 * two));
  const io::Checkpoint checkpoint = tensors.open();
  const StoredTensor up(checkpoint, "up.weight", {1, 2}, 128, 128);
  CHECK(all_rows(up) == Matrix<double>{{2, 4}});
  CHECK(std::set<std::string>(up.tensors().begin(), up.tensors().end()) ==
        std::set<std::string>{"up.weight", "up.weight_scale", "up.input_scale"});
  const StoredTensor down(checkpoint, "down.weight", {1, 2}, 128, 128);
  CHECK(all_rows(down) == Matrix<double>{{2, 4}});
  CHECK(std::set<std::string>(down.tensors().begin(), down.tensors().end()) ==
        std::set<std::string>{"down.weight", "down.weight_scale_inv", "down.activation_scale"});
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
  tensors.add("twice", "F8_E4M3", "[2,3]", std::string(6, '\0'));
  tensors.add("twice_scale", "F32", "[1]", std::string(4, '\0'));
  tensors.add("twice_scale_inv", "F32", "[1,1]", std::string(4, '\0'));
  tensors.add("turned", "F8_E4M3", "[2,3]", std::string(6, '\0'));
  tensors.add("turned_scale", "F32", "[3,1]", std::string(12, '\0'));
  tensors.add("flat", "F8_E4M3", "[2,3]", std::string(6, '\0'));
  tensors.add("flat_scale", "F32", "[2]", std::string(8, '\0'));
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
  fails("f32", {3, 2}, "model.safetensors: tensor \"f32\" has shape [2,3], must be [3,2]");
  fails("f32", {6}, "has shape [2,3], must be [6]");
  fails("none", {1}, "has no tensor \"none\"");
  fails("i32", {2, 3}, "tensor \"i32\" is I32, must be F64, F32, F16, BF16 or F8_E4M3");
  fails("f8", {2, 3},
        "has no tensor \"f8_scale_inv\" and no tensor \"f8_scale\", one of which must be the "
        "scales of "
        "tensor \"f8\"");
  fails("twice", {2, 3},
        "has both tensor \"twice_scale_inv\" and tensor \"twice_scale\", of which one must be the "
        "scales of tensor \"twice\"");
  fails("vector", {3},
        "tensor \"vector\" is F8_E4M3 of shape [3], must have at least 2 dimensions");
  const std::string needed =
      ", must be [1,1] for blocks of 128 x 128, [2,1] for rows, [1,3] for columns, [1,1] or [1]";
  fails("odd", {2, 3}, "tensor \"odd_scale_inv\" has shape [2,3]" + needed);
  fails("turned", {2, 3}, "tensor \"turned_scale\" has shape [3,1]" + needed);
  fails("flat", {2, 3}, "tensor \"flat_scale\" has shape [2]" + needed);
  fails("whole", {2, 3}, "tensor \"whole_scale_inv\" is I32, must be");
  fails("a_blocks", {1, 32}, "has no tensor \"a_scales\"");
  fails("b_blocks", {1, 32}, "tensor \"b_scales\" has shape [1,2], must be [1,1]");
  fails("b_blocks", {1, 64}, "tensor \"b_blocks\" has shape [1,1,16], must be [1,2,16]");
  fails("c_blocks", {1, 32}, "tensor \"c_blocks\" is I8, must be U8");
  fails("d_blocks", {1, 33}, "has rows of 33 numbers, must be a multiple of 32");
  CHECK_NOTHROW(StoredTensor(checkpoint, "d_blocks", {1, 32}, 128, 128));
}
