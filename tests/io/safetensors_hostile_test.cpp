#include <cstdint>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>

#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "files.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;

TEST_CASE("safetensors: nothing in a file is believed", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("hostile");
  const auto fails = [&](const std::string& message) {
    CHECK_THROWS_WITH(SafetensorsFile(path), Contains(message));
    CHECK_THROWS_WITH(SafetensorsFile(path), Contains(path));
    CHECK_THROWS_AS(SafetensorsFile(path), std::runtime_error);
  };
  const auto header_fails = [&](const std::string& header, std::size_t data,
                                const std::string& message) {
    INFO(header.substr(0, 200));
    write_file(path, header, data);
    fails(message);
  };
  const auto tensor = [](const std::string& name, const std::string& type, const std::string& shape,
                         const std::string& offsets) {
    return "\"" + name + "\":{\"dtype\":" + type + ",\"shape\":" + shape +
           ",\"data_offsets\":" + offsets + "}";
  };
  const std::string f32 = "\"F32\"";

  std::ofstream(path, std::ios::binary) << "seven b";
  fails("it has 7 bytes");
  std::ofstream(path, std::ios::binary) << "";
  fails("it has 0 bytes");

  // The header's length.
  write_file(path, "{}", 0, 3);
  fails("says that its header has 3 bytes, but only 2 follow");
  write_file(path, "{}", 0, 100'000'001);
  fails("says that its header has 100000001 bytes, must be at most 100 MB");
  write_file(path, "{}", 0, std::numeric_limits<std::uint64_t>::max() - 1);
  fails("must be at most 100 MB");
  write_file(path, "{}", 0, 0);
  fails("does not begin with {");
  write_file(path, "{}  ", 0, 1);
  fails("is not JSON");

  // The header itself.
  header_fails("[1]", 0, "does not begin with {");
  header_fails(" {}", 0, "does not begin with {");
  header_fails("{\"a\":", 0, "is not JSON");
  header_fails("{} {}", 0, "is not JSON");
  header_fails(std::string("{}\0garbage", 10), 0, "byte 2 is zero");
  header_fails("{\"\xff\":1}", 0, "is not JSON");
  header_fails("{\"a\":" + std::string(100000, '['), 0, "tensor \"a\" is not an object");
  header_fails("{\"a\":1}", 0, "tensor \"a\" is not an object");
  header_fails("{\"a\":{}}", 0, "tensor \"a\" must have dtype");
  header_fails(
      "{" + tensor("a", f32, "[1]", "[0,4]") + "," + tensor("a", f32, "[1]", "[0,4]") + "}", 4,
      "tensor \"a\" twice");
  header_fails(R"({"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}})", 4,
               "\"shape\" twice");
  header_fails(R"({"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"":{}})", 4,
               "tensor \"\" twice");
  header_fails(R"({"__metadata__":{"":"a","":"b"}})", 0, "\"\" twice");
  header_fails("{\"a\":{\"dtype\":\"F32\",\"shape\":" + std::string(1000000, '['), 0,
               "shape has a list");
  header_fails("{\"a\":{\"b\":" + std::string(1000000, '['), 0, "is not JSON");
  header_fails(R"({"a":{"dtype":{},"shape":[1],"data_offsets":[0,4]}})", 4,
               "dtype is not a string");
  header_fails(R"({"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}})", 4,
               "shape has a string");
  header_fails(R"({"a":{"dtype":"F32","shape":[null],"data_offsets":[0,4]}})", 4, "shape has null");
  header_fails(R"({"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}})", 4,
               "shape has a boolean");
  {
    std::string ones = "1";
    for (int i = 0; i < 100; ++i) ones += ",1";
    header_fails("{\"a\":{\"dtype\":\"F32\",\"shape\":[" + ones, 0,
                 "shape has more than 64 numbers");
  }
  header_fails(R"({"__metadata__":[]})", 0, "metadata that is not an object");
  header_fails(R"({"__metadata__":{"a":1}})", 0, "metadata \"a\" that is not a string");

  // Types and shapes.
  header_fails("{" + tensor("a", "7", "[1]", "[0,4]") + "}", 4,
               "tensor \"a\": dtype is not a string");
  header_fails("{" + tensor("a", "\"F4\"", "[3]", "[0,1]") + "}", 1,
               "tensor \"a\": shape [3] of F4 takes 12 bits, must be a multiple of 8");
  header_fails("{" + tensor("a", f32, "1", "[0,4]") + "}", 4, "tensor \"a\": shape is not a list");
  header_fails("{" + tensor("a", f32, "[-1]", "[0,4]") + "}", 4, "tensor \"a\": shape has -1");
  header_fails("{" + tensor("a", f32, "[1.0]", "[0,4]") + "}", 4, "tensor \"a\": shape has 1.0");
  header_fails("{" + tensor("a", f32, "[1e400]", "[0,4]") + "}", 4, "is not JSON");
  header_fails("{" + tensor("a", f32, "[18446744073709551616]", "[0,4]") + "}", 4,
               "tensor \"a\": shape has 18446744073709551616");
  header_fails(
      "{" + tensor("a", f32, "[4294967296,4294967296]", "[0,0]") + "}", 0,
      "tensor \"a\": shape [4294967296,4294967296] has too many bytes to count in 64 bits");
  header_fails("{" + tensor("a", f32, "[4611686018427387904]", "[0,0]") + "}", 0,
               "too many bytes to count in 64 bits");
  header_fails("{" + tensor("a", f32, "[3]", "[0,8]") + "}", 8,
               "tensor \"a\": shape [3] of F32 takes 12 bytes, data_offsets gives 8");
  header_fails("{" + tensor("a", f32, "[0,4611686018427387904,8]", "[0,4]") + "}", 4,
               "takes 0 bytes, data_offsets gives 4");

  // Offsets.
  header_fails("{" + tensor("a", f32, "[1]", "[0]") + "}", 4, "data_offsets has 1 numbers, not 2");
  header_fails("{" + tensor("a", f32, "[1]", "[4,0]") + "}", 4,
               "tensor \"a\": data_offsets descends from 4 to 0");
  header_fails("{" + tensor("a", f32, "[1]", "[-4,0]") + "}", 4, "data_offsets has -4");
  const auto two = [&](const std::string& first, const std::string& second) {
    return "{" + tensor("a", f32, "[2]", first) + "," + tensor("b", f32, "[2]", second) + "}";
  };
  header_fails(two("[0,8]", "[4,12]"), 12,
               "tensor \"b\" begins at byte 4, within another that ends at 8");
  header_fails(two("[0,8]", "[0,8]"), 8, "begins at byte 0, within another that ends at 8");
  header_fails(two("[0,8]", "[12,20]"), 20, "tensor \"b\" begins at byte 12, after a hole from 8");
  header_fails(two("[4,12]", "[12,20]"), 20, "tensor \"a\" begins at byte 4, after a hole from 0");
  header_fails(two("[0,8]", "[8,16]"), 15, "tensor \"b\" ends at byte 16 of data, the file has 15");
  header_fails(two("[0,8]", "[8,16]"), 17, "has 17 bytes of data, its tensors end at 16");
  header_fails("{" + tensor("a", f32, "[1]", "[18446744073709551612,18446744073709551615]") + "}",
               4, "takes 4 bytes, data_offsets gives 3");
  header_fails("{" + tensor("a", f32, "[1]", "[18446744073709551608,18446744073709551612]") + "}",
               4, "after a hole");

  // A hostile name cannot flood a log or move its cursor.
  header_fails("{\"" + std::string(5000, 'x') + "\":1}", 0, std::string(120, 'x') + "...\"");
  header_fails("{\"a\\nb\\u001b[2J\":1}", 0, "tensor \"a?b?[2J\" is not an object");
  header_fails("{\"a\xc2\x9b\":1}", 0, "tensor \"a??\" is not an object");
}

