#include "moe/io/safetensors.hpp"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/nn/linear.hpp"
#include "moe/optim/adam.hpp"
#include "moe/optim/factored_adam.hpp"
#include "moe/optim/sgd.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using test::random_matrix;
using test::same_bits;

namespace {

namespace fs = std::filesystem;

/// A file as its parts: what the header says and how many bytes follow.
void write_file(const std::string& path, const std::string& header, std::size_t data,
                std::uint64_t length = std::numeric_limits<std::uint64_t>::max()) {
  if (length == std::numeric_limits<std::uint64_t>::max()) length = header.size();
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), 8);
  file << header << std::string(data, '\1');
}

std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST_CASE("safetensors: the format, byte for byte", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a.safetensors");
  Matrix<float> matrix(2, 1);
  matrix << 1, -2;
  const std::vector<Index> numbers{3};
  SafetensorsWriter writer;
  writer.add("b", matrix);
  writer.add("a", numbers);
  writer.set_metadata("step", "7");
  writer.write(path);
  const std::string header = R"({"__metadata__":{"step":"7"},)"
                             R"("a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                             R"("b":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}})";
  std::string expected;
  const std::size_t padded = (header.size() + 7) / 8 * 8;
  expected += static_cast<char>(padded);
  expected += std::string(7, '\0') + header + std::string(padded - header.size(), ' ');
  expected += std::string("\x03\x00\x00\x00\x00\x00\x00\x00", 8);
  expected += std::string("\x00\x00\x80\x3f\x00\x00\x00\xc0", 8);  // 1 and -2
  CHECK(read_all(path) == expected);
}

TEMPLATE_TEST_CASE("safetensors: what is saved is loaded, to the bit", "[io]", float, double) {
  using Layer = MoELayer<Expert<FeedForward, TestType>>;
  const typename Layer::Config config{
      .width = 5, .expert = {.hidden = 3}, .gate = {.experts = 4, .active = 2}, .seed = 1};
  Layer saved(config);
  std::uint64_t seed = 0;
  for_each_parameter(saved, [&](const std::string&, auto& p) {
    p.value = random_matrix<TestType>(p.value.rows(), p.value.cols(), ++seed);
    p.value(0, 0) = std::numeric_limits<TestType>::quiet_NaN();
  });
  const test::TemporaryFolder folder;
  save_parameters(folder.file("a"), saved);
  Layer loaded(config);
  for_each_parameter(loaded, [&](const std::string&, auto& p) { p.gradient().setConstant(3); });
  load_parameters(folder.file("a"), loaded);
  std::vector<Matrix<TestType>> values;
  for_each_parameter(saved, [&](const std::string&, auto& p) { values.push_back(p.value); });
  std::size_t i = 0;
  for_each_parameter(loaded, [&](const std::string&, auto& p) {
    CHECK(same_bits(p.value, values[i++]));
    CHECK((p.gradient().array() == 3).all());
  });
  const SafetensorsFile file(folder.file("a"));
  CHECK(file.tensors().count("experts.3.up.weight") == 1);
  CHECK(file.tensors().size() == values.size());
  CHECK(folder.files() == std::vector<std::string>{"a"});  // nothing is left beside it
}

