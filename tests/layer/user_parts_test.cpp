#include "user_parts.hpp"

#include <vector>

#include "layers.hpp"

using namespace moe;
using namespace moe::test;
template <class Scalar>
using Config = test::LayerConfig<Scalar>;

namespace {

/// A fused network that records which network is called, and which one it is told is called next.
template <class Scalar_>
struct Queued : FeedForward<Scalar_> {
  using Base = FeedForward<Scalar_>;
  using Base::Base;
  struct Call {
    const Queued* network;
    const Queued* next;
  };
  inline static std::vector<Call> runs;
  inline static std::vector<Call> combines;

  void hidden(const typename Base::Block& block, Range columns, bool save,
              const Queued* next = nullptr) const {
    runs.push_back({this, next});
    Base::hidden(block, columns, save, next);
  }
  void output(const typename Base::Block& block, Range columns, MatrixView<Scalar_> y,
              const Queued* next = nullptr) const {
    combines.push_back({this, next});
    Base::output(block, columns, y, next);
  }
};

/// A gate with a fault in its routing.
struct BrokenGate : HashGate {
  struct Config : HashGate::Config {
    Index claimed_experts = 3;
    Index extra_tokens = 0;
    Index first_expert = 0;
  };
  Config config;
  explicit BrokenGate(const Config& c, std::uint64_t seed) : HashGate(c, seed), config(c) {}
  void forward(const MatrixRef<double>& x, Tape& tape, const Pass& key) const {
    HashGate::forward(x, tape, key);
    spoil(tape);
  }
  void evaluate(const MatrixRef<double>& x, Tape& tape, const EvaluationPass& = {}) const {
    HashGate::evaluate(x, tape);
    spoil(tape);
  }
  void spoil(Tape& tape) const {
    tape.routing.experts = config.claimed_experts;
    if (!tape.routing.expert.empty()) tape.routing.expert[0] = config.first_expert;
    for (Index i = 0; i < config.extra_tokens; ++i) {
      tape.routing.token_offsets.push_back(tape.routing.slots() + 1);
      tape.routing.expert.push_back(0);
      tape.routing.weight.push_back(1);
    }
  }
};

/// Sends token t to expert t mod 2 and does only what a layer cannot do for it, or harm.
struct CarelessGate {
  using Scalar = float;
  struct Config {
    Index width = 0;
    bool shrinks_dx = false;
  };
  using Tape = GateTape<float>;
  explicit CarelessGate(const Config& config, std::uint64_t) : shrinks_dx(config.shrinks_dx) {}
  Index experts() const { return 2; }
  void forward(const MatrixRef<float>& x, Tape& tape, const Pass&) const { evaluate(x, tape); }
  void evaluate(const MatrixRef<float>& x, Tape& tape, const EvaluationPass& = {}) const {
    tape.routing.experts = 2;
    tape.routing.token_offsets.resize(detail::to_size(x.rows()) + 1);
    tape.routing.expert.resize(detail::to_size(x.rows()));
    tape.routing.weight.assign(detail::to_size(x.rows()), 1.0f);
    for (Index t = 0; t <= x.rows(); ++t) tape.routing.token_offsets[detail::to_size(t)] = t;
    for (Index t = 0; t < x.rows(); ++t) tape.routing.expert[detail::to_size(t)] = t % 2;
  }
  void backward(const MatrixRef<float>&, std::span<const float>, Tape&, Matrix<float>& dx) {
    if (shrinks_dx) dx.resize(1, 3);
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}
  bool shrinks_dx;
};

}  // namespace

TEST_CASE("layer: on one worker each network is told who comes next", "[layer]") {
  using Network = Queued<double>;
  const Threads threads(1);
  MoELayer<Expert<Queued, double>> layer(
      {.width = 6, .expert = {.hidden = 10}, .gate = {.experts = 7, .top_k = 2}, .seed = 3});
  const Matrix<double> x = random_matrix(40, 6, 1);
  MoELayer<Expert<Queued, double>>::Tape tape;
  Network::runs.clear();
  Network::combines.clear();
  const Matrix<double> y = layer.forward(x, tape, {.step = 0});
  for (const auto& calls : {Network::runs, Network::combines}) {
    REQUIRE(calls.size() == 7);  // every expert has tokens, and all fit into one group
    for (std::size_t i = 0; i < calls.size(); ++i) {
      CHECK(calls[i].network == &layer.experts()[i].network());
      CHECK(calls[i].next == (i + 1 < calls.size() ? &layer.experts()[i + 1].network() : nullptr));
    }
  }
  Layer<double> plain(
      {.width = 6, .expert = {.hidden = 10}, .gate = {.experts = 7, .top_k = 2}, .seed = 3});
  Layer<double>::Tape plain_tape;
  CHECK(same_bits(y, plain.forward(x, plain_tape, {.step = 0})));
}