TEST_CASE("safetensors: every file cut short is refused", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  Linear<float> linear({.inputs = 3, .outputs = 2}, 1);
  save_parameters(path, linear);
  const std::string whole = read_all(path);
  const Matrix<float> before = linear.weight.value;
  for (std::size_t size = 0; size < whole.size(); ++size) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << whole.substr(0, size);
    CHECK_THROWS_AS(load_parameters(path, linear), std::runtime_error);
    CHECK(same_bits(linear.weight.value, before));
  }
  std::ofstream(path, std::ios::binary | std::ios::trunc) << whole << '\0';
  CHECK_THROWS_WITH(load_parameters(path, linear), Contains("its tensors end at"));
  std::ofstream(path, std::ios::binary | std::ios::trunc) << whole;
  load_parameters(path, linear);
}

TEST_CASE("safetensors: every file with a changed byte is read or refused", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  Linear<float> linear({.inputs = 2, .outputs = 2}, 1);
  save_parameters(path, linear);
  const std::string whole = read_all(path);
  for (std::size_t i = 0; i < whole.size(); ++i) {
    for (const int flip : {0x01, 0x10, 0x80}) {
      std::string changed = whole;
      changed[i] = static_cast<char>(static_cast<unsigned char>(changed[i]) ^ flip);
      std::ofstream(path, std::ios::binary | std::ios::trunc) << changed;
      try {
        load_parameters(path, linear);
      } catch (const std::runtime_error&) {
      }
    }
  }
}
