/// Does an expert's work stay as cheap when there are many more experts?
///
/// E from 8 to 4096, each with exactly 32 slots: `ns_per_slot`, and `over_8_experts`, the time of a
/// slot over that with 8 experts, which was measured in turns with it. `frozen`: both passes of a
/// layer whose experts are not trained, and `over_trained`, their time over that of the same layer
/// when all is trained. One core.

#include "fixed_gate.hpp"
#include "measure.hpp"

namespace {

using bench::Index;

constexpr Index width = 256;
constexpr Index hidden = 512;

bench::Shape shape_of(Index experts) {
  constexpr Index slots_per_expert = 32;
  constexpr Index top_k = 2;
  return {.tokens = slots_per_expert * experts / top_k,
          .width = width,
          .hidden = hidden,
          .experts = experts,
          .top_k = top_k,
          .gate_products = 0};
}

class Work {
 public:
  Work(Index experts, bool backward)
      : shape_(shape_of(experts)),
        backward_(backward),
        layer_({.width = width,
                .expert = {.hidden = hidden},
                .gate = {.experts = experts, .top_k = shape_.top_k},
                .seed = 1}),
        x_(bench::random_matrix<float>(shape_.tokens, width, 1)),
        dy_(bench::random_matrix<float>(shape_.tokens, width, 2)) {}

  void freeze_experts() {
    moe::for_each_parameter(layer_, [](const std::string& name, auto& parameter) {
      if (name.starts_with("experts")) parameter.trained = false;
    });
  }
  void operator()() {
    layer_.forward(x_, tape_, {.step = 0});
    if (backward_) layer_.backward(dy_, tape_);
  }

 private:
  bench::Shape shape_;
  bool backward_;
  bench::FixedLayer<float> layer_;
  moe::Matrix<float> x_;
  moe::Matrix<float> dy_;
  bench::FixedLayer<float>::Tape tape_;
};

void run(benchmark::State& state, bool backward) {
  bench::use_threads(1);
  const Index experts = state.range(0);
  const bench::Shape shape = shape_of(experts);
  const bench::Work work = backward ? bench::step_work<float>(shape, experts)
                                    : bench::forward_work<float>(shape, experts);
  // A few matrices are there beside the tape.
  const double needed = bench::step_work<float>(shape, experts).resident * 1.2;
  if (bench::lacks_memory(state, needed)) return;
  bench::read_bandwidth(1);
  Work few(8, backward);
  Work many(experts, backward);
  const std::vector<double> seconds = bench::best_seconds({[&] { few(); }, [&] { many(); }});
  bench::report<float>(state, seconds[1], work, 1);
  const double of_few = seconds[0] / static_cast<double>(shape_of(8).slots());
  const double of_many = seconds[1] / static_cast<double>(shape.slots());
  state.counters["ns_per_slot"] = of_many * 1e9;
  state.counters["over_8_experts"] = of_many / of_few;
}
void forward(benchmark::State& state) { run(state, false); }
void forward_backward(benchmark::State& state) { run(state, true); }

void grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgName("E");
  for (const Index experts : {8, 64, 512, 4096}) b->Arg(experts);
}
BENCHMARK(forward)->Apply(grid);
BENCHMARK(forward_backward)->Apply(grid);

void frozen(benchmark::State& state) {
  bench::use_threads(1);
  Work trained(state.range(0), true);
  Work frozen(state.range(0), true);
  frozen.freeze_experts();
  const std::vector<double> seconds = bench::best_seconds({[&] { trained(); }, [&] { frozen(); }});
  for ([[maybe_unused]] auto _ : state) state.SetIterationTime(seconds[1]);
  state.counters["over_trained"] = seconds[1] / seconds[0];
}
BENCHMARK(frozen)->Apply([](benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgName("E")->Arg(64);
});

}  // namespace