TEST_CASE("layer: every slot is run once and none is dropped", "[layer]") {
  for (const Index top_k : {1, 3, 7}) {
    MoELayer<Expert<SineMap, double>> layer(
        {.width = 3, .gate = {.experts = 7, .top_k = top_k}, .seed = 5});
    for_each_parameter(layer, [](const std::string& name, auto& p) {
      if (name == "experts.0.w") fill_normal(p.value, 1.0, 3);
    });
    const Matrix<double> x = random_matrix(100, 3, 1);
    MoELayer<Expert<SineMap, double>>::Tape tape;
    layer.forward(x, tape, {.step = 0});
    layer.backward(x, tape);
    Index forward = 0;
    Index backward = 0;
    for (const auto& expert : layer.experts()) {
      forward += expert.network().rows_forward;
      backward += expert.network().rows_backward;
    }
    CHECK(forward == 100 * top_k);
    CHECK(backward == 100 * top_k);
    Index counted = 0;
    for (const Index n : tape.balance().tokens_per_expert) counted += n;
    CHECK(counted == 100 * top_k);
  }
}

TEST_CASE("layer: a user's network has the right gradients", "[layer]") {
  for (const Index top_k : {1, 2, 4}) {
    MoELayer<Expert<SineMap, double>> layer({.width = 3,
                                             .gate = {.experts = 4, .top_k = top_k},
                                             .output = Activation::tanh,
                                             .seed = 5});
    test::randomize(layer, 3, 0.6);
    Matrix<double> x = random_matrix(6, 3, 1);
    MoELayer<Expert<SineMap, double>>::Tape tape;
    layer.forward(x, tape, {.step = 4});
    REQUIRE(test::choice_margin(tape.gate.noisy, top_k) > 1e-3);
    check_against_differences(layer, x, {.step = 4}, random_matrix(6, 3, 2), 0.6, 1);
    CHECK(relative_error(layer.evaluate(x), [&] {
            MoELayer<Expert<SineMap, double>>::Tape served;
            return Matrix<double>(layer.evaluate(x, served));
          }()) == 0);
  }
}

TEST_CASE("layer: a user's gate has the right gradients", "[layer]") {
  MoELayer<Expert<FeedForward, double>, HashGate> layer(
      {.width = 3,
       .expert = {.hidden = 4, .activation = Activation::silu},
       .gate = {.experts = 4},
       .output = Activation::sigmoid,
       .seed = 5});
  Matrix<double> x = random_matrix(11, 3, 1);
  MoELayer<Expert<FeedForward, double>, HashGate>::Tape tape;
  layer.forward(x, tape, {.step = 0});
  CHECK(tape.routing().slots() == 10);
  for (const Index t : {0, 3, 6, 9}) {  // no slots: the sigmoid of zero
    CHECK((tape.y.row(t).array() == 0.5).all());
  }
  CHECK(same_bits(layer.evaluate(x), tape.y));
  check_against_differences(layer, x, {.step = 0}, random_matrix(11, 3, 2), 0.5, 1);
}

TEST_CASE("layer: a user's network and gate go together", "[layer]") {
  MoELayer<Expert<SineMap, double>, HashGate> layer(
      {.width = 3, .gate = {.experts = 4}, .seed = 5});
  Matrix<double> x = random_matrix(9, 3, 1);
  check_against_differences(layer, x, {.step = 0}, random_matrix(9, 3, 2), 0.5, 1);
}

TEST_CASE("layer: a gate's faulty routing is refused", "[layer]") {
  using Broken = MoELayer<Expert<SineMap, double>, BrokenGate>;
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Broken::Config config{.width = 3, .seed = 0};
    config.gate.experts = 3;
    spoil(config.gate);
    Broken layer(config);
    const Matrix<double> x = random_matrix(5, 3, 1);
    Broken::Tape tape;
    CHECK_THROWS_AS(layer.forward(x, tape, {.step = 0}), std::invalid_argument);
    CHECK_THROWS_WITH(layer.forward(x, tape, {.step = 0}), message);
    CHECK_THROWS_WITH(layer.evaluate(x, tape), message);
    CHECK_THROWS_AS(layer.backward(x, tape), std::invalid_argument);
    for (const auto& [name, gradient] : test::gradients_of(layer)) {
      CHECK(gradient.cwiseAbs().maxCoeff() == 0);
    }
  };
  refuse([](auto& gate) { gate.first_expert = 3; }, "moe: Routing.expert = 3, must be in [0, 3)");
  refuse([](auto& gate) { gate.first_expert = -1; }, "moe: Routing.expert = -1, must be in [0, 3)");
  refuse([](auto& gate) { gate.claimed_experts = 4; },
         "moe: MoELayer: the gate's routing has 4 experts, the layer has 3");
  refuse([](auto& gate) { gate.extra_tokens = 1; },
         "moe: MoELayer: the gate's routing has 6 tokens, x has 5");
}

TEST_CASE("layer: a gate that leaves out its part is found out or helped", "[layer]") {
  using Careless = MoELayer<Expert<FeedForward>, CarelessGate>;
  const Matrix<float> x = random_matrix<float>(6, 3, 1);
  Careless::Tape tape;

  Careless harmful({.width = 3, .expert = {.hidden = 4}, .gate = {.shrinks_dx = true}, .seed = 0});
  harmful.forward(x, tape, {.step = 0});
  CHECK_THROWS_WITH(harmful.backward(x, tape),
                    "moe: MoELayer: the gate changed dx to 1 x 3, must be as x, 6 x 3");

  // A gate without a gradient need not touch dx: the experts' share is in it.
  Careless layer({.width = 3, .expert = {.hidden = 4}, .seed = 0});
  layer.forward(x, tape, {.step = 0});
  const Matrix<float> first = layer.backward(x, tape);
  CHECK(first.rows() == 6);
  CHECK(same_bits(layer.backward(x, tape), first));
}