TEST_CASE("safetensors: shapes without elements, and no tensors", "[io]") {
  const test::TemporaryFolder folder;
  const Matrix<float> nothing(0, 3);
  Matrix<float> something = Matrix<float>::Ones(1, 2);
  SafetensorsWriter writer;
  writer.add("nothing", nothing);
  writer.add("something", something);
  const std::vector<Index> no_numbers;
  writer.add("numbers", no_numbers);
  writer.write(folder.file("a"));
  const SafetensorsFile file(folder.file("a"));
  Matrix<float> back = Matrix<float>::Zero(1, 2);
  file.read("something", back);
  CHECK(back == something);
  Matrix<float> empty(0, 3);
  file.read("nothing", empty);
  SafetensorsWriter().write(folder.file("b"));
  CHECK(SafetensorsFile(folder.file("b")).tensors().empty());
  write_file(folder.file("c"), "{}", 0);
  CHECK(SafetensorsFile(folder.file("c")).metadata().empty());
  // Other people's types and dimensions are read over.
  write_file(folder.file("d"),
             R"({"x":{"dtype":"BF16","shape":[2,1,3],"data_offsets":[0,12]},)"
             R"("scalar":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}   )",
             13);
  CHECK(SafetensorsFile(folder.file("d")).tensors().at("x").shape ==
        std::vector<std::uint64_t>{2, 1, 3});
}

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
  fails("says that its header has 100000001 bytes, more than any has");
  write_file(path, "{}", 0, std::numeric_limits<std::uint64_t>::max() - 1);
  fails("more than any has");
  write_file(path, "{}", 0, 0);
  fails("does not begin with {");
  write_file(path, "{}  ", 0, 1);
  fails("is no JSON");

  // The header itself.
  header_fails("[1]", 0, "does not begin with {");
  header_fails(" {}", 0, "does not begin with {");
  header_fails("{\"a\":", 0, "is no JSON");
  header_fails("{} {}", 0, "is no JSON");
  header_fails(std::string("{}\0garbage", 10), 0, "byte 2 of it is zero");
  header_fails("{\"\xff\":1}", 0, "is no JSON");
  header_fails("{\"a\":" + std::string(100000, '['), 0, "tensor \"a\" is no object");
  header_fails("{\"a\":1}", 0, "tensor \"a\" is no object");
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
  header_fails("{\"a\":{\"b\":" + std::string(1000000, '['), 0, "is no JSON");
  header_fails(R"({"a":{"dtype":{},"shape":[1],"data_offsets":[0,4]}})", 4, "dtype is no text");
  header_fails(R"({"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}})", 4,
               "shape has a text");
  header_fails(R"({"a":{"dtype":"F32","shape":[null],"data_offsets":[0,4]}})", 4, "shape has null");
  header_fails(R"({"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}})", 4,
               "shape has a truth value");
  {
    std::string ones = "1";
    for (int i = 0; i < 100; ++i) ones += ",1";
    header_fails("{\"a\":{\"dtype\":\"F32\",\"shape\":[" + ones, 0,
                 "shape has more than 64 numbers");
  }
  header_fails(R"({"__metadata__":[]})", 0, "metadata that is no object");
  header_fails(R"({"__metadata__":{"a":1}})", 0, "metadata \"a\" that is no text");

  // Types and shapes.
  header_fails("{" + tensor("a", "7", "[1]", "[0,4]") + "}", 4, "tensor \"a\": dtype is no text");
  header_fails("{" + tensor("a", "\"F4\"", "[3]", "[0,1]") + "}", 1,
               "tensor \"a\": shape [3] of F4 takes 12 bits, which are no whole bytes");
  header_fails("{" + tensor("a", f32, "1", "[0,4]") + "}", 4, "tensor \"a\": shape is no list");
  header_fails("{" + tensor("a", f32, "[-1]", "[0,4]") + "}", 4, "tensor \"a\": shape has -1");
  header_fails("{" + tensor("a", f32, "[1.0]", "[0,4]") + "}", 4, "tensor \"a\": shape has 1.0");
  header_fails("{" + tensor("a", f32, "[1e400]", "[0,4]") + "}", 4, "is no JSON");
  header_fails("{" + tensor("a", f32, "[18446744073709551616]", "[0,4]") + "}", 4,
               "tensor \"a\": shape has 18446744073709551616");
  header_fails("{" + tensor("a", f32, "[4294967296,4294967296]", "[0,0]") + "}", 0,
               "tensor \"a\": shape [4294967296,4294967296] has more bytes than can be counted");
  header_fails("{" + tensor("a", f32, "[4611686018427387904]", "[0,0]") + "}", 0,
               "more bytes than can be counted");
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
  header_fails("{\"a\\nb\\u001b[2J\":1}", 0, "tensor \"a?b?[2J\" is no object");
  header_fails("{\"a\xc2\x9b\":1}", 0, "tensor \"a??\" is no object");
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

TEST_CASE("safetensors: a file that does not fit leaves the module as it was", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  Linear<float> saved({.inputs = 3, .outputs = 2}, 1);
  save_parameters(path, saved);

  Linear<float> wider({.inputs = 3, .outputs = 4}, 2);
  const Linear<float> before = wider;
  CHECK_THROWS_WITH(load_parameters(path, wider),
                    Contains("tensor \"weight\" has shape [3,2], needed is [3,4]"));
  CHECK(same_bits(wider.weight.value, before.weight.value));

  // Of two parameters the second is wrong: the first must not have been touched.
  Linear<float> other({.inputs = 3, .outputs = 4}, 3);
  const Linear<float> other_before = other;
  const Matrix<double> zeros = Matrix<double>::Zero(1, 4);
  SafetensorsWriter mixed;
  mixed.add("weight", wider.weight.value);
  mixed.add("bias", zeros);
  mixed.write(path);
  CHECK_THROWS_WITH(load_parameters(path, other),
                    Contains("tensor \"bias\" is F64, needed is F32"));
  CHECK(same_bits(other.weight.value, other_before.weight.value));

  SafetensorsWriter lacking;
  lacking.add("weight", wider.weight.value);
  lacking.write(path);
  CHECK_THROWS_WITH(load_parameters(path, other), Contains("has no tensor \"bias\""));
  CHECK(same_bits(other.weight.value, other_before.weight.value));
}

