/// The same task, the same experts, five gates: how much each leaves unexplained, and how evenly it
/// uses the experts.

#include <algorithm>
#include <cstdio>
#include <moe/moe.hpp>

#include "../common/clouds.hpp"

template <class Gate>
bool compare(const typename Gate::Config& gate) {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>, Gate>;
  Layer layer(
      {.width = examples::Clouds::width, .expert = {.hidden = 32}, .gate = gate, .seed = 1});
  const examples::Clouds clouds;
  examples::train(layer, clouds, 600);
  const double left = examples::unexplained(layer, clouds);

  moe::Matrix<float> x, y;
  clouds.draw(6000, 99, x, y);
  typename Layer::Tape tape;
  layer.evaluate(x, tape);
  std::printf("%s: %.1f %% unexplained\n%s\n\n", Gate::name, 100 * left,
              to_string(tape.balance()).c_str());
  return left < 0.05;
}

int main() {
  const bool learned[] = {
      compare<moe::NoisyTopKGate<>>({.experts = 8, .top_k = 2}),
      compare<moe::TopKGate<>>({.experts = 8, .top_k = 2, .switch_loss_weight = 0.01}),
      compare<moe::HierarchicalGate<>>(
          {.groups = 2, .group_experts = 4, .top_k_groups = 1, .top_k = 2}),
      compare<moe::BalancedGate<>>({.experts = 8, .top_k = 2}),
      compare<moe::ExpertChoiceGate<>>({.experts = 8, .capacity_factor = 2})};
  return std::ranges::count(learned, false) == 0 ? 0 : 1;
}
