/// What can this machine do at most? Everything else is held against these figures.

#include "measure.hpp"

namespace {

using bench::Index;

/// A row of operations a second, which try_rate() measures.
template <class F>
void peak(benchmark::State& state, F try_rate) {
  double rate = 0;
  for ([[maybe_unused]] auto _ : state) rate = try_rate();
  state.counters["GFLOPs"] = rate * 1e-9;
  state.counters["roofline_fraction"] = 1;
}

template <class Scalar>
void multiply_add_peak(benchmark::State& state) {
  peak(state, [&] { return bench::multiply_add_peak<Scalar>(state.range(0)); });
}
#ifdef __AVX512BF16__
void bfloat16_dot_peak(benchmark::State& state) {
  peak(state,
       [&] { return bench::best_rate(state.range(0), bench::detail::try_bfloat16_dots, 0.5); });
}
#endif
#ifdef __AVX512VNNI__
void byte_dot_peak(benchmark::State& state) {
  peak(state, [&] { return bench::best_rate(state.range(0), bench::detail::try_byte_dots, 0.5); });
}
#endif

void read_bandwidth(benchmark::State& state) {
  double rate = 0;
  for ([[maybe_unused]] auto _ : state) rate = bench::read_bandwidth(state.range(0));
  state.counters["GBs"] = rate * 1e-9;
  state.counters["roofline_fraction"] = 1;
}

void training_bandwidth(benchmark::State& state) {
  double rate = 0;
  for ([[maybe_unused]] auto _ : state) rate = bench::training_bandwidth();
  state.counters["GBs"] = rate * 1e-9;
  state.counters["roofline_fraction"] = 1;
}

void last_level_cache(benchmark::State& state) {
  double bytes = 0;
  for ([[maybe_unused]] auto _ : state) bytes = bench::last_level_cache();
  state.counters["MiB"] = bytes / 1048576;
  state.counters["roofline_fraction"] = 1;
}

void threads(benchmark::internal::Benchmark* b) {
  b->ArgName("threads")->Iterations(1)->Unit(benchmark::kMillisecond)->Arg(1);
  if (bench::all_cores() > 1) b->Arg(bench::all_cores());
}
BENCHMARK(multiply_add_peak<float>)->Apply(threads);
BENCHMARK(multiply_add_peak<double>)->Apply(threads);
#ifdef __AVX512BF16__
BENCHMARK(bfloat16_dot_peak)->Apply(threads);
#endif
#ifdef __AVX512VNNI__
BENCHMARK(byte_dot_peak)->Apply(threads);
#endif
BENCHMARK(read_bandwidth)->Apply(threads);
BENCHMARK(training_bandwidth)->Iterations(1)->Unit(benchmark::kMillisecond);
BENCHMARK(last_level_cache)->Iterations(1);

}  // namespace
