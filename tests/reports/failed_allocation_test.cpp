// Report: when a tape that was used before grows and the memory is not there, the program does not
// get std::bad_alloc but frees memory twice.

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "../allocation.hpp"
#include "../io/filled.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/moe.hpp"

using namespace moe;
using test::random_matrix;

namespace {

template <class Layer>
void check_layer(const typename Layer::Config& config) {
  using Tape = typename Layer::Tape;
  const test::Threads threads(1);
  Layer layer(config);
  const Matrix<float> few = random_matrix<float>(6, config.width, 1);
  const Matrix<float> many = random_matrix<float>(40, config.width, 2);
  const Matrix<float> y = [&] {
    Tape tape;
    return Matrix<float>(layer.forward(many, tape, {.step = 3}));
  }();
  const Matrix<float> served = layer.evaluate(many);

  // A tape of few tokens meets many.
  std::size_t failures = 0;
  Tape tape;
  failures += test::for_each_failure(
      [&] {
        layer.forward(few, tape, {.step = 1});
        layer.backward(few, tape);
        layer.forward(many, tape, {.step = 3});
        layer.evaluate(many, tape);
      },
      [&] {
        CHECK(test::same_bits(layer.forward(many, tape, {.step = 3}), y));
        CHECK(test::same_bits(layer.evaluate(many, tape), served));
        tape = Tape();
      });

  // So do backward and update, on a layer whose gradients and moments are not there yet.
  const Layer fresh(config);
  Layer other = fresh;
  Adam<float> adam;
  const auto update = [&] {
    zero_gradients(other);
    other.forward(many, tape, {.step = 3});
    other.backward(many, tape);
    adam.update(other, 1e-2);
  };
  const auto start_anew = [&] {
    other = fresh;
    adam = Adam<float>();
    tape = Tape();
  };
  update();
  std::vector<Matrix<float>> expected;
  for_each_parameter(other, [&](const std::string&, auto& p) { expected.push_back(p.value); });
  start_anew();
  failures += test::for_each_failure(update, [&] {
    other = fresh;
    adam = Adam<float>();
    update();  // on the tape that met the failure
    std::size_t i = 0;
    for_each_parameter(other, [&](const std::string&, auto& p) {
      CHECK(test::same_bits(p.value, expected[i++]));
    });
    start_anew();
  });
  CHECK(failures > 20);
}

}  // namespace

TEST_CASE("report: a failed allocation leaves tapes that can be used again", "[reports]") {
  if (!test::can_fail_allocations()) return;  // the sanitizer's allocator has no such switch
  using E = Expert<FeedForward>;
  const auto expert = FeedForward<float>::Config{.hidden = 6};
  check_layer<MoELayer<E>>({.width = 4,
                            .expert = expert,
                            .gate = {.experts = 4, .top_k = 2},
                            .output = Activation::sigmoid,
                            .seed = 1});
  check_layer<MoELayer<E, TopKGate<>>>({.width = 4,
                                        .expert = expert,
                                        .gate = {.experts = 4,
                                                 .top_k = 2,
                                                 .jitter = 0.1,
                                                 .capacity_factor = 1,
                                                 .switch_loss_weight = 0.1,
                                                 .z_loss_weight = 0.1},
                                        .seed = 1});
  check_layer<MoELayer<E, BalancedGate<>>>(
      {.width = 4, .expert = expert, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
  check_layer<MoELayer<E, ExpertChoiceGate<>>>(
      {.width = 4, .expert = expert, .gate = {.experts = 4}, .seed = 1});
  check_layer<MoELayer<E, HierarchicalGate<>>>(
      {.width = 4,
       .expert = expert,
       .gate = {.groups = 2, .group_experts = 2, .top_k_groups = 1, .top_k = 1},
       .seed = 1});
  check_layer<MoELayer<E, ProductKeyGate<>>>({.width = 4,
                                              .expert = expert,
                                              .gate = {.row_keys = 2, .column_keys = 2, .top_k = 2},
                                              .seed = 1});
  check_layer<MoELayer<E, SharedExpertGate<NoisyTopKGate<>>>>(
      {.width = 4,
       .expert = expert,
       .gate = {.shared = 1, .gated = true, .routed = {.experts = 4, .top_k = 2}},
       .seed = 1});
}

TEST_CASE("report: a failed allocation while saving or loading leaves what was there",
          "[reports]") {
  if (!test::can_fail_allocations()) return;
  const test::Threads threads(1);
  const test::TemporaryFolder folder;
  const std::string path = folder.file("model");
  const Linear<float> old = test::filled(1);
  const Linear<float> next = test::filled(2);
  save_parameters(path, old);
  const auto stored = [&] {
    Linear<float> linear = test::filled(0);
    load_parameters(path, linear);
    CHECK((linear.weight.value.array() == linear.bias.value(0, 0)).all());
    CHECK((linear.bias.value.array() == linear.bias.value(0, 0)).all());
    CHECK(folder.files() == std::vector<std::string>{"model"});
    return linear.bias.value(0, 0);
  };

  std::vector<float> seen;
  CHECK(test::for_each_failure([&] { save_parameters(path, next); },
                               [&] { seen.push_back(stored()); }) > 5);
  // What threw has saved nothing: only the last time went through.
  CHECK(std::count(seen.begin(), seen.end(), 1.0f) + 1 == std::ssize(seen));
  CHECK(seen.back() == 2);

  seen.clear();
  Linear<float> linear = test::filled(3);
  CHECK(test::for_each_failure(
            [&] { load_parameters(path, linear); },
            [&] {
              CHECK((linear.weight.value.array() == linear.bias.value(0, 0)).all());
              seen.push_back(linear.bias.value(0, 0));
            }) > 5);
  CHECK(std::count(seen.begin(), seen.end(), 3.0f) + 1 == std::ssize(seen));
  CHECK(seen.back() == 2);

  // An add() that failed has added nothing.
  SafetensorsWriter writer;
  CHECK(test::for_each_failure([&] { writer.add("a name that takes memory", old.bias.value); },
                               [] {}) > 1);
  writer.write(path);
  CHECK(SafetensorsFile(path).tensors().size() == 1);
}
