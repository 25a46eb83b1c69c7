/// What does an expert that gets no token cost?
///
/// 32,768 slots at D 64, H 128, 4 experts a token, and E from 32 to 131,072 behind a flat gate, a
/// hierarchical one (2 of a groups, 2 of b experts in each, b² = E or E / 2), or product keys (a rows,
/// b columns). `step` clears the gradients, runs forward and backward, and updates the parameters by
/// SGD, all lazily; `evaluate` serves the same batch. One core.
///
/// The more experts, the fewer slots an expert, so the same work needs more weights from memory:
/// `traffic_ms` is what that takes at the bandwidth of plain passes of the same kind: weights read by
/// forward, by backward and by the update and written by it, gradients written by backward and read by
/// the update, see bench::training_bandwidth(); in evaluate the weights once, at the read bandwidth. It
/// is of the experts in use and of the gates: all of a flat gate and of product keys, of a hierarchical
/// one the primary gate and the secondary ones in use. What gates keep by expert is left out.
/// `slot_ratio_accounted` is what remains of a slot's time, over what remains with 256 experts
/// behind a hierarchical gate, measured in turns with it; the traffic counts as none where it all
/// stays in L3. `touched_MiB` is the roofline's count of bytes, traffic included.
/// `peak_MiB` is the most memory that the process had above what it had before. With 131,072 experts
/// weights and gradients take 16.3 GiB; SGD without momentum has no state.

#include <bit>
#include <memory>
#include <optional>
#include <string>
#include <typeinfo>

#include "measure.hpp"
#include "process_memory.hpp"

namespace {

using bench::Index;
using Flat = moe::NoisyTopKGate<float>;
using Hierarchical = moe::HierarchicalGate<float>;
using ProductKeys = moe::ProductKeyGate<float>;

constexpr Index width = 64;
constexpr Index hidden = 128;
constexpr Index top_k = 4;
constexpr Index tokens = 32768 / top_k;

/// A gate over E experts, and how much of it a batch needs.
template <class Gate>
struct Kind;

template <>
struct Kind<Flat> {
  static Flat::Config config(Index experts) { return {.experts = experts, .top_k = top_k}; }
  static Index scores_per_token(Index experts) { return experts; }
  static Index columns_used(const Flat::Tape&, Index experts) { return experts; }
};

/// b of a·b experts.
Index members_of(Index experts) {
  return Index{1} << ((std::bit_width(static_cast<std::size_t>(experts)) - 1) / 2);
}

template <>
struct Kind<ProductKeys> {
  static ProductKeys::Config config(Index experts) {
    const Index columns = members_of(experts);
    return {.row_keys = experts / columns, .column_keys = columns, .top_k = top_k};
  }
  static Index scores_per_token(Index experts) {
    const ProductKeys::Config c = config(experts);
    return c.row_keys + c.column_keys;
  }
  static Index columns_used(const ProductKeys::Tape&, Index experts) {
    return scores_per_token(experts);
  }
};

template <>
struct Kind<Hierarchical> {
  static Hierarchical::Config config(Index experts) {
    const Index members = members_of(experts);
    return {.groups = experts / members,
            .group_experts = members,
            .top_k_groups = 2,
            .top_k = top_k / 2};
  }
  static Index scores_per_token(Index experts) {
    const Hierarchical::Config c = config(experts);
    return c.groups + c.top_k_groups * c.group_experts;
  }
  /// Of the weights of all gates in use, side by side.
  static Index columns_used(const Hierarchical::Tape& tape, Index experts) {
    const Hierarchical::Config c = config(experts);
    return c.groups + bench::used_experts(tape.groups) * c.group_experts;
  }
};

/// What is memory's part in a pass, in bytes.
struct Traffic {
  double moved;
  double resident;
};

/// A layer, its optimizer, and a batch.
template <class Gate>
class Trained {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>, Gate>;

 public:
  explicit Trained(Index experts)
      : experts_(experts),
        layer_({.width = width,
                .expert = {.hidden = hidden},
                .gate = Kind<Gate>::config(experts),
                .seed = 1}),
        x_(bench::random_matrix<float>(tokens, width, 1)),
        dy_(bench::random_matrix<float>(tokens, width, 2)) {
    // Scores of the size of their noise: in evaluation too, tokens spread over the experts.
    std::uint64_t seed = 1;
    moe::for_each_parameter(layer_, [&](const std::string& name, auto& parameter) {
      if (!name.starts_with("gate.") || name.ends_with("noise_weight")) return;
      moe::fill_normal(parameter.value, 1.0f / std::sqrt(static_cast<float>(width)), seed++);
    });
    step();  // takes memory
    gate_.emplace(layer_.gate());
  }

  void step() {
    moe::zero_gradients(layer_, moe::Updates::lazy);
    layer_.forward(x_, tape_, {.step = 0});
    layer_.backward(dy_, tape_);
    optimizer_.update(layer_, 1e-6);  // so small that every step routes alike
  }
  void evaluate() { layer_.evaluate(x_, tape_); }

  void gate_step() {
    moe::zero_gradients(*gate_, moe::Updates::lazy);
    gate_->forward(x_, tape_.gate, {.step = 0});
    tape_.dx.setZero(tokens, width);
    gate_->backward(x_, std::span<const float>(tape_.dweight), tape_.gate, tape_.dx);
  }
  void gate_evaluate() { layer_.gate().evaluate(x_, tape_.gate); }

