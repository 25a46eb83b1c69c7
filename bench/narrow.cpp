/// How much faster are narrow weights served than float, and how near memory's speed?
///
/// evaluate() with a fixed number of tokens for each of 32 experts, D 512, H 2048: 268 MB of float
/// weights, so every format comes from beyond the cache but for Int4 in a large one. In a row all
/// formats take turns. `float` is tokens a second with float weights, a format's `_x` how many times as
/// many it serves, and `_read` the share of the read bandwidth at which its weights came.

#include <memory>
#include <moe/weights/serving_layer.hpp>
#include <string>
#include <vector>

#include "fixed_gate.hpp"
#include "measure.hpp"
#ifdef MOE_BENCH_GGML
#include "peers/narrow_peer.hpp"
#endif

namespace {

using bench::Index;
using Layer = bench::FixedLayer<float>;

constexpr Index width = 512;
constexpr Index hidden = 2048;
constexpr Index experts = 32;

/// Somebody's time for a batch, in turns with the others.
struct Contender {
  std::string name;
  double weight_bytes;
  bench::Party evaluate;
};

template <class Format>
void add(std::vector<Contender>& all, const Layer& layer, const moe::Matrix<float>& x,
         moe::Activations activations) {
  using Served = moe::ServingLayer<Layer, Format>;
  const auto served =
      std::make_shared<const Served>(layer, moe::NarrowOptions{.activations = activations});
  const auto tape = std::make_shared<typename Served::Tape>();
  const bool rounds = activations == moe::Activations::int8;
  all.push_back({std::string(Format::name) + (rounds ? "_int8" : ""),
                 static_cast<double>(served->weight_bytes()),
                 [served, tape, &x] { served->evaluate(x, *tape); }});
}

void evaluate(benchmark::State& state) {
  const Index threads = state.range(0);
  const Index tokens = state.range(1) * experts;
  bench::use_threads(static_cast<int>(threads));
  const double bandwidth = bench::read_bandwidth(threads);
  const Layer layer({.width = width,
                     .expert = {.hidden = hidden},
                     .gate = {.experts = experts, .top_k = 1},
                     .seed = 1});
  const auto x = bench::random_matrix<float>(tokens, width, 1);
  Layer::Tape tape;
  std::vector<Contender> all;
  all.push_back({"float", 4.0 * experts * 2 * width * hidden, [&] { layer.evaluate(x, tape); }});
  add<moe::BFloat16>(all, layer, x, moe::Activations::float32);
  add<moe::Float16>(all, layer, x, moe::Activations::float32);
  add<moe::Int8>(all, layer, x, moe::Activations::float32);
  add<moe::Int8>(all, layer, x, moe::Activations::int8);
  add<moe::Int4>(all, layer, x, moe::Activations::float32);
  add<moe::Int4>(all, layer, x, moe::Activations::int8);
#ifdef MOE_BENCH_GGML
  for (const char* type : {"f32", "bf16", "f16", "q8_0", "q4_0"}) {
    const auto peer = std::shared_ptr<bench::NarrowPeer>(
        bench::make_ggml_peer(type, {width, hidden, experts, tokens, threads}));
    all.push_back(
        {std::string("ggml_") + type, peer->weight_bytes(), [peer] { peer->evaluate(); }});
  }
#endif
  std::vector<bench::Party> parties;
  for (const Contender& contender : all) parties.push_back(contender.evaluate);
  const std::vector<double> seconds = bench::best_seconds(parties, 0.4);
  for ([[maybe_unused]] auto _ : state) state.SetIterationTime(seconds[0]);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const double share = all[i].weight_bytes / seconds[i] / bandwidth;
    if (i == 0) {
      state.counters["float"] = static_cast<double>(tokens) / seconds[0];
    } else {
      state.counters[all[i].name + "_x"] = seconds[0] / seconds[i];
    }
    state.counters[all[i].name + "_read"] = share;
  }
}

void grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"threads", "tokens"});
  for (const Index threads : {1, 2}) {
    for (const Index tokens : {1, 2, 4, 8, 32, 128}) b->Args({threads, tokens});
  }
}
BENCHMARK(evaluate)->Apply(grid);

}  // namespace
