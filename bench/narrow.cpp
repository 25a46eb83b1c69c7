/// How much faster are narrow weights served than float, and how near memory's speed?
///
/// evaluate() with a fixed number of tokens for each of 32 experts, D 512, H 2048: 268 MB of float
/// weights, so every format comes from beyond the cache but for Int4 in a large one. In a row all
/// formats take turns. `float` is tokens a second with float weights, a format's `_x` how many times as
/// many it serves, and `_read` the share of the read bandwidth at which its weights came.

#include <memory>
#include <moe/weights/serving_layer.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "fixed_gate.hpp"
#include "measure.hpp"
#if defined(MOE_BENCH_GGML) || defined(MOE_BENCH_TORCH)
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

#ifdef MOE_BENCH_TORCH
/// The layer's own numbers, and the slots of a pass.
bench::NarrowNetwork network_of(const Layer& layer, const moe::Matrix<float>& x,
                                const Layer::Tape& tape) {
  bench::NarrowNetwork network{x.data(), {}};
  for (const auto& expert : layer.experts()) {
    bench::NarrowExpert to{};
    const auto& feed_forward = expert.network();
    std::remove_cvref_t<decltype(feed_forward)>::visit_parameters(
        feed_forward, [&](std::string_view name, const moe::Parameter<float>& from) {
          if (name == "up.weight") to.up = from.value.data();
          if (name == "up.bias") to.up_bias = from.value.data();
          if (name == "down.weight") to.down = from.value.data();
          if (name == "down.bias") to.down_bias = from.value.data();
        });
    network.experts.push_back(to);
  }
  const auto& routing = tape.gate.routing;
  for (std::size_t token = 0; token < routing.expert.size(); ++token) {  // one slot each
    bench::NarrowExpert& to = network.experts[static_cast<std::size_t>(routing.expert[token])];
    to.tokens.push_back(static_cast<std::int64_t>(token));
    to.token_weights.push_back(routing.weight[token]);
  }
  return network;
}

/// The norm of the difference between a peer's y and ours, over that of ours.
double relative_difference(const std::vector<float>& theirs, const moe::Matrix<float>& ours) {
  const Eigen::Map<const moe::Matrix<float>> y(theirs.data(), ours.rows(), ours.cols());
  return static_cast<double>((y - ours).norm() / ours.norm());
}
#endif

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
  layer.evaluate(x, tape);
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
#ifdef MOE_BENCH_TORCH
  const std::shared_ptr<bench::NarrowPeer> torch = bench::make_torch_narrow_peer(
      {width, hidden, experts, tokens, threads}, network_of(layer, x, tape));
  torch->evaluate();
  // x, weights, hidden rows and y have 8 bits of precision.
  const double difference = relative_difference(torch->y(), layer.evaluate(x, tape));
  if (!(difference < 0.01)) {
    state.SkipWithError(("libtorch's y differs by " + std::to_string(difference)).c_str());
    return;
  }
  all.push_back({"libtorch_bf16", torch->weight_bytes(), [torch] { torch->evaluate(); }});
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