  Traffic traffic(bool training) const {
    const Index expert = 2 * width * hidden + width + hidden;
    const Index gate = (training ? 2 : 1) * width * Kind<Gate>::columns_used(tape_.gate, experts_);
    const auto weights =
        static_cast<double>(used_experts() * expert + gate) * double{sizeof(float)};
    return training ? Traffic{6 * weights, 2 * weights} : Traffic{weights, weights};
  }
  Index used_experts() const { return experts_ - tape_.balance().unused_experts(); }

 private:
  Index experts_;
  Layer layer_;
  std::optional<Gate> gate_;  ///< a copy of the layer's
  moe::SGD<float> optimizer_{{.updates = moe::Updates::lazy}};
  moe::Matrix<float> x_;
  moe::Matrix<float> dy_;
  typename Layer::Tape tape_;
};

double traffic_seconds(const Traffic& traffic, bool training) {
  if (traffic.resident <= bench::last_level_cache()) return 0;
  return traffic.moved / (training ? bench::training_bandwidth() : bench::read_bandwidth(1));
}

/// The layer of the row that is running; rows of one gate and size come one after the other and
/// share it.
class Made {
 public:
  template <class Gate>
  bool is(Index experts) const {
    return experts_ == experts && gate_ == &typeid(Gate);
  }
  /// Before the next one is made, and before the memory that it can have is measured.
  void clear() {
    layer_.reset();
    experts_ = 0;
  }
  template <class Gate>
  Trained<Gate>& of(Index experts) {
    if (!is<Gate>(experts)) {
      clear();
      memory_.emplace();
      layer_ = std::make_shared<Trained<Gate>>(experts);
      experts_ = experts;
      gate_ = &typeid(Gate);
    }
    return *static_cast<Trained<Gate>*>(layer_.get());
  }
  const bench::PeakMemory& memory() const { return *memory_; }

 private:
  Index experts_ = 0;
  const std::type_info* gate_ = nullptr;
  std::optional<bench::PeakMemory> memory_;
  std::shared_ptr<void> layer_;
};

Made& made() {
  static Made made;
  return made;
}

Trained<Hierarchical>& reference() {
  static Trained<Hierarchical> layer(256);
  return layer;
}

template <class Gate>
void run(benchmark::State& state, bool training) {
  bench::use_threads(1);
  const Index experts = state.range(0);
  const bench::Shape shape{.tokens = tokens,
                           .width = width,
                           .hidden = hidden,
                           .experts = Kind<Gate>::scores_per_token(experts),
                           .top_k = top_k,
                           .gate_products = training ? 2 : 1};
  const double parameters =
      static_cast<double>(experts) * (2 * width * hidden + width + hidden + 2 * width);
  // Weights, gradients, and of a flat gate eight matrices of scores.
  const double needed = 8 * parameters + 32.0 * static_cast<double>(tokens * shape.experts) + 5e8;
  if (!made().is<Gate>(experts)) {
    made().clear();
    if (bench::lacks_memory(state, needed)) return;
  }
  bench::read_bandwidth(1);
  if (training) bench::training_bandwidth();
  Trained<Hierarchical>& few = reference();
  Trained<Gate>& layer = made().of<Gate>(experts);

  const auto pass = [training](auto& l) { training ? l.step() : l.evaluate(); };
  const std::vector<double> seconds =
      bench::best_seconds({[&] { pass(few); }, [&] { pass(layer); },
                           [&] { training ? layer.gate_step() : layer.gate_evaluate(); }});
  pass(few);
  pass(layer);
  const Traffic traffic = layer.traffic(training);
  const double waited = traffic_seconds(traffic, training);

  bench::Work work =
      training ? bench::step_work<float>(shape, 0) : bench::evaluate_work<float>(shape, 0);
  work.bytes += traffic.moved;
  work.resident += traffic.resident;
  bench::report<float>(state, seconds[1], work, 1);
  state.counters["ns_per_token"] = seconds[1] / double{tokens} * 1e9;
  state.counters["percent_gate"] = 100 * seconds[2] / seconds[1];
  state.counters["used_experts"] = static_cast<double>(layer.used_experts());
  state.counters["touched_MiB"] = work.bytes / 1048576;
  state.counters["traffic_ms"] = waited * 1e3;
  state.counters["slot_ratio_accounted"] =
      (seconds[1] - waited) / (seconds[0] - traffic_seconds(few.traffic(training), training));
  if (made().memory().known()) state.counters["peak_MiB"] = made().memory().bytes() / 1048576;
}

template <class Gate>
void add(const std::string& name, std::initializer_list<Index> sizes) {
  for (const Index experts : sizes) {
    for (const bool training : {true, false}) {
      const std::string pass = training ? "step/" : "evaluate/";
      bench::row(benchmark::RegisterBenchmark(
                     (pass + name).c_str(),
                     [training](benchmark::State& state) { run<Gate>(state, training); }))
          ->ArgName("E")
          ->Arg(experts);
    }
  }
}

// A flat gate's scores of 16,384 experts would take 4 GiB.
const bool added = [] {
  add<Flat>("flat", {32, 256, 1024, 4096});
  add<Hierarchical>("hierarchical", {256, 1024, 4096, 16384, 65536, 131072});
  add<ProductKeys>("product_keys", {256, 1024, 4096, 16384, 65536, 131072});
  return true;
}();

}  // namespace
