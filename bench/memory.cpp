/// How much memory does a training step take at most, beside what it cannot do without?
///
/// `peak_MiB` is what the process had in memory at most while two steps ran (clear gradients,
/// forward, backward, Adam), above what it had before the layer was made: the system's own figure
/// (VmHWM), so it has everything in it, allocators' waste and threads' stacks too. `bound_MiB` is
/// parameters, gradients, Adam's two moments, x, the S x H pre-activations, and of each slot an
/// index and a weight. The x and dy that the caller has are counted for neither. All cores.

#include "measure.hpp"
#include "process_memory.hpp"

namespace {

using bench::Index;
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;

void training_step(benchmark::State& state) {
  const Index threads = bench::all_cores();
  const bench::Shape shape = bench::shape_of(state);
  bench::read_bandwidth(threads);
  bench::use_threads(threads);
  const auto x = bench::random_matrix<float>(shape.tokens, shape.width, 1);
  const auto dy = bench::random_matrix<float>(shape.tokens, shape.width, 2);
  const bench::PeakMemory memory;
  if (!memory.known()) {
    state.SkipWithError("this system does not say how much memory a process has");
    return;
  }

  Layer layer({.width = shape.width,
               .expert = {.hidden = shape.hidden},
               .gate = {.experts = shape.experts, .top_k = shape.top_k},
               .seed = 1});
  Layer::Tape tape;
  moe::Adam<float> adam;
  double seconds = 0;
  for (int i = 0; i < 2; ++i) {
    const double start = bench::seconds_now();
    moe::zero_gradients(layer);
    layer.forward(x, tape, {.step = 0});
    layer.backward(dy, tape);
    adam.update(layer, 1e-3);
    seconds = bench::seconds_now() - start;
  }
  const double peak = memory.bytes();

  const auto parameters = static_cast<double>(moe::parameter_count(layer)) * sizeof(float);
  const auto tape_bytes =
      static_cast<double>(shape.tokens * shape.width + shape.slots() * (shape.hidden + 1)) *
          sizeof(float) +
      static_cast<double>(shape.slots()) * sizeof(Index);
  const double bound = 4 * parameters + tape_bytes;
  // Adam reads four arrays and writes three.
  bench::Work work = bench::step_work<float>(shape, bench::used_experts(tape.dispatch));
  work.bytes += 7 * parameters;
  work.resident += 2 * parameters;
  bench::report<float>(state, seconds, work, threads);
  state.counters["peak_MiB"] = peak / 1048576;
  state.counters["bound_MiB"] = bound / 1048576;
  state.counters["peak_over_bound"] = peak / bound;
}

void grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"T", "D", "H", "E", "K"});
  b->Args({1024, 512, 1024, 32, 2});
  b->Args({4096, 256, 512, 256, 4});
  b->Args({4096, 512, 2048, 64, 2});
}
BENCHMARK(training_step)->Apply(grid);

}  // namespace
