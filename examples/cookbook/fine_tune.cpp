/// A trained layer learns a second task, near the first one, in three ways: by the gate alone, with
/// frozen experts; by low-rank adapters on frozen experts; and by all weights. Each starts from a copy.

#include <cstdint>
#include <cstdio>
#include <moe/adapt/lora.hpp>
#include <moe/moe.hpp>
#include <string>

#include "../common/clouds.hpp"

template <class Layer>
double tune(const char* way, Layer layer, const examples::Clouds& task,
            const examples::Clouds& old_task) {
  const moe::Index trained = moe::parameter_count(layer);
  examples::train(layer, task, 200);
  const double left = examples::unexplained(layer, task);
  std::printf("%-22s %5td trained: %5.1f %% of the new task unexplained, %5.1f %% of the old one\n",
              way, trained, 100 * left, 100 * examples::unexplained(layer, old_task));
  return left;
}

int main() {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
  const examples::Clouds old_task;
  const examples::Clouds new_task = old_task.changed(0.1f);
  Layer layer({.width = examples::Clouds::width,
               .expert = {.hidden = 32},
               .gate = {.experts = 8, .top_k = 2},
               .seed = 1});
  examples::train(layer, old_task, 1000);
  const double before = examples::unexplained(layer, new_task);
  std::printf("%-22s %5d trained: %5.1f %% of the new task unexplained, %5.1f %% of the old one\n",
              "as it was", 0, 100 * before, 100 * examples::unexplained(layer, old_task));

  Layer frozen = layer;
  moe::for_each_parameter(frozen, [](const std::string& name, moe::Parameter<float>& parameter) {
    parameter.trained = name.starts_with("gate.");
  });
  const double gate = tune("the gate", frozen, new_task, old_task);

  const auto adapted = moe::adapt(layer, moe::LoraConfig{.rank = 2, .alpha = 4}, moe::Seed{2});
  const double adapters = tune("adapters of rank 2", adapted, new_task, old_task);
  const double all = tune("all weights", layer, new_task, old_task);
  return gate < before && 4 * adapters < before && 4 * all < before ? 0 : 1;
}
