/// How much faster is the layer than the same layer made with another library?
///
/// The same x, weights and slots for all, one core, float. A step is what a training loop does
/// between two updates: clear the gradients, forward, backward. Each peer's results are compared
/// with the library's before its time is taken.
///
/// Of the library's rows, peer_ratio is the time of the fastest peer over ours; of a peer's row,
/// its own time over ours.

#include <map>
#include <optional>

#include "fixed_gate.hpp"
#include "measure.hpp"
#include "peers/peer.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

using bench::Index;
using Layer = bench::FixedLayer<float>;

/// Weights of 64 MiB with 8 experts and of 256 MiB with more: beyond the cache, and all parties'
/// gradients together fit into 4 GiB.
bench::Shape shape_of(Index experts, Index tokens_per_expert) {
  constexpr Index top_k = 2;
  return {.tokens = tokens_per_expert * experts / top_k,
          .width = experts > 64 ? 256 : 512,
          .hidden = experts > 64  ? 512
                    : experts > 8 ? 1024
                                  : 2048,
          .experts = experts,
          .top_k = top_k,
          .gate_products = 0};
}

/// |ours - theirs| / |ours|, lengths of vectors; infinite where anything is not finite.
double difference(const float* ours, const float* theirs, Index count) {
  double error = 0;
  double length = 1e-30;
  for (Index i = 0; i < count; ++i) {
    const double mine = static_cast<double>(ours[i]);
    const double d = mine - static_cast<double>(theirs[i]);
    error += d * d;
    length += mine * mine;
  }
  const double relative = std::sqrt(error / length);
  return std::isfinite(relative) ? relative : std::numeric_limits<double>::infinity();
}

struct Times {
  std::string name;
  double forward = 0;
  double step = 0;
  std::string error{};
};

/// One cell of the table: everybody's times, ours first.
class Cell {
 public:
  explicit Cell(const bench::Shape& shape)
      : shape_(shape),
        layer_({.width = shape.width,
                .expert = {.hidden = shape.hidden},
                .gate = {.experts = shape.experts, .top_k = shape.top_k},
                .seed = 1}),
        x_(bench::random_matrix<float>(shape.tokens, shape.width, 1)),
        dy_(bench::random_matrix<float>(shape.tokens, shape.width, 2)) {
    step();
    describe();
  }

  std::vector<Times> measure() {
    std::vector<std::unique_ptr<bench::Peer>> peers;
    peers.push_back(bench::make_eigen_peer(problem_));
#ifdef MOE_BENCH_OPENBLAS
    peers.push_back(bench::make_openblas_peer(problem_));
#endif
#ifdef MOE_BENCH_ONEDNN
    peers.push_back(bench::make_onednn_peer(problem_));
#endif
#ifdef MOE_BENCH_TORCH
    peers.push_back(bench::make_torch_peer(problem_));
    peers.push_back(bench::make_torch_sorted_peer(problem_));
    peers.push_back(bench::make_torch_bmm_peer(problem_));
#endif
#ifdef MOE_BENCH_TORCH_GROUPED
    peers.push_back(bench::make_torch_grouped_peer(problem_));
#endif
    std::vector<Times> times{{.name = "moe"}};
    std::vector<bench::Party> forward{[this] { layer_.forward(x_, tape_, {.step = 0}); }};
    std::vector<bench::Party> steps{[this] { step(); }};
    for (const auto& peer : peers) {
      times.push_back({.name = peer->name()});
      peer->step();
      times.back().error = disagreement(*peer);
      if (!times.back().error.empty()) continue;
      forward.emplace_back([&peer] { peer->forward(); });
      steps.emplace_back([&peer] { peer->step(); });
    }
    const std::vector<double> forward_seconds = bench::best_seconds(forward);
    const std::vector<double> step_seconds = bench::best_seconds(steps);
    std::size_t i = 0;
    for (Times& t : times) {
      if (!t.error.empty()) continue;
      t.forward = forward_seconds[i];
      t.step = step_seconds[i++];
    }
    return times;
  }

 private:
  void step() {
    moe::zero_gradients(layer_, moe::Updates::lazy);
    layer_.forward(x_, tape_, {.step = 0});
    layer_.backward(dy_, tape_);
  }

  void describe() {
    const moe::Dispatch<float>& dispatch = tape_.dispatch;
    problem_.width = shape_.width;
    problem_.hidden = shape_.hidden;
    problem_.tokens = shape_.tokens;
    problem_.x = x_.data();
    problem_.dy = dy_.data();
    problem_.offsets = dispatch.offsets;
    problem_.sorted_token = dispatch.token;
    problem_.row_weight = dispatch.weight;
    problem_.experts.resize(static_cast<std::size_t>(shape_.experts));
    gradients_.resize(problem_.experts.size());
    std::size_t e = 0;
    // An expert's four come one after the other: up.weight, up.bias, down.weight, down.bias.
    for (const auto& expert : layer_.experts()) {
      std::vector<const moe::Parameter<float>*> p;
      moe::for_each_parameter(expert, [&](const auto&, const auto& each) { p.push_back(&each); });
      problem_.experts[e] = {p[0]->value.data(), p[1]->value.data(), p[2]->value.data(),
                             p[3]->value.data()};
      gradients_[e++] = {p[0]->gradient().data(), p[1]->gradient().data(), p[2]->gradient().data(),
                         p[3]->gradient().data()};
    }
  }

