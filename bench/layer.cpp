/// How near the processor's limit is the whole layer, forward and backward?

#include "machine.hpp"

namespace {

using bench::Index;

template <class Scalar>
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward, Scalar>>;

template <class Scalar>
Layer<Scalar> make_layer(const benchmark::State& state) {
  return Layer<Scalar>({.width = state.range(1),
                        .expert = {.hidden = state.range(2)},
                        .gate = {.experts = state.range(3), .active = state.range(4)},
                        .seed = 1});
}

/// Of the forward pass: the gate's two products and the experts'; backward does twice as much.
double operations(const benchmark::State& state) {
  const Index gate = 2 * state.range(3);
  const Index experts = 2 * state.range(2) * state.range(4);
  return static_cast<double>(2 * state.range(0) * state.range(1) * (gate + experts));
}

template <class Scalar>
void forward(benchmark::State& state) {
  bench::use_threads(state.range(5));
  const Layer<Scalar> layer = make_layer<Scalar>(state);
  const auto x = bench::random_matrix<Scalar>(state.range(0), state.range(1), 1);
  typename Layer<Scalar>::Tape tape;
  for (auto _ : state) benchmark::DoNotOptimize(layer.forward(x, tape).data());
  bench::report<Scalar>(state, x.rows(), operations(state), state.range(5));
}

template <class Scalar>
void step(benchmark::State& state) {
  bench::use_threads(state.range(5));
  Layer<Scalar> layer = make_layer<Scalar>(state);
  const auto x = bench::random_matrix<Scalar>(state.range(0), state.range(1), 1);
  const auto dy = bench::random_matrix<Scalar>(state.range(0), state.range(1), 2);
  typename Layer<Scalar>::Tape tape;
  for (auto _ : state) {
    layer.forward(x, tape);
    benchmark::DoNotOptimize(layer.backward(dy, tape).data());
  }
  bench::report<Scalar>(state, x.rows(), 3 * operations(state), state.range(5));
}

/// Tokens an expert from 4 to 512, weights inside the caches and beyond them, one core and all.
void grid(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "D", "H", "E", "K", "threads"})->Unit(benchmark::kMillisecond)->UseRealTime();
  b->Args({2048, 128, 256, 64, 4, 1});
  b->Args({1024, 256, 512, 256, 4, 1});
  b->Args({128, 512, 2048, 64, 2, 1});
  b->Args({1024, 512, 2048, 8, 2, 1});
  b->Args({1024, 512, 2048, 64, 2, 1});
  b->Args({2048, 512, 2048, 8, 2, 1});
  const Index all = moe::worker_count();
  if (all > 1) b->Args({2048, 128, 256, 64, 4, all})->Args({1024, 512, 2048, 64, 2, all});
}
void small_grid(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "D", "H", "E", "K", "threads"})->Unit(benchmark::kMillisecond)->UseRealTime();
  b->Args({1024, 256, 512, 64, 4, 1});
}
BENCHMARK(forward<float>)->Apply(grid);
BENCHMARK(step<float>)->Apply(grid);
BENCHMARK(forward<double>)->Apply(small_grid);
BENCHMARK(step<double>)->Apply(small_grid);

}  // namespace
