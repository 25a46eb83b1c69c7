/// What does adapting cost, beside training all weights?
///
/// An update of 8 or 64 experts, D 512, H 2048, each with a fixed number of tokens: clear gradients, forward,
/// backward, Adam. In a row all parties take turns. `all` is the time with all weights trained, `lora_x`
/// and so on the share of it that a party takes: low-rank adapters on all maps of all experts, with frozen
/// weights in float and in Int8. `_state` is the memory of its optimizer over that for all weights.

#include <moe/adapt/narrow_lora.hpp>
#include <string>
#include <type_traits>
#include <vector>

#include "fixed_gate.hpp"
#include "measure.hpp"

namespace {

using bench::Index;
using Layer = bench::FixedLayer<float>;

constexpr Index width = 512;
constexpr Index hidden = 2048;

/// A layer and what trains it.
template <class Module>
class Training {
 public:
  explicit Training(Module layer) : layer_(std::move(layer)) {}

  void update(const moe::Matrix<float>& x, const moe::Matrix<float>& dy) {
    moe::zero_gradients(layer_, moe::Updates::lazy);
    layer_.forward(x, tape_, {.step = 0});
    layer_.backward(dy, tape_);
    adam_.update(layer_, 1e-4);
  }
  /// Bytes that the optimizer keeps.
  double state_bytes() {
    double bytes = 0;
    adam_.for_each_state(layer_, [&](const std::string&, const auto& numbers) {
      bytes += static_cast<double>(numbers.size()) * sizeof(*numbers.data());
    });
    return bytes;
  }

 private:
  Module layer_;
  typename Module::Tape tape_;
  moe::Adam<float> adam_;
};

void update(benchmark::State& state) {
  const Index threads = state.range(0);
  const Index experts = state.range(1);
  const Index tokens = state.range(2) * experts;
  const moe::LoraConfig lora{.rank = state.range(3)};
  if (bench::lacks_memory(state, 4e9)) return;
  bench::use_threads(static_cast<int>(threads));
  const Layer layer({.width = width,
                     .expert = {.hidden = hidden},
                     .gate = {.experts = experts, .top_k = 1},
                     .seed = 1});
  const auto x = bench::random_matrix<float>(tokens, width, 1);
  const auto dy = bench::random_matrix<float>(tokens, width, 2);
  Training all(layer);
  Training adapted(moe::adapt(layer, lora, moe::Seed{1}));
  Training narrow(moe::adapt(moe::ServingLayer<Layer, moe::Int8>(layer), lora, moe::Seed{1}));
  const std::vector<double> seconds = bench::best_seconds(
      {[&] { all.update(x, dy); }, [&] { adapted.update(x, dy); }, [&] { narrow.update(x, dy); }},
      1.5);
  for ([[maybe_unused]] auto _ : state) state.SetIterationTime(seconds[0]);
  state.counters["all"] = seconds[0] * 1e3;
  state.counters["lora_x"] = seconds[1] / seconds[0];
  state.counters["lora_int8_x"] = seconds[2] / seconds[0];
  state.counters["lora_state"] = adapted.state_bytes() / all.state_bytes();
}

void grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"threads", "experts", "tokens", "rank"});
  for (const Index threads : {1, 2}) {
    for (const Index experts : {8, 64}) {
      for (const Index tokens : {4, 32, 128}) b->Args({threads, experts, tokens, 8});
      b->Args({threads, experts, 32, 64});
    }
  }
}
BENCHMARK(update)->Apply(grid);

}  // namespace
