// Report: a checkpoint that is loaded while the next one is saved over it comes half from the one
// and half from the other, without a word.

#include <atomic>
#include <string>
#include <thread>

#include "../catch.hpp"
#include "../io/filled.hpp"
#include "../temporary_folder.hpp"
#include "moe/io/safetensors.hpp"

using namespace moe;

TEST_CASE("report: a file that is replaced while it is loaded gives one of the two", "[reports]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("checkpoint");
  save_parameters(path, test::filled(1));
  const SafetensorsFile opened(path);
  save_parameters(path, test::filled(2));
  Linear<float> linear = test::filled(0);
  opened.read_parameters(linear);
  CHECK((linear.weight.value.array() == 1).all());
  opened.read("bias", linear.bias.value);
  CHECK((linear.bias.value.array() == 1).all());

  // And all at once.
  std::atomic<bool> is_done = false;
  std::thread saver([&] {
    for (float value = 3; !is_done; ++value) save_parameters(path, test::filled(value));
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
