// Report: a checkpoint that is loaded while the next one is saved over it comes half from the one
// and half from the other, without a word.

#include <atomic>
#include <string>
#include <thread>

#include "../catch.hpp"
#include "../temporary_folder.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;

TEST_CASE("report: a file that is replaced while it is loaded gives one of the two", "[reports]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("checkpoint");
  const auto filled = [](float value) {
    Linear<float> linear({.inputs = 30, .outputs = 20}, 1);
    linear.weight.value.setConstant(value);
    linear.bias.value.setConstant(value);
    return linear;
  };
  save_parameters(path, filled(1));
  const SafetensorsFile opened(path);
  save_parameters(path, filled(2));
  Linear<float> linear = filled(0);
  opened.read_parameters(linear);
  CHECK((linear.weight.value.array() == 1).all());
  opened.read("bias", linear.bias.value);
  CHECK((linear.bias.value.array() == 1).all());

  // And all at once.
  std::atomic<bool> is_done = false;
  std::thread saver([&] {
    for (float value = 3; !is_done; ++value) save_parameters(path, filled(value));
  });
  int mixed = 0;
  for (int i = 0; i < 200; ++i) {
    load_parameters(path, linear);
    const float value = linear.bias.value(0, 0);
    mixed += !(linear.weight.value.array() == value).all();
    mixed += !(linear.bias.value.array() == value).all();
  }
  is_done = true;
  saver.join();
  CHECK(mixed == 0);
}