  /// Empty where a peer's results are ours. Of the millions of pre-activations a few are so near to
  /// zero that the order of a sum decides their sign, hence whether ReLU passes a gradient: the
  /// gradients behind it may differ by the share of one slot, some thousandths of an expert's.
  std::string disagreement(bench::Peer& peer) const {
    std::string error;
    const auto check = [&](const char* what, const float* ours, const float* theirs, Index count,
                           double tolerance) {
      const double d = difference(ours, theirs, count);
      if (error.empty() && !(d <= tolerance)) {
        error = std::string(what) + " differs by " + std::to_string(d);
      }
    };
    constexpr double rounding = 1e-5;
    constexpr double sign = 2e-2;
    const std::vector<float>& row_dweight = tape_.sorted_dweight;
    const Index rows = shape_.tokens * shape_.width;
    check("y", tape_.y.data(), peer.y(), rows, rounding);
    check("dx", tape_.dx.data(), peer.dx(), rows, sign);
    check("gradient of the slots' weights", row_dweight.data(), peer.row_dweight(), shape_.slots(),
          rounding);
    const Index weights = shape_.width * shape_.hidden;
    for (std::size_t e = 0; e < gradients_.size(); ++e) {
      const auto& ours = gradients_[e];
      const auto theirs = peer.gradient(e);
      check("gradient of up.weight", ours.up, theirs.up, weights, sign);
      check("gradient of up.bias", ours.up_bias, theirs.up_bias, shape_.hidden, 5 * sign);
      check("gradient of down.weight", ours.down, theirs.down, weights, rounding);
      check("gradient of down.bias", ours.down_bias, theirs.down_bias, shape_.width, rounding);
    }
    return error;
  }

  bench::Shape shape_;
  Layer layer_;
  Layer::Tape tape_;
  moe::Matrix<float> x_;
  moe::Matrix<float> dy_;
  bench::Problem problem_;
  std::vector<bench::ExpertArrays<const float*>> gradients_;
};

/// Measured when the first row of the cell is run.
const std::vector<Times>& times_of(Index experts, Index tokens) {
  static std::map<std::pair<Index, Index>, std::vector<Times>> known;
  auto& times = known[{experts, tokens}];
  if (times.empty()) {
    bench::use_threads(1);
    // Limits first: they need memory of their own for a moment.
    bench::read_bandwidth(1);
    bench::multiply_add_peak<float>(1);
    times = Cell(shape_of(experts, tokens)).measure();
  }
  return times;
}

void run(benchmark::State& state, bool step, std::size_t party, Index experts, Index tokens) {
  const std::vector<Times>& times = times_of(experts, tokens);
  const Times& mine = times[party];
  if (!mine.error.empty()) {
    state.SkipWithError(mine.error.c_str());
    return;
  }
  const auto seconds = [&](const Times& t) { return step ? t.step : t.forward; };
  const bench::Shape shape = shape_of(experts, tokens);
  bench::report<float>(
      state, seconds(mine),
      step ? bench::step_work<float>(shape, experts) : bench::forward_work<float>(shape, experts),
      1);
  double other = seconds(mine);
  if (party == 0) {
    other = std::numeric_limits<double>::infinity();
    for (std::size_t i = 1; i < times.size(); ++i) {
      if (times[i].error.empty()) other = std::min(other, seconds(times[i]));
    }
  }
  state.counters["peer_ratio"] = other / seconds(times[0]);
}

const bool registered = [] {
#ifdef __GLIBC__
  // A peer that allocates in each step should not wait for new pages each time.
  mallopt(M_MMAP_THRESHOLD, 1 << 25);  // the most that is allowed
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
  std::vector<std::string> names{"moe", "eigen"};
#ifdef MOE_BENCH_OPENBLAS
  names.emplace_back("openblas");
#endif
#ifdef MOE_BENCH_ONEDNN
  names.emplace_back("onednn");
#endif
#ifdef MOE_BENCH_TORCH
  names.emplace_back("libtorch");
  names.emplace_back("libtorch_sorted");
  names.emplace_back("libtorch_bmm");
#endif
#ifdef MOE_BENCH_TORCH_GROUPED
  names.emplace_back("libtorch_grouped");
#endif
  for (const Index experts : {8, 64, 256}) {
    for (const Index tokens : {4, 32, 128}) {
      for (const bool step : {false, true}) {
        for (std::size_t party = 0; party < names.size(); ++party) {
          const std::string name = (step ? "step/" : "forward/") + names[party] +
                                   "/tokens:" + std::to_string(tokens) +
                                   "/E:" + std::to_string(experts);
          bench::row(benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
            run(state, step, party, experts, tokens);
          }));
        }
      }
    }
  }
  return true;
}();

}  // namespace
