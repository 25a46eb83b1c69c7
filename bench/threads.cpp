/// How much faster is the layer on all cores than on one?
///
/// `speedup` is the time on one thread over that on all. The roofline is that of the cores in
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
               .gate = {.experts = shape.experts, .top_k = shape.top_k},
               .seed = 1});
  const auto x = bench::random_matrix<float>(shape.tokens, shape.width, 1);
  const auto dy = bench::random_matrix<float>(shape.tokens, shape.width, 2);
  Layer::Tape tape;
  const auto pass_on = [&](Index workers) {
    return [&, workers] {
      bench::use_threads(workers);
      layer.forward(x, tape, {.step = 0});
      if (backward) layer.backward(dy, tape);
    };
  };
  const std::vector<double> seconds = bench::best_seconds({pass_on(1), pass_on(threads)});
  const Index used = bench::used_experts(tape.dispatch);
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

/// A product in two halves, one after the other and on two threads. If no other program uses the cores, the
/// speedup passes 1 below moe::least_shared_work; the margin is for machines that other programs use too.
void break_even(benchmark::State& state) {
  const Index width = 64;
  const Index rows = state.range(0) / (2 * width * width);
  const auto a = bench::random_matrix<float>(rows, width, 1);
  const auto b = bench::random_matrix<float>(width, width, 2);
  moe::Matrix<float> c[2];
  const auto half = [&](Index i, Index) {
    c[i].resize(rows, width);
    moe::detail::gemm(moe::detail::GemmNN<float>{.a = a, .b = b, .c = c[i]});
  };
  const auto pass_on = [&](Index workers) {
    return [&, workers] {
      bench::use_threads(workers);
      moe::parallel_for(2, half);
    };
  };
  const std::vector<double> seconds = bench::best_seconds({pass_on(1), pass_on(2)});
  for ([[maybe_unused]] auto _ : state) state.SetIterationTime(seconds[1]);
  state.counters["microseconds_alone"] = 1e6 * seconds[0];
  state.counters["speedup"] = seconds[0] / seconds[1];
}
void break_even_grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"multiply_adds"});
  if (bench::all_cores() < 2) return;
  for (Index exponent = 16; exponent <= 23; ++exponent) b->Args({Index{1} << exponent});
}
BENCHMARK(break_even)->Apply(break_even_grid);

}  // namespace
