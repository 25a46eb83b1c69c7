/// How much faster is the layer on all cores than on one?
///
/// `speedup` is the time on one thread over that on so many. The roofline is that of the cores in
/// use, measured with all of them at work.

#include "measure.hpp"

namespace {

using bench::Index;
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;

void run(benchmark::State& state, bool backward) {
  const Index threads = state.range(5);
  const bench::Shape shape = bench::shape_of(state);
  bench::read_bandwidth(threads);
  Layer layer({.width = shape.width,
               .expert = {.hidden = shape.hidden},
               .gate = {.experts = shape.experts, .active = shape.active},
               .seed = 1});
  const auto x = bench::random_matrix<float>(shape.tokens, shape.width, 1);
  const auto dy = bench::random_matrix<float>(shape.tokens, shape.width, 2);
  Layer::Tape tape;
  const auto pass_on = [&](Index workers) {
    return [&, workers] {
      bench::use_threads(workers);
      layer.forward(x, tape);
      if (backward) layer.backward(dy, tape);
    };
  };
  const std::vector<double> seconds = bench::best_seconds({pass_on(1), pass_on(threads)});
  const Index used = bench::used_experts(tape.routing);
  bench::report<float>(
      state, seconds[1],
      backward ? bench::step_work<float>(shape, used) : bench::forward_work<float>(shape, used),
      threads);
  state.counters["speedup"] = seconds[0] / seconds[1];
}
void forward(benchmark::State& state) { run(state, false); }
void forward_backward(benchmark::State& state) { run(state, true); }

/// Two threads, and as many as there are cores.
void grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"T", "D", "H", "E", "K", "threads"});
  const Index cores = bench::all_cores();
  for (Index threads = 2; threads <= cores; threads = threads == cores ? cores + 1 : cores) {
    b->Args({4096, 512, 2048, 64, 2, threads});
    b->Args({256, 512, 2048, 64, 2, threads});
    b->Args({1024, 256, 512, 8, 2, threads});
  }
}
BENCHMARK(forward)->Apply(grid);
BENCHMARK(forward_backward)->Apply(grid);

}  // namespace
