#include "moe/io/safetensors.hpp"

#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "files.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;

namespace fs = std::filesystem;

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
      .width = 5, .expert = {.hidden = 3}, .gate = {.experts = 4, .top_k = 2}, .seed = 1};
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

TEST_CASE("safetensors: a file that does not fit leaves the module as it was", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  Linear<float> saved({.inputs = 3, .outputs = 2}, 1);
  save_parameters(path, saved);

  Linear<float> wider({.inputs = 3, .outputs = 4}, 2);
  const Linear<float> before = wider;
  CHECK_THROWS_WITH(load_parameters(path, wider),
                    Contains("tensor \"weight\" has shape [3,2], must be [3,4]"));
  CHECK(same_bits(wider.weight.value, before.weight.value));

  // Of two parameters the second is wrong: the first must not have been touched.
  Linear<float> other({.inputs = 3, .outputs = 4}, 3);
  const Linear<float> other_before = other;
  const Matrix<double> zeros = Matrix<double>::Zero(1, 4);
  SafetensorsWriter mixed;
  mixed.add("weight", wider.weight.value);
  mixed.add("bias", zeros);
  mixed.write(path);
  CHECK_THROWS_WITH(load_parameters(path, other), Contains("tensor \"bias\" is F64, must be F32"));
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
  CHECK_THROWS_WITH(twice.add("__metadata__", linear.bias.value),
                    Contains("tensor \"__metadata__\" has a name that the format reserves"));
  twice.set_metadata("key", "\xff");
  CHECK_THROWS_AS(twice.write(folder.file("b")), std::invalid_argument);
  CHECK(!fs::exists(folder.file("b")));
}