TEST_CASE("safetensors: a file that shrinks after it was opened", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  Linear<float> linear({.inputs = 3, .outputs = 2}, 1);
  save_parameters(path, linear);
  const SafetensorsFile file(path);
  fs::resize_file(path, fs::file_size(path) - 4);
  const Linear<float> before = linear;
  linear.bias.value.setConstant(7);
  linear.weight.value.setConstant(7);
  CHECK_THROWS_WITH(file.read_parameters(linear), Contains("cannot be read any more"));
  CHECK((linear.weight.value.array() == 7).all());
  CHECK((linear.bias.value.array() == 7).all());
  CHECK_THROWS_WITH(file.read("bias", linear.bias.value), Contains("cannot be read any more"));
  CHECK((linear.bias.value.array() == 7).all());
  file.read("weight", linear.weight.value);
  CHECK(same_bits(linear.weight.value, before.weight.value));
}

TEST_CASE("safetensors: a writer that is used wrongly", "[io]") {
  const test::TemporaryFolder folder;
  Linear<float> linear({.inputs = 2, .outputs = 2}, 1);
  SafetensorsWriter twice;
  twice.add("a", linear.weight.value);
  CHECK_THROWS_WITH(twice.add("a", linear.bias.value), Contains("tensor \"a\" is there already"));
  CHECK_THROWS_WITH(twice.add("__metadata__", linear.bias.value), Contains("is there already"));
  twice.set_metadata("key", "\xff");
  CHECK_THROWS_AS(twice.write(folder.file("b")), std::invalid_argument);
  CHECK(!fs::exists(folder.file("b")));
}

namespace {

/// What an optimizer does after it was saved and restored is what it would have done.
template <class Optimizer>
void check_optimizer(const typename Optimizer::Config& config, std::size_t tensors) {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const auto gradients = [](Linear<float>& linear, std::uint64_t step) {
    linear.weight.gradient() = random_matrix<float>(3, 2, step);
    linear.bias.gradient() = random_matrix<float>(1, 2, step + 100);
  };
  Linear<float> whole({.inputs = 3, .outputs = 2}, 1);
  Optimizer optimizer(config);
  for (std::uint64_t step = 1; step <= 3; ++step) {
    gradients(whole, step);
    optimizer.update(whole, 0.1);
  }
  SafetensorsWriter writer;
  writer.add_parameters(whole, "model.");
  writer.add_optimizer(optimizer, whole, "optimizer.");
  writer.write(path);

  Linear<float> resumed({.inputs = 3, .outputs = 2}, 9);
  Optimizer resumed_optimizer(config);
  const SafetensorsFile file(path);
  CHECK(file.tensors().size() == 2 + tensors);
  file.read_parameters(resumed, "model.");
  file.read_optimizer(resumed_optimizer, resumed, "optimizer.");
  for (std::uint64_t step = 4; step <= 6; ++step) {
    gradients(whole, step);
    optimizer.update(whole, 0.1);
    gradients(resumed, step);
    resumed_optimizer.update(resumed, 0.1);
  }
  CHECK(same_bits(resumed.weight.value, whole.weight.value));
  CHECK(same_bits(resumed.bias.value, whole.bias.value));
}

}  // namespace

TEST_CASE("safetensors: an optimizer goes on to the same bits", "[io][optim]") {
  check_optimizer<Adam<float>>({.weight_decay = 0.1}, 4 + 2);
  check_optimizer<Adam<float>>({.updates = Updates::lazy}, 4 + 2);
  check_optimizer<FactoredAdam<float>>({}, 4 + 2);
  check_optimizer<SGD<float>>({.momentum = 0.9}, 2);
}

TEST_CASE("safetensors: an optimizer that the file does not fit is what it was", "[io][optim]") {
  const test::TemporaryFolder folder;
  Linear<float> linear({.inputs = 3, .outputs = 2}, 1);
  linear.weight.gradient() = random_matrix<float>(3, 2, 1);
  linear.bias.gradient() = random_matrix<float>(1, 2, 2);
  Adam<float> adam;
  adam.update(linear, 0.1);
  // One moment is missing, then the last of the counts is negative.
  for (const bool missing : {true, false}) {
    SafetensorsWriter writer;
    const std::vector<Index> steps{5};
    const std::vector<Index> negative{5, -1};
    const Matrix<float> weight = Matrix<float>::Ones(3, 2);
    const Matrix<float> bias = Matrix<float>::Ones(1, 2);
    writer.add("adam.first_moment.weight", weight);
    writer.add("adam.first_moment.bias", bias);
    writer.add("adam.second_moment.weight", weight);
    if (!missing) writer.add("adam.second_moment.bias", bias);
    writer.add("adam.steps", steps);
    writer.add("adam.updates", negative);
    writer.write(folder.file("a"));
    const std::string message = missing ? "has no tensor \"adam.second_moment.bias\""
                                        : "tensor \"adam.updates\" has -1, must be at least 0";
    CHECK_THROWS_WITH(SafetensorsFile(folder.file("a")).read_optimizer(adam, linear, "adam."),
                      Contains(message));
    adam.for_each_state(linear, [](const std::string& name, auto&& state) {
      if constexpr (requires { state.rows(); }) {
        CHECK((state.array() != 1).all());
      } else {
        INFO(name);
        for (const Index number : state) CHECK(number == 1);
      }
    });
  }
}
