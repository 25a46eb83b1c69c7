#include <cstdint>
#include <map>
#include <string>
#include <type_traits>
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

namespace {

using Linears = std::vector<Linear<float>>;

/// Three maps, of which the second one is frozen after two of three updates, and the third one always.
template <class Optimizer>
void train_some(Linears& linears, Optimizer& optimizer) {
  linears.clear();
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    linears.emplace_back(Linear<float>::Config{.inputs = 3, .outputs = 2}, seed);
  }
  const auto set_trained = [](Linear<float>& linear, bool trained) {
    linear.weight.trained = trained;
    linear.bias.trained = trained;
  };
  set_trained(linears[2], false);
  for (std::uint64_t step = 1; step <= 3; ++step) {
    if (step == 3) set_trained(linears[1], false);
    for_each_parameter(linears, [&](const std::string& name, auto& p) {
      p.gradient() = random_matrix<float>(p.value.rows(), 2, step + 10 * name.size());
    });
    optimizer.update(linears, 0.1);
  }
}

/// Thaws all and updates twice.
template <class Optimizer>
void train_all(Linears& linears, Optimizer& optimizer) {
  for_each_parameter(linears, [](const std::string&, auto& p) { p.trained = true; });
  for (std::uint64_t step = 4; step <= 5; ++step) {
    for_each_parameter(linears, [&](const std::string& name, auto& p) {
      p.gradient() = random_matrix<float>(p.value.rows(), 2, step + 10 * name.size());
    });
    optimizer.update(linears, 0.1);
  }
}

/// The numbers of an optimizer's state for each map.
template <class Optimizer>
std::vector<Index> remembered(Optimizer& optimizer, const Linears& linears) {
  std::vector<Index> sizes(linears.size(), 0);
  optimizer.for_each_state(linears, [&](const std::string& name, auto&& state) {
    if constexpr (requires { state.rows(); }) {
      sizes[static_cast<std::size_t>(name[name.find('.') + 1] - '0')] += state.size();
    }
  });
  return sizes;
}

template <class Optimizer>
void check_frozen(const typename Optimizer::Config& config) {
  const test::TemporaryFolder folder;
  Linears whole;
  Optimizer optimizer(config);
  train_some(whole, optimizer);
  const std::vector<Index> sizes = remembered(optimizer, whole);
  CHECK(sizes[0] > 0);
  CHECK(sizes[1] == sizes[0]);
  CHECK(sizes[2] == 0);

  // As it is, and as it was saved when zeros stood for what had never been trained.
  std::map<std::string, Matrix<float>> zeros;
  for (const bool old : {false, true}) {
    SafetensorsWriter writer;
    optimizer.for_each_state(whole,
                             [&](const std::string& name, auto&& state, const auto&... shape) {
                               if constexpr (sizeof...(shape) > 0) {
                                 if (old && state.size() == 0) {
                                   zeros[name].setZero((shape.rows, ...), (shape.columns, ...));
                                   writer.add("optimizer." + name, zeros.at(name));
                                   return;
                                 }
                               }
                               writer.add("optimizer." + name, state);
                             });
    writer.write(folder.file(old ? "old" : "now"));
  }
  const SafetensorsFile now(folder.file("now"));
  Index empty = 0;
  for (const auto& [name, tensor] : now.tensors()) {
    if (name.find(".2.") == name.npos) continue;
    INFO(name);
    CHECK(tensor.shape == std::vector<std::uint64_t>{0, 0});
    ++empty;
  }
  CHECK(empty == (std::is_same_v<Optimizer, SGD<float>> ? 2 : 4));

  const Linears before = whole;
  train_all(whole, optimizer);
  for (const char* path : {"now", "old"}) {
    // The second map's state is loaded whether it is frozen when that happens or not; an optimizer that
    // remembers something else of all of them is overwritten.
    for (const bool frozen : {true, false}) {
      for (const bool used : {true, false}) {
        INFO(path << (frozen ? ", frozen" : "") << (used ? ", used" : ""));
        Linears resumed = before;
        for_each_parameter(resumed, [&](const std::string&, auto& p) { p.trained = !frozen; });
        Optimizer other(config);
        if (used) {
          Linears copy = before;
          train_all(copy, other);
        }
        SafetensorsFile(folder.file(path)).read_optimizer(other, resumed, "optimizer.");
        if (frozen && !used) {
          CHECK(remembered(other, resumed) == std::vector<Index>{sizes[0], sizes[1], 0});
        }
        train_all(resumed, other);
        for (std::size_t i = 0; i < 3; ++i) {
          CHECK(same_bits(resumed[i].weight.value, whole[i].weight.value));
          CHECK(same_bits(resumed[i].bias.value, whole[i].bias.value));
        }
      }
    }
  }

  // The shape of what is not there yet is checked too.
  Linears wider(1, Linear<float>({.inputs = 3, .outputs = 4}, 1));
  for_each_parameter(wider, [](const std::string&, auto& p) { p.trained = false; });
  Optimizer of_wider(config);
  CHECK_THROWS_WITH(now.read_optimizer(of_wider, wider, "optimizer."),
                    Contains("0.") && Contains("has shape"));
  CHECK(remembered(of_wider, wider) == std::vector<Index>{0});
}

}  // namespace

TEST_CASE("safetensors: what an optimizer does not remember yet takes no room and loads",
          "[io][optim]") {
  check_frozen<Adam<float>>({.weight_decay = 0.1});
  check_frozen<FactoredAdam<float>>({});
  check_frozen<SGD<float>>({.momentum = 0.9});
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
