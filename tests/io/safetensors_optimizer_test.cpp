#include <cstdint>
#include <string>
#include <vector>

#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/nn/linear.hpp"
#include "moe/optim/adam.hpp"
#include "moe/optim/factored_adam.hpp"
#include "moe/optim/sgd.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using test::random_matrix;
using test::same_bits;

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
