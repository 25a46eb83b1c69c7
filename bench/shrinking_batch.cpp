/// How near its peak is the processor as experts get more tokens, and do time steps at once help?
///
/// Of a batch of T tokens an expert gets T·K/E [S17 section 3.1]. `forward` and `step` give each exactly
/// 1 to 256, the weights coming from beyond the cache: `peak_fraction` is the share of the multiply-add
/// peak, whatever memory allows. `forward_sequences` and `step_sequences` take sequences through the
/// layer: all their time steps in one call, as a language model can whose layer lies between recurrent
/// ones, in turns with a call for each step. `us_per_token` is of the one call, `us_per_token_by_steps`
/// of the many, `gain` their ratio. One core.

#include "fixed_gate.hpp"
#include "measure.hpp"

namespace {

using bench::Index;
using Layer = bench::FixedLayer<float>;

constexpr Index width = 512;
constexpr Index hidden = 1024;
constexpr Index experts = 32;  // 128 MiB of weights, as much of gradients
constexpr Index top_k = 2;

bench::Shape shape_of(Index tokens) {
  return {.tokens = tokens,
          .width = width,
          .hidden = hidden,
          .experts = experts,
          .top_k = top_k,
          .gate_products = 0};
}

Layer make_layer() {
  return Layer({.width = width,
                .expert = {.hidden = hidden},
                .gate = {.experts = experts, .top_k = top_k},
                .seed = 1});
}

/// A pass over x in calls of equal size, each with a tape of its own since backward comes last.
class Pass {
 public:
  Pass(Layer& layer, Index tokens, Index calls, bool backward)
      : layer_(layer),
        backward_(backward),
        size_(tokens / calls),
        x_(bench::random_matrix<float>(tokens, width, 1)),
        dy_(bench::random_matrix<float>(tokens, width, 2)),
        tapes_(static_cast<std::size_t>(calls)) {}

  void operator()() {
    if (backward_) moe::zero_gradients(layer_, moe::Updates::lazy);
    Index first = 0;
    for (Layer::Tape& tape : tapes_) {
      layer_.forward(moe::rows_of(x_, first, size_), tape, {.step = 0});
      first += size_;
    }
    if (!backward_) return;
    for (auto tape = tapes_.rbegin(); tape != tapes_.rend(); ++tape) {
      first -= size_;
      layer_.backward(moe::rows_of(dy_, first, size_), *tape);
    }
  }

 private:
  Layer& layer_;
  bool backward_;
  Index size_;
  moe::Matrix<float> x_;
  moe::Matrix<float> dy_;
  std::vector<Layer::Tape> tapes_;
};

void report(benchmark::State& state, double seconds, Index tokens, bool backward) {
  const bench::Shape shape = shape_of(tokens);
  const bench::Work work = backward ? bench::step_work<float>(shape, experts)
                                    : bench::forward_work<float>(shape, experts);
  bench::report<float>(state, seconds, work, 1);
  state.counters["peak_fraction"] = work.operations / seconds / bench::multiply_add_peak<float>(1);
  state.counters["us_per_token"] = seconds / static_cast<double>(tokens) * 1e6;
}

void run(benchmark::State& state, bool backward) {
  bench::use_threads(1);
  const Index tokens = state.range(0) * experts / top_k;
  Layer layer = make_layer();
  Pass pass(layer, tokens, 1, backward);
  report(state, bench::best_seconds([&] { pass(); }), tokens, backward);
}
void forward(benchmark::State& state) { run(state, false); }
void step(benchmark::State& state) { run(state, true); }

void run_sequences(benchmark::State& state, bool backward) {
  bench::use_threads(1);
  const Index steps = state.range(1);
  const Index tokens = state.range(0) * steps;
  Layer layer = make_layer();
  Pass at_once(layer, tokens, 1, backward);
  Pass by_steps(layer, tokens, steps, backward);
  const std::vector<double> seconds =
      bench::best_seconds({[&] { at_once(); }, [&] { by_steps(); }});
  report(state, seconds[0], tokens, backward);
  state.counters["us_per_token_by_steps"] = seconds[1] / static_cast<double>(tokens) * 1e6;
  state.counters["gain"] = seconds[1] / seconds[0];
}
void forward_sequences(benchmark::State& state) { run_sequences(state, false); }
void step_sequences(benchmark::State& state) { run_sequences(state, true); }

void grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgName("tokens");
  for (Index tokens = 1; tokens <= 256; tokens *= 2) b->Arg(tokens);
}
/// A step has 4 tokens for an expert, all steps together 64.
void sequences(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"sequences", "steps"})->Args({64, 16});
}
BENCHMARK(forward)->Apply(grid);
BENCHMARK(step)->Apply(grid);
BENCHMARK(forward_sequences)->Apply(sequences);
BENCHMARK(step_sequences)->Apply(sequences);

}  // namespace
