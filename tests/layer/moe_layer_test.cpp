#include "moe/layer/moe_layer.hpp"

#include <array>
#include <set>
#include <thread>
#include <vector>

#include "../experts/passes.hpp"
#include "../naive_layer.hpp"
#include "moe/optim/adam.hpp"
#include "moe/optim/gradient_clipping.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/shared_expert_gate.hpp"

using namespace moe;
using test::NaiveLayer;
using test::Named;
using test::random_matrix;
using test::relative_error;
using test::same_bits;
using test::Threads;
using Indices = std::vector<Index>;

namespace {

template <class Scalar>
using Layer = MoELayer<Expert<FeedForward, Scalar>>;
template <class Scalar>
using Config = typename Layer<Scalar>::Config;

/// A fused network that writes down whose turn it is and who it is told comes next.
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

/// Largest error over all parameters' gradients, each relative to its largest entry.
double gradient_error(const Named& actual, const Named& expected) {
  REQUIRE(actual.size() == expected.size());
  double largest = 0;
  for (const auto& [name, gradient] : actual) {
    largest = std::max(largest, relative_error(gradient, expected.at(name)));
  }
  return largest;
}

/// dx and the parameters' gradients of ⟨r, y⟩ + balance loss against differences.
template <class Layer>
void check_against_differences(Layer& layer, Matrix<double>& x, const Pass& key,
                               const Matrix<double>& r, double weights, double inputs,
                               double steep = 1.0) {
  const Threads threads(1);  // too small for more
  typename Layer::Tape tape;
  zero_gradients(layer);
  layer.forward(x, tape, key);
  const Matrix<double> dx = layer.backward(r, tape);
  const auto loss = [&] {
    typename Layer::Tape fresh;
    return layer.forward(x, fresh, key).cwiseProduct(r).sum() + fresh.balance().loss;
  };
  test::check_scaled_gradients(layer, dx, x, loss, weights, inputs, steep);
}

/// Puts a layer of feed-forward experts at a point away from ties and kinks and checks it there.
void check_gradients(const Config<double>& config, Index tokens, double weights = 0.7,
                     double inputs = 1.0) {
  INFO("E " << config.gate.experts << ", K " << config.gate.top_k << ", activation "
            << static_cast<int>(config.expert.activation) << ", gated " << config.expert.gated
            << ", output " << static_cast<int>(config.output) << ", loss weights "
            << config.gate.importance_weight << " and " << config.gate.load_weight
            << ", weights times " << weights << ", x times " << inputs);
  Layer<double> layer(config);
  const Pass key{.step = 3, .first_token = 1};
  Matrix<double> x;
  Matrix<double> y;
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 200; ++seed) {
    test::randomize(layer, seed, weights);
    x = random_matrix(tokens, config.width, seed, inputs);
    Layer<double>::Tape tape;
    y = layer.forward(x, tape, key);
    const auto pre = tape.experts.saved.leftCols(config.expert.hidden).cwiseAbs();
    clear =
        test::choice_margin(config.gate.noise ? tape.gate.noisy : tape.gate.clean,
                            config.gate.top_k) > 2e-3 &&
        (config.expert.activation != Activation::relu || pre.minCoeff() > 2e-3 * pre.maxCoeff());
  }
  REQUIRE(clear);
  const Matrix<double> r =
      random_matrix(tokens, config.width, 8) / std::max(1e-3, y.cwiseAbs().maxCoeff());
  check_against_differences(layer, x, key, r, weights, inputs, weights * inputs > 5 ? 0.02 : 1);
}

/// The fast layer against the naive one: results, figures, choice, gradients, evaluation.
template <class Scalar>
void check_against_naive(const Config<Scalar>& config, Index tokens, double deviation = 0.5) {
  INFO("T " << tokens << ", D " << config.width << ", H " << config.expert.hidden << ", E "
            << config.gate.experts << ", K " << config.gate.top_k << ", gated "
            << config.expert.gated);
  const Threads threads(1);
  Layer<Scalar> layer(config);
  const Pass key{.step = (std::uint64_t{7} << 32) + 11, .first_token = 9};
  Matrix<Scalar> x;
  NaiveLayer::Result expected;
  NaiveLayer::Result served;
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 100; ++seed) {
    test::randomize(layer, seed, deviation);
    x = random_matrix<Scalar>(tokens, config.width, seed);
    const NaiveLayer naive(layer);
    expected = naive.forward(x.template cast<double>(), key);
    served = naive.evaluate(x.template cast<double>());
    const double margin = sizeof(Scalar) == sizeof(float) ? 2e-6 : 1e-12;
    clear = test::choice_margin(expected.h, config.gate.top_k) > margin &&
            test::choice_margin(served.h, config.gate.top_k) > margin;
  }
  REQUIRE(clear);
  const double tolerance = 5 * test::tolerance<Scalar>;
  const auto check_pass = [&](const Matrix<Scalar>& y, const auto& tape,
                              const NaiveLayer::Result& pass) {
    CHECK(relative_error(y.template cast<double>().eval(), pass.y) < tolerance);
    CHECK(relative_error(tape.balance().importance.template cast<double>().eval(),
                         pass.importance) < tolerance);
    CHECK(relative_error(tape.balance().load.template cast<double>().eval(), pass.load) <
          tolerance);
    CHECK_THAT(static_cast<double>(tape.balance().loss),
               Catch::Matchers::WithinAbs(pass.loss, tolerance * (1 + pass.loss)));
    Indices choice;
    double weight_error = 0;
    Indices count(detail::to_size(config.gate.experts), 0);
    for (std::size_t t = 0; t < pass.choice.size(); ++t) {
      for (const Index e : pass.choice[t]) {
        weight_error = std::max(
            weight_error, std::abs(pass.weight(static_cast<Index>(t), e) -
                                   static_cast<double>(tape.routing().weight[choice.size()])));
        choice.push_back(e);
        ++count[detail::to_size(e)];
      }
    }
    CHECK(tape.routing().expert == choice);
    CHECK(weight_error < tolerance);
    CHECK(tape.balance().tokens_per_expert == count);
  };

  typename Layer<Scalar>::Tape tape;
  layer.forward(x, tape, key);
  check_pass(tape.y, tape, expected);
  const Matrix<Scalar> r = random_matrix<Scalar>(tokens, config.width, 8);
  const Matrix<Scalar>& dx = layer.backward(r, tape);
  const NaiveLayer naive(layer);
  Named gradients = naive.zero_gradients();
  const Matrix<double> naive_dx = naive.backward(expected, r.template cast<double>(), gradients);
  // The gate's gradients are small differences of larger terms.
  CHECK(relative_error(dx.template cast<double>().eval(), naive_dx) < 20 * tolerance);
  CHECK(gradient_error(test::gradients_of(layer), gradients) < 20 * tolerance);

  typename Layer<Scalar>::Tape serving;
  layer.evaluate(x, serving);
  check_pass(serving.y, serving, served);
  CHECK(same_bits(layer.evaluate(x), serving.y));
}

/// Results and gradients of one training pass, from gradients at zero.
template <class Scalar>
struct Everything {
  Matrix<Scalar> y, dx;
  Scalar loss;
  Named gradients;

  template <class Layer>
  Everything(Layer& layer, const Matrix<Scalar>& x, const Matrix<Scalar>& r) {
    typename Layer::Tape tape;
    zero_gradients(layer);
    y = layer.forward(x, tape, {.step = 2});
    dx = layer.backward(r, tape);
    loss = tape.balance().loss;
    gradients = test::gradients_of(layer);
  }
  bool same_as(const Everything& other) const {
    bool same = same_bits(y, other.y) && same_bits(dx, other.dx) && loss == other.loss;
    for (const auto& [name, gradient] : gradients) {
      same = same && same_bits(gradient, other.gradients.at(name));
    }
    return same;
  }
};

/// A layer that sends every token with a positive first entry to expert `favourite`.
template <class Scalar>
void collapse(Layer<Scalar>& layer, Index favourite) {
  for_each_parameter(layer, [&](const std::string& name, Parameter<Scalar>& parameter) {
    if (name == "gate.weight") parameter.value(0, favourite) += Scalar{100};
  });
}
template <class Scalar>
Matrix<Scalar> with_positive_first_entry(Matrix<Scalar> x) {
  x.col(0) = (x.col(0).array().abs() + 1).matrix();
  return x;
}

// ---- What users plug in.

/// A user's network with a single matrix, y = sin(x)·W, which counts the rows it is handed.
template <class Scalar_>
struct SineMap {
  using Scalar = Scalar_;
  struct Config {
    Index width = 0;
  };

  explicit SineMap(const Config& config, std::uint64_t seed) : w(config.width, config.width) {
    fill_normal(w.value, static_cast<Scalar>(0.6), seed);
  }
  Index tape_width() const { return 0; }
  void forward(ConstMatrixView<Scalar> x, MatrixView<Scalar>, MatrixView<Scalar> y) const {
    evaluate(x, y);
  }
  void evaluate(ConstMatrixView<Scalar> x, MatrixView<Scalar> y) const {
    rows_forward += x.rows();
    ++calls;
    y = x.array().sin().matrix() * w.value;
  }
  void backward(ConstMatrixView<Scalar> x, ConstMatrixView<Scalar>, ConstMatrixView<Scalar> dy,
                MatrixView<Scalar> dx) {
    rows_backward += x.rows();
    ++calls;
    w.gradient() += x.array().sin().matrix().transpose() * dy;
    dx = (dy * w.value.transpose()).cwiseProduct(x.array().cos().matrix());
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("w", self.w);
  }

  Parameter<Scalar> w;
  mutable Index rows_forward = 0;
  mutable Index calls = 0;
  Index rows_backward = 0;
};

/// A user's gate: token t goes to t mod 3 experts, which have learned weights, times 1 + Σ x_t.
struct HashGate {
  using Scalar = double;
  struct Config {
    Index width = 0;
    Index experts = 0;
  };
  using Tape = GateTape<double>;

  explicit HashGate(const Config& config, std::uint64_t) : strength(1, config.experts) {
    for (Index e = 0; e < config.experts; ++e)
      strength.value(0, e) = 0.5 + 0.3 * static_cast<double>(e);
  }
  Index experts() const { return strength.value.cols(); }
  void forward(const MatrixRef<double>& x, Tape& tape, const Pass&) const { evaluate(x, tape); }
  void evaluate(const MatrixRef<double>& x, Tape& tape, const EvaluationPass& = {}) const {
    Routing<double>& routing = tape.routing;
    routing.experts = experts();
    routing.token_offsets = {0};
    routing.expert.clear();
    routing.weight.clear();
    for (Index t = 0; t < x.rows(); ++t) {
      Indices chosen;
      for (Index k = 0; k < t % 3; ++k) chosen.push_back((5 * t + 2 * k) % experts());
      std::sort(chosen.begin(), chosen.end());
      for (const Index e : chosen) {
        routing.expert.push_back(e);
        routing.weight.push_back(strength.value(0, e) * (1 + x.row(t).sum()));
      }
      routing.token_offsets.push_back(routing.slots());
    }
    tape.balance.loss = strength.value.squaredNorm();
  }
  void backward(const MatrixRef<double>& x, std::span<const double> dweight, Tape& tape,
                Matrix<double>& dx) {
    for (Index t = 0; t < x.rows(); ++t) {
      for (Index s = tape.routing.token_offsets[detail::to_size(t)];
           s < tape.routing.token_offsets[detail::to_size(t) + 1]; ++s) {
        const Index e = tape.routing.expert[detail::to_size(s)];
        const double d = dweight[detail::to_size(s)];
        strength.gradient()(0, e) += d * (1 + x.row(t).sum());
        dx.row(t).array() += d * strength.value(0, e);
      }
    }
    strength.gradient() += 2 * strength.value;
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("strength", self.strength);
  }

  Parameter<double> strength;
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

// ---- Gradients.

TEST_CASE("layer: gradients are derivatives for every number of experts", "[layer]") {
  for (const Index experts : {1, 2, 3, 5, 12}) {
    for (const Index top_k : std::set<Index>{1, std::min<Index>(2, experts), experts}) {
      Config<double> config{.width = 3,
                            .expert = {.hidden = 4, .activation = Activation::gelu},
                            .gate = {.experts = experts, .top_k = top_k},
                            .seed = 6};
      config.gate.importance_weight = 0.7;
      config.gate.load_weight = 1.3;
      check_gradients(config, 5);
    }
  }
}

TEST_CASE("layer: gradients are derivatives for every activation and form", "[layer]") {
  for (const Activation activation : test::all_activations()) {
    for (const bool gated : {false, true}) {
      check_gradients({.width = 3,
                       .expert = {.hidden = 4, .activation = activation, .gated = gated},
                       .gate = {.experts = 4, .top_k = 2},
                       .seed = 6},
                      4);
    }
  }
}

TEST_CASE("layer: gradients are derivatives for every output activation", "[layer]") {
  for (const Activation output : test::all_activations()) {
    if (output == Activation::relu) continue;  // its kink is met below, away from zero
    check_gradients({.width = 3,
                     .expert = {.hidden = 4, .activation = Activation::tanh},
                     .gate = {.experts = 4, .top_k = 2},
                     .output = output,
                     .seed = 6},
                    4);
  }
}

TEST_CASE("layer: the gradient of a ReLU at the output stops where y is zero", "[layer]") {
  Layer<double> layer({.width = 3,
                       .expert = {.hidden = 4},
                       .gate = {.experts = 3, .top_k = 2},
                       .output = Activation::relu,
                       .seed = 6});
  test::randomize(layer, 3);
  Layer<double>::Tape tape;
  const Matrix<double> y = layer.forward(random_matrix(20, 3, 1), tape, {.step = 0});
  const NaiveLayer naive(layer);
  const NaiveLayer::Result pass = naive.forward(random_matrix(20, 3, 1), {.step = 0});
  CHECK(relative_error(y, pass.y) < 1e-13);
  CHECK(y.minCoeff() == 0);
  CHECK(y.maxCoeff() > 0);
  const Matrix<double> r = random_matrix(20, 3, 2);
  Named gradients = naive.zero_gradients();
  const Matrix<double> dx = naive.backward(pass, r, gradients);
  CHECK(relative_error(layer.backward(r, tape), dx) < 1e-12);
  CHECK(gradient_error(test::gradients_of(layer), gradients) < 1e-12);
}

TEST_CASE("layer: gradients are derivatives for every pair of loss weights", "[layer]") {
  for (const double importance : {0.0, 0.9}) {
    for (const double load : {0.0, 1.7}) {
      for (const Index top_k : {1, 2}) {
        Config<double> config{.width = 3,
                              .expert = {.hidden = 4, .activation = Activation::silu},
                              .gate = {.experts = 4, .top_k = top_k},
                              .seed = 6};
        config.gate.importance_weight = importance;
        config.gate.load_weight = load;
        check_gradients(config, 5);
      }
    }
  }
}

TEST_CASE("layer: gradients are derivatives at every scale", "[layer]") {
  for (const Activation activation : {Activation::relu, Activation::silu}) {
    for (const double weights : {1e-2, 1.0, 10.0}) {
      for (const double inputs : {1e-2, 1.0, 10.0}) {
        Config<double> config{.width = 2,
                              .expert = {.hidden = 3, .activation = activation},
                              .gate = {.experts = 4, .top_k = 2},
                              .seed = 6};
        config.gate.noise_floor = 0.05;
        config.gate.importance_weight = 1;
        config.gate.load_weight = 1;
        check_gradients(config, 3, weights, inputs);
      }
    }
  }
}

TEST_CASE("layer: gradients without the threshold's share would be seen to be wrong", "[layer]") {
  Config<double> config{
      .width = 3, .expert = {.hidden = 4}, .gate = {.experts = 5, .top_k = 2}, .seed = 6};
  config.gate.load_weight = 1;
  Layer<double> layer(config);
  test::randomize(layer, 4, 0.5);
  const Matrix<double> x = random_matrix(10, 3, 2);
  const Matrix<double> r = random_matrix(10, 3, 3);
  const Everything<double> fast(layer, x, r);
  const NaiveLayer naive(layer);
  const NaiveLayer::Result pass = naive.forward(x, {.step = 2});
  Named with = naive.zero_gradients();
  Named without = naive.zero_gradients();
  naive.backward(pass, r, with, true);
  naive.backward(pass, r, without, false);
  CHECK(gradient_error(fast.gradients, with) < 1e-12);
  for (const char* name : {"gate.weight", "gate.noise_weight"}) {
    CHECK(relative_error(fast.gradients.at(name), without.at(name)) > 1e-3);
  }
}

TEST_CASE("layer: backward adds to the gradients and can be called again", "[layer]") {
  Layer<double> layer({.width = 3,
                       .expert = {.hidden = 4},
                       .gate = {.experts = 5, .top_k = 2},
                       .output = Activation::sigmoid,
                       .seed = 6});
  test::randomize(layer, 4, 0.5);
  Layer<double>::Tape tape;
  layer.forward(random_matrix(10, 3, 2), tape, {.step = 0});
  const Matrix<double> r = random_matrix(10, 3, 3);
  const Matrix<double> dx = layer.backward(r, tape);
  Named once = test::gradients_of(layer);
  CHECK(same_bits(layer.backward(r, tape), dx));
  for (auto& [name, gradient] : once) gradient *= 2;
  CHECK(gradient_error(test::gradients_of(layer), once) < 1e-13);
}

TEST_CASE("layer: several passes in flight do not disturb each other", "[layer]") {
  Layer<double> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 5, .top_k = 2}, .seed = 6});
  test::randomize(layer, 4, 0.5);
  const Matrix<double> x1 = random_matrix(10, 3, 1);
  const Matrix<double> x2 = random_matrix(7, 3, 2);
  const Everything<double> first(layer, x1, x1);
  const Everything<double> second(layer, x2, x2);
  Layer<double>::Tape tape1;
  Layer<double>::Tape tape2;
  zero_gradients(layer);
  layer.forward(x1, tape1, {.step = 2});
  layer.forward(x2, tape2, {.step = 2});
  layer.evaluate(x2);
  CHECK(same_bits(layer.backward(x1, tape1), first.dx));
  CHECK(same_bits(layer.backward(x2, tape2), second.dx));
  Named sum = first.gradients;
  for (auto& [name, gradient] : sum) gradient += second.gradients.at(name);
  CHECK(gradient_error(test::gradients_of(layer), sum) < 1e-13);
}

// ---- The naive layer.

TEMPLATE_TEST_CASE("layer: equals the naive layer at every shape", "[layer]", float, double) {
  for (const Index tokens : {1, 2, 17}) {
    for (const Index experts : {1, 2, 5, 16, 19}) {
      for (const Index top_k : std::set<Index>{1, std::min<Index>(3, experts), experts}) {
        check_against_naive<TestType>(
            {.width = 1 + (tokens + experts) % 7,
             .expert = {.hidden = 1 + (tokens * experts) % 19,
                        .activation = Activation::gelu,
                        .gated = (tokens + top_k) % 2 == 1},
             .gate = {.experts = experts, .top_k = top_k},
             .output = top_k % 2 == 0 ? Activation::sigmoid : Activation::identity,
             .seed = 12},
            tokens);
      }
    }
  }
}

TEMPLATE_TEST_CASE("layer: equals the naive layer where blocks and tiles end", "[layer]", float,
                   double) {
  for (const Index tokens : {63, 64, 65, 129}) {
    check_against_naive<TestType>({.width = 50,
                                   .expert = {.hidden = 33, .activation = Activation::silu},
                                   .gate = {.experts = 3, .top_k = 2},
                                   .seed = 5},
                                  tokens, 0.2);
  }
}

TEMPLATE_TEST_CASE("layer: equals the naive layer where the tape's rows are spread", "[layer]",
                   float, double) {
  for (const bool gated : {false, true}) {
    const auto kept = static_cast<Index>(1024 / sizeof(TestType));
    REQUIRE(detail::padded_stride<TestType>(kept) > kept);
    check_against_naive<TestType>({.width = 6,
                                   .expert = {.hidden = gated ? kept / 2 : kept, .gated = gated},
                                   .gate = {.experts = 3, .top_k = 2},
                                   .seed = 5},
                                  70, 0.1);
  }
}

TEMPLATE_TEST_CASE("layer: equals the naive layer without noise", "[layer]", float, double) {
  Config<TestType> config{.width = 6,
                          .expert = {.hidden = 5},
                          .gate = {.experts = 7, .top_k = 3, .noise = false},
                          .seed = 5};
  check_against_naive<TestType>(config, 20);
}

// ---- Bits.

TEMPLATE_TEST_CASE("layer: has the same bits on any number of threads", "[layer]", float, double) {
  using S = TestType;
  for (const bool overloaded : {false, true}) {
    for (const bool gated : {false, true}) {
      // Hidden rows of several panels, so that every way of splitting the work happens.
      const Index hidden = overloaded ? 2 * detail::panel_columns<S> + 5 : Index{70};
      Layer<S> layer(
          {.width = 40,
           .expert = {.hidden = hidden, .gated = gated, .recompute = gated && overloaded},
           .gate = {.experts = 6, .top_k = 2},
           .output = gated ? Activation::sigmoid : Activation::identity,
           .seed = 5});
      test::randomize(layer, 7, 0.1);
      if (overloaded) collapse(layer, 3);
      const Matrix<S> x = with_positive_first_entry(random_matrix<S>(700, 40, 1));
      const Matrix<S> r = random_matrix<S>(700, 40, 2);
      const auto run = [&](int count) {
        const Threads threads(count);
        return std::pair{Everything<S>(layer, x, r), layer.evaluate(x)};
      };
      const auto one = run(1);
      for (const int count : {2, 3, 8}) {
        INFO(count << " threads, overloaded " << overloaded << ", gated " << gated);
        const auto several = run(count);
        CHECK(several.first.same_as(one.first));
        CHECK(same_bits(several.second, one.second));
      }
      if (overloaded) {
        typename Layer<S>::Tape tape;
        layer.forward(x, tape, {.step = 0});
        CHECK(tape.dispatch.slots_of(3) == 700);
      }
    }
  }
}

TEMPLATE_TEST_CASE("layer: a token has the same bits alone and in a batch", "[layer]", float,
                   double) {
  using S = TestType;
  for (const bool gated : {false, true}) {
    Layer<S> layer({.width = 21,
                    .expert = {.hidden = 35, .activation = Activation::gelu, .gated = gated},
                    .gate = {.experts = 4, .top_k = 2},
                    .output = Activation::tanh,
                    .seed = 5});
    test::randomize(layer, 7, 0.3);
    const Matrix<S> x = random_matrix<S>(700, 21, 1);
    const Matrix<S> whole = layer.evaluate(x);
    for (const Index t : {0, 1, 63, 64, 350, 699}) {
      CHECK(same_bits(layer.evaluate(x.row(t)), whole.row(t)));
    }
    CHECK(same_bits(layer.evaluate(x.middleRows(100, 333)), whole.middleRows(100, 333)));
  }
}

TEMPLATE_TEST_CASE("layer: a training batch in two halves has the bits of the whole", "[layer]",
                   float, double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 21, .expert = {.hidden = 35}, .gate = {.experts = 4, .top_k = 2}, .seed = 5});
  test::randomize(layer, 7, 0.3);
  const Matrix<S> x = random_matrix<S>(700, 21, 1);
  typename Layer<S>::Tape tape;
  const Matrix<S> whole = layer.forward(x, tape, {.step = 8});
  for (const Index split : {1, 313}) {
    typename Layer<S>::Tape top;
    typename Layer<S>::Tape bottom;
    CHECK(same_bits(layer.forward(x.topRows(split), top, {.step = 8}), whole.topRows(split)));
    CHECK(same_bits(layer.forward(x.bottomRows(700 - split), bottom,
                                  {.step = 8, .first_token = static_cast<std::uint32_t>(split)}),
                    whole.bottomRows(700 - split)));
  }
  typename Layer<S>::Tape other;
  CHECK_FALSE(same_bits(layer.forward(x, other, {.step = 9}), whole));
}

TEMPLATE_TEST_CASE("layer: a pass replays and a used tape is as good as a new one", "[layer]",
                   float, double) {
  using S = TestType;
  Layer<S> layer({.width = 5,
                  .expert = {.hidden = 6},
                  .gate = {.experts = 4, .top_k = 2},
                  .output = Activation::sigmoid,
                  .seed = 5});
  test::randomize(layer, 7, 0.3);
  const Matrix<S> x = random_matrix<S>(50, 5, 1);
  const Everything<S> fresh(layer, x, x);
  typename Layer<S>::Tape tape;
  layer.forward(random_matrix<S>(80, 5, 2), tape, {.step = 1});
  layer.backward(random_matrix<S>(80, 5, 3), tape);
  layer.evaluate(random_matrix<S>(20, 5, 2), tape);
  zero_gradients(layer);
  CHECK(same_bits(layer.forward(x, tape, {.step = 2}), fresh.y));
  CHECK(same_bits(layer.backward(x, tape), fresh.dx));
  CHECK(gradient_error(test::gradients_of(layer), fresh.gradients) == 0);
}

TEMPLATE_TEST_CASE("layer: takes rows of a wider matrix as they are", "[layer]", float, double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 5, .expert = {.hidden = 6}, .gate = {.experts = 4, .top_k = 2}, .seed = 5});
  test::randomize(layer, 7, 0.3);
  const Matrix<S> wide = random_matrix<S>(50, 13, 1);
  const Matrix<S> x = wide.middleCols(4, 5);
  const Matrix<S> r = wide.rightCols(5);
  const Everything<S> compact(layer, x, r);
  zero_gradients(layer);
  typename Layer<S>::Tape tape;
  CHECK(same_bits(layer.forward(wide.middleCols(4, 5), tape, {.step = 2}), compact.y));
  CHECK(same_bits(layer.backward(wide.rightCols(5), tape), compact.dx));
  CHECK(gradient_error(test::gradients_of(layer), compact.gradients) == 0);
  CHECK(same_bits(layer.evaluate(wide.middleCols(4, 5)), layer.evaluate(x)));
}

// ---- Edges.

TEMPLATE_TEST_CASE("layer: no tokens are no work", "[layer]", float, double) {
  using S = TestType;
  Layer<S> layer({.width = 3,
                  .expert = {.hidden = 4},
                  .gate = {.experts = 4, .top_k = 2},
                  .output = Activation::sigmoid,
                  .seed = 5});
  test::randomize(layer, 1);
  const Matrix<S> none(0, 3);
  typename Layer<S>::Tape tape;
  CHECK(layer.forward(none, tape, {.step = 0}).rows() == 0);
  CHECK(tape.y.cols() == 3);
  CHECK(tape.routing().slots() == 0);
  CHECK(tape.balance().loss == 0);
  CHECK(tape.balance().unused_experts() == 4);
  const Matrix<S>& dx = layer.backward(none, tape);
  CHECK(dx.rows() == 0);
  CHECK(dx.cols() == 3);
  for (const auto& [name, gradient] : test::gradients_of(layer)) {
    INFO(name);
    CHECK(gradient.cwiseAbs().maxCoeff() == 0);
  }
  CHECK(layer.evaluate(none).rows() == 0);
  CHECK(layer.evaluate(none).cols() == 3);
}

TEMPLATE_TEST_CASE("layer: a single expert is that expert", "[layer]", float, double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 1, .top_k = 1}, .seed = 5});
  test::randomize(layer, 1);
  const Matrix<S> x = random_matrix<S>(300, 3, 1);
  test::Passes<S> passes(layer.experts()[0], GatheredRows<S>(x));
  const Matrix<S> expected = passes.evaluate(layer.experts()[0]);
  typename Layer<S>::Tape tape;
  CHECK(same_bits(layer.forward(x, tape, {.step = 0}), expected));
  CHECK(tape.balance().loss == 0);
  CHECK(tape.balance().load[0] == 300);
  CHECK(tape.balance().importance[0] == 300);
  layer.backward(x, tape);
  CHECK(test::gradients_of(layer)["gate.weight"].cwiseAbs().maxCoeff() == 0);
  CHECK(test::gradients_of(layer)["gate.noise_weight"].cwiseAbs().maxCoeff() == 0);
}

TEMPLATE_TEST_CASE("layer: all tokens can go to one expert", "[layer]", float, double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 5, .top_k = 1}, .seed = 5});
  collapse(layer, 2);
  const Matrix<S> x = with_positive_first_entry(random_matrix<S>(300, 3, 1));
  typename Layer<S>::Tape tape;
  layer.forward(x, tape, {.step = 0});
  CHECK(tape.dispatch.offsets == Indices{0, 0, 0, 300, 300, 300});
  CHECK(tape.balance().unused_experts() == 4);
  CHECK_THAT(static_cast<double>(tape.balance().cv_importance()),
             Catch::Matchers::WithinAbs(2, 1e-6));
  CHECK_THAT(static_cast<double>(tape.balance().max_over_mean_load()),
             Catch::Matchers::WithinAbs(5, 1e-5));
  const NaiveLayer::Result expected =
      NaiveLayer(layer).forward(x.template cast<double>(), {.step = 0});
  CHECK(relative_error(tape.y.template cast<double>().eval(), expected.y) < test::tolerance<S>);
}

TEMPLATE_TEST_CASE("layer: equal scores go to the first experts", "[layer]", float, double) {
  const Layer<TestType> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 5, .top_k = 3}, .seed = 5});
  typename Layer<TestType>::Tape tape;
  layer.evaluate(random_matrix<TestType>(4, 3, 1), tape);
  CHECK(tape.dispatch.offsets == Indices{0, 4, 8, 12, 12, 12});
  CHECK(tape.balance().unused_experts() == 2);
}

TEMPLATE_TEST_CASE("layer: NaN and infinity reach their own token and no other", "[layer]", float,
                   double) {
  using S = TestType;
  for (const S bad : {std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::infinity(),
                      -std::numeric_limits<S>::infinity()}) {
    for (const bool gated : {false, true}) {
      Layer<S> layer({.width = 3,
                      .expert = {.hidden = 4, .gated = gated},
                      .gate = {.experts = 6, .top_k = 2},
                      .output = gated ? Activation::sigmoid : Activation::identity,
                      .seed = 5});
      test::randomize(layer, 1);
      const Matrix<S> x = random_matrix<S>(150, 3, 1);
      Matrix<S> spoilt = x;
      spoilt(70, 1) = bad;
      typename Layer<S>::Tape tape;
      const auto check = [&](const Matrix<S>& y, const Matrix<S>& expected) {
        CHECK(y.row(70).array().isNaN().all());
        CHECK(same_bits(y.topRows(70), expected.topRows(70)));
        CHECK(same_bits(y.bottomRows(79), expected.bottomRows(79)));
      };
      const Matrix<S> trained = layer.forward(x, tape, {.step = 0});
      check(layer.forward(spoilt, tape, {.step = 0}), trained);
      CHECK(std::isnan(tape.balance().loss));
      CHECK(tape.routing().slots() == 300);
      const Matrix<S> dx = layer.backward(x, tape);
      CHECK(dx.row(70).array().isNaN().any());
      check(layer.evaluate(spoilt, tape), layer.evaluate(x));
      CHECK(std::isnan(tape.balance().loss));
    }
  }
}

TEST_CASE("layer: experts without a token are neither run nor trained", "[layer]") {
  MoELayer<Expert<SineMap, double>> layer(
      {.width = 3, .gate = {.experts = 5, .top_k = 2, .noise = false}, .seed = 5});
  const Matrix<double> x = random_matrix(40, 3, 1);
  MoELayer<Expert<SineMap, double>>::Tape tape;
  layer.forward(x, tape, {.step = 0});  // equal scores: experts 0 and 1
  layer.backward(x, tape);
  layer.evaluate(x, tape);
  for (Index e = 0; e < 5; ++e) {
    const SineMap<double>& network = layer.experts()[detail::to_size(e)].network();
    CHECK(network.calls == (e < 2 ? 3 : 0));
    CHECK(network.rows_forward == (e < 2 ? 80 : 0));
    CHECK(network.rows_backward == (e < 2 ? 40 : 0));
    CHECK((network.w.gradient().cwiseAbs().maxCoeff() == 0) == (e >= 2));
  }
}

TEMPLATE_TEST_CASE("layer: lazy updates leave the experts without tokens alone", "[layer]", float,
                   double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 4, .expert = {.hidden = 6}, .gate = {.experts = 5, .top_k = 1}, .seed = 2});
  collapse(layer, 3);
  const test::Named before = test::values_of(layer);
  Adam<S> adam({.weight_decay = 0.1, .updates = Updates::lazy});
  typename Layer<S>::Tape tape;
  const Matrix<S> x = with_positive_first_entry(random_matrix<S>(9, 4, 1));
  for (std::uint64_t step = 1; step <= 3; ++step) {
    zero_gradients(layer, Updates::lazy);
    layer.forward(x, tape, {.step = step});
    REQUIRE(tape.dispatch.slots_of(3) == 9);
    layer.backward(x, tape);
    clip_gradients(layer, 1e-3, Updates::lazy);
    adam.update(layer, 1e-3);
  }
  for (const auto& [name, value] : test::values_of(layer)) {
    INFO(name);
    if (!name.starts_with("experts.")) continue;
    CHECK(same_bits(value, before.at(name)) == !name.starts_with("experts.3."));
  }
}

/// Gradients of some updates of different batches, cleared before each.
template <class L>
std::vector<test::Named> gradients_of_updates(L layer, Updates zeroing) {
  using S = typename L::Scalar;
  std::vector<test::Named> gradients;
  typename L::Tape tape;
  // Many rows an expert, then few, then experts without any.
  for (const Index tokens : {420, 20, 300, 3, 250}) {
    const auto step = static_cast<std::uint64_t>(tokens);
    const Matrix<S> x = random_matrix<S>(tokens, layer.config().width, step);
    zero_gradients(layer, zeroing);
    layer.forward(x, tape, {.step = step});
    layer.backward(random_matrix<S>(tokens, layer.config().width, step + 1), tape);
    // A copy is looked at, so that looking puts no zeros where the next update finds old numbers.
    L shown = layer;
    gradients.push_back(test::gradients_of(shown));
  }
  return gradients;
}

TEMPLATE_TEST_CASE("layer: gradients cleared lazily are written over", "[layer]", float, double) {
  using S = TestType;
  const auto check = [](const auto& layer) {
    const auto expected = gradients_of_updates(layer, Updates::dense);
    for (const int count : {1, 3}) {
      const Threads threads(count);
      const auto gradients = gradients_of_updates(layer, Updates::lazy);
      for (std::size_t update = 0; update < expected.size(); ++update) {
        INFO("update " << update << ", " << count << " threads");
        for (const auto& [name, gradient] : expected[update]) {
          INFO(name);
          CHECK(same_bits(gradients[update].at(name), gradient));
        }
      }
    }
  };
  for (const bool gated : {false, true}) {
    // The hidden rows are so long that one worker takes a slice in two groups.
    Layer<S> layer({.width = 8,
                    .expert = {.hidden = gated ? 520 : 1040, .gated = gated, .recompute = gated},
                    .gate = {.experts = 3, .top_k = 2},
                    .seed = 5});
    test::randomize(layer, 7, 0.1);
    check(layer);
  }
  MoELayer<Expert<SineMap, S>> plain({.width = 6, .gate = {.experts = 5, .top_k = 2}, .seed = 5});
  test::randomize(plain, 7, 0.3);
  check(plain);
}

TEMPLATE_TEST_CASE(
    "layer: computing the pre-activations again gives the same bits, and save nothing", "[layer]",
    float, double) {
  using S = TestType;
  for (const bool gated : {false, true}) {
    const auto layer_that = [&](bool recomputes) {
      Layer<S> layer({.width = 24,
                      .expert = {.hidden = 70,
                                 .activation = gated ? Activation::silu : Activation::relu,
                                 .gated = gated,
                                 .recompute = recomputes},
                      .gate = {.experts = 3, .top_k = 2},
                      .seed = 5});
      test::randomize(layer, 7, 0.1);
      return layer;
    };
    Layer<S> keeping = layer_that(false);
    Layer<S> recomputing = layer_that(true);
    const Matrix<S> x = random_matrix<S>(400, 24, 1);
    const Matrix<S> r = random_matrix<S>(400, 24, 2);
    CHECK(Everything<S>(recomputing, x, r).same_as(Everything<S>(keeping, x, r)));
    typename Layer<S>::Tape tape;
    recomputing.forward(x, tape, {.step = 0});
    CHECK(tape.experts.saved.size() == 0);
    keeping.forward(x, tape, {.step = 0});
    CHECK(tape.experts.saved.size() >= 800 * 70);
  }
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

// ---- What users plug in.

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
  refuse([](auto& gate) { gate.first_expert = 3; }, "moe: Routing.expert = 3 with 3 experts");
  refuse([](auto& gate) { gate.first_expert = -1; }, "moe: Routing.expert = -1 with 3 experts");
  refuse([](auto& gate) { gate.claimed_experts = 4; },
         "moe: MoELayer: the gate's routing has 4 experts, the layer has 3");
  refuse([](auto& gate) { gate.extra_tokens = 1; },
         "moe: MoELayer: the gate's routing has 6 tokens, x has 5");
}

// ---- Names and bad calls.

TEST_CASE("layer: the documented spelling compiles and names its parameters in order", "[layer]") {
  moe::MoELayer<moe::Expert<moe::FeedForward>> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 2, .top_k = 1}, .seed = 1});
  static_assert(std::same_as<decltype(layer)::Scalar, float>);
  const auto names = [](const auto& module) {
    std::vector<std::string> list;
    for_each_parameter(module, [&](const std::string& name, const auto&) { list.push_back(name); });
    return list;
  };
  CHECK(names(layer) == std::vector<std::string>{"gate.weight", "gate.noise_weight",
                                                 "experts.0.up.weight", "experts.0.up.bias",
                                                 "experts.0.down.weight", "experts.0.down.bias",
                                                 "experts.1.up.weight", "experts.1.up.bias",
                                                 "experts.1.down.weight", "experts.1.down.bias"});
  moe::MoELayer<moe::Expert<moe::FeedForward, double>> gated(
      {.width = 3,
       .expert = {.hidden = 4, .gated = true},
       .gate = {.experts = 1, .top_k = 1},
       .seed = 0});
  CHECK(names(gated) == std::vector<std::string>{"gate.weight", "gate.noise_weight",
                                                 "experts.0.gate.weight", "experts.0.up.weight",
                                                 "experts.0.down.weight"});
  MoELayer<Expert<SineMap, double>, HashGate> plugged(
      {.width = 3, .gate = {.experts = 1}, .seed = 0});
  CHECK(names(plugged) == std::vector<std::string>{"gate.strength", "experts.0.w"});
}

TEST_CASE("layer: experts start apart and the seed decides how", "[layer]") {
  const auto start = [](std::uint64_t seed) {
    return test::values_of(Layer<float>(
        {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 2, .top_k = 1}, .seed = seed}));
  };
  Named one = start(1);
  CHECK(one == start(1));
  CHECK(one != start(2));
  CHECK(one["experts.0.up.weight"] != one["experts.1.up.weight"]);
  CHECK(one["gate.weight"].cwiseAbs().maxCoeff() == 0);
}

TEST_CASE("layer: a bad configuration is refused with its field and numbers", "[layer]") {
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config<float> config{
        .width = 4, .expert = {.hidden = 3}, .gate = {.experts = 6, .top_k = 2}, .seed = 0};
    CHECK_NOTHROW(Layer<float>(config));
    spoil(config);
    CHECK_THROWS_AS(Layer<float>(config), std::invalid_argument);
    CHECK_THROWS_WITH(Layer<float>(config), message);
  };
  refuse([](auto& c) { c.width = 0; }, "moe: MoELayer::Config.width = 0, must be at least 1");
  refuse([](auto& c) { c.expert.width = 5; },
         "moe: MoELayer::Config.expert.width = 5, must be 0 or Config.width = 4");
  refuse([](auto& c) { c.gate.width = 3; },
         "moe: MoELayer::Config.gate.width = 3, must be 0 or Config.width = 4");
  refuse([](auto& c) { c.expert.hidden = 0; },
         "moe: FeedForward::Config.hidden = 0, must be at least 1");
  refuse([](auto& c) { c.gate.experts = 0; },
         "moe: NoisyTopKGate::Config.experts = 0, must be at least 1");
  refuse([](auto& c) { c.gate.top_k = 7; },
         "moe: NoisyTopKGate::Config.top_k = 7, must be from 1 to experts = 6");
  CHECK_NOTHROW(Layer<float>({.width = 4,
                              .expert = {.width = 4, .hidden = 3},
                              .gate = {.width = 4, .experts = 6, .top_k = 2},
                              .seed = 0}));
  using Hashed = MoELayer<Expert<SineMap, double>, HashGate>;
  CHECK_THROWS_WITH(Hashed({.width = 3, .gate = {.experts = 0}, .seed = 0}),
                    "moe: MoELayer: the gate has 0 experts, must be at least 1");
}

TEST_CASE("layer: a bad input is refused and changes nothing", "[layer]") {
  Layer<double> layer({.width = 3,
                       .expert = {.hidden = 4},
                       .gate = {.experts = 5, .top_k = 2},
                       .output = Activation::sigmoid,
                       .seed = 6});
  test::randomize(layer, 4, 0.5);
  const Matrix<double> x = random_matrix(10, 3, 2);
  const Everything<double> expected(layer, x, x);
  zero_gradients(layer);

  const std::string no_forward = "moe: MoELayer::backward without a forward pass on this tape";
  Layer<double>::Tape tape;
  CHECK_THROWS_AS(layer.backward(x, tape), std::invalid_argument);
  CHECK_THROWS_WITH(layer.backward(x, tape), no_forward);
  CHECK_THROWS_WITH(layer.backward(x.topRows(0), tape), no_forward);

  layer.forward(x, tape, {.step = 2});
  const Matrix<double> wide = random_matrix(10, 4, 2);
  CHECK_THROWS_AS(layer.forward(wide, tape, {.step = 0}), std::invalid_argument);
  CHECK_THROWS_WITH(layer.forward(wide, tape, {.step = 0}),
                    "moe: MoELayer: x has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(layer.evaluate(wide, tape), "moe: MoELayer: x has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(layer.evaluate(wide), "moe: MoELayer: x has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(layer.backward(wide, tape),
                    "moe: MoELayer: dy has 4 columns, Config.width = 3");
  CHECK_THROWS_WITH(layer.backward(x.topRows(9), tape), "moe: MoELayer: dy has 9 rows, y has 10");
  for (const auto& [name, gradient] : test::gradients_of(layer)) {
    CHECK(gradient.cwiseAbs().maxCoeff() == 0);
  }
  CHECK(same_bits(tape.y, expected.y));
  CHECK(tape.balance().loss == expected.loss);
  CHECK(same_bits(layer.backward(x, tape), expected.dx));  // the tape is as good as before
  CHECK(gradient_error(test::gradients_of(layer), expected.gradients) == 0);

  layer.evaluate(x, tape);
  CHECK_THROWS_WITH(layer.backward(x, tape), no_forward);
  layer.evaluate(x.topRows(0), tape);
  CHECK_THROWS_WITH(layer.backward(x.topRows(0), tape), no_forward);
}

TEST_CASE("layer: a const layer serves and trains in several threads at once", "[layer]") {
  Layer<float> layer(
      {.width = 9, .expert = {.hidden = 12}, .gate = {.experts = 6, .top_k = 2}, .seed = 1});
  test::randomize(layer, 1);
  const Layer<float>& shared = layer;
  const Matrix<float> x = test::random_matrix<float>(70, 9, 2);
  Layer<float>::Tape tape;
  const Matrix<float> served = shared.evaluate(x);
  const Matrix<float> trained = shared.forward(x, tape, {.step = 3});

  std::array<bool, 4> same{};
  std::vector<std::thread> threads;
  for (bool& mine : same) {
    threads.emplace_back([&] {
      Layer<float>::Tape own;
      mine = true;
      for (int i = 0; i < 5; ++i) {
        mine = mine && same_bits(shared.evaluate(x), served) &&
               same_bits(shared.forward(x, own, {.step = 3}), trained);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(same == std::array{true, true, true, true});
}

namespace {

/// y = x·W by Eigen's own product, as a user would write it.
template <class S>
class OwnProduct {
 public:
  using Scalar = S;
  struct Config {
    Index width = 0;
  };
  explicit OwnProduct(const Config& config, std::uint64_t seed)
      : weight_(config.width, config.width) {
    fill_uniform(weight_.value, S{1}, seed);
  }
  Index tape_width() const { return 0; }
  void forward(ConstMatrixView<S> x, MatrixView<S>, MatrixView<S> y) const { evaluate(x, y); }
  void evaluate(ConstMatrixView<S> x, MatrixView<S> y) const { y.noalias() = x * weight_.value; }
  void backward(ConstMatrixView<S> x, ConstMatrixView<S>, ConstMatrixView<S> dy, MatrixView<S> dx) {
    weight_.gradient().noalias() += x.transpose() * dy;
    dx.noalias() = dy * weight_.value.transpose();
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight_);
  }

 private:
  Parameter<S> weight_;
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

TEST_CASE("layer: forward and backward may run on different numbers of threads", "[layer]") {
  Layer<float> layer(
      {.width = 5, .expert = {.hidden = 8}, .gate = {.experts = 9, .top_k = 2}, .seed = 0});
  test::randomize(layer, 1);
  const Matrix<float> x = random_matrix<float>(90, 5, 2);
  const auto gradients = [&](int forward_threads, int backward_threads) {
    Layer<float>::Tape tape;
    zero_gradients(layer);
    {
      const Threads threads(forward_threads);
      layer.forward(x, tape, {.step = 0});
    }
    const Threads threads(backward_threads);
    return Matrix<float>(layer.backward(x, tape));
  };
  CHECK(same_bits(gradients(1, 8), gradients(1, 1)));
}

TEST_CASE("layer: a plain network gets the same rows together on any number of threads",
          "[layer]") {
  // So many slots of so long rows that one worker takes them in several groups and two in one.
  MoELayer<Expert<SineMap>> layer({.width = 512, .gate = {.experts = 1, .top_k = 1}, .seed = 1});
  test::randomize(layer, 3, 0.1);
  const Matrix<float> x = random_matrix<float>(1500, 512, 2);
  const auto gradients = [&](int count) {
    const Threads threads(count);
    MoELayer<Expert<SineMap>>::Tape tape;
    zero_gradients(layer);
    layer.forward(x, tape, {.step = 0});
    layer.backward(x, tape);
    return test::gradients_of(layer);
  };
  const test::Named one = gradients(1);
  for (const int count : {2, 3, 8}) {
    for (const auto& [name, gradient] : gradients(count)) {
      INFO(name << ", " << count << " threads");
      CHECK(same_bits(gradient, one.at(name)));
    }
  }
}

TEST_CASE("layer: a plain network's bits do not depend on the threads", "[layer]") {
  // Wide enough that Eigen would split its product, and one expert, so that there is one task.
  MoELayer<Expert<OwnProduct>> layer(
      {.width = 640, .gate = {.experts = 1, .top_k = 1}, .seed = 1});
  const Matrix<float> x = random_matrix<float>(100, 640, 2);
  const auto run = [&](int count) {
    const Threads threads(count);
    MoELayer<Expert<OwnProduct>>::Tape tape;
    zero_gradients(layer);
    const Matrix<float> y = layer.forward(x, tape, {.step = 0});
    const Matrix<float> dx = layer.backward(x, tape);
    return std::array{y, dx, layer.evaluate(x)};
  };
  const auto expected = run(1);
  for (const int count : {2, 3, 8}) {
    const auto actual = run(count);
    for (std::size_t i = 0; i < 3; ++i) CHECK(same_bits(actual[i], expected[i]));
  }
}

TEST_CASE("layer: a gate that leaves out its part is found out or helped", "[layer]") {
  using Careless = MoELayer<Expert<FeedForward>, CarelessGate>;
  const Matrix<float> x = random_matrix<float>(6, 3, 1);
  Careless::Tape tape;

  Careless harmful({.width = 3, .expert = {.hidden = 4}, .gate = {.shrinks_dx = true}, .seed = 0});
  harmful.forward(x, tape, {.step = 0});
  CHECK_THROWS_WITH(harmful.backward(x, tape),
                    "moe: MoELayer: the gate left a dx of 1 x 3 for an x of 6 x 3");

  // A gate without a gradient need not touch dx: the experts' share is in it.
  Careless layer({.width = 3, .expert = {.hidden = 4}, .seed = 0});
  layer.forward(x, tape, {.step = 0});
  const Matrix<float> first = layer.backward(x, tape);
  CHECK(first.rows() == 6);
  CHECK(same_bits(layer.backward(x, tape), first));
}

TEST_CASE("layer: the tape of another layer is refused", "[layer]") {
  Layer<float> few(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 2, .top_k = 1}, .seed = 0});
  const Layer<float> many(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 8, .top_k = 1}, .seed = 0});
  const Layer<float> deep(
      {.width = 3, .expert = {.hidden = 9}, .gate = {.experts = 2, .top_k = 1}, .seed = 0});
  const Matrix<float> x = random_matrix<float>(6, 3, 1);
  Layer<float>::Tape tape;
  many.forward(x, tape, {.step = 0});
  CHECK_THROWS_WITH(
      few.backward(x, tape),
      "moe: MoELayer::backward: the tape is another layer's, of 8 experts and width 3");
  deep.forward(x, tape, {.step = 0});
  CHECK_THROWS_AS(few.backward(x, tape), std::invalid_argument);

  // Rows of 256 numbers take the room of 272.
  REQUIRE(detail::padded_stride<float>(256) == detail::padded_stride<float>(272));
  const Layer<float> spread(
      {.width = 3, .expert = {.hidden = 256}, .gate = {.experts = 2, .top_k = 1}, .seed = 0});
  Layer<float> wide(
      {.width = 3, .expert = {.hidden = 272}, .gate = {.experts = 2, .top_k = 1}, .seed = 0});
  spread.forward(x, tape, {.step = 0});
  CHECK_THROWS_AS(wide.backward(x, tape), std::invalid_argument);
}

TEST_CASE("layer: the tape of a layer with another gate is refused with nothing changed",
          "[layer]") {
  const Matrix<float> x = random_matrix<float>(6, 3, 1);
  const auto check = [&](const auto& other, auto& layer) {
    typename std::decay_t<decltype(layer)>::Tape tape;
    other.forward(x, tape, {.step = 0});
    zero_gradients(layer, Updates::lazy);
    CHECK_THROWS_AS(layer.backward(x, tape), std::invalid_argument);
    for_each_parameter(layer, [](const std::string& name, const Parameter<float>& parameter) {
      INFO(name);
      CHECK((parameter.gradient().array() == 0).all());
    });
  };
  {
    const Layer<float> other(
        {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 4, .top_k = 2}, .seed = 0});
    Layer<float> layer(
        {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 4, .top_k = 1}, .seed = 0});
    check(other, layer);
  }
  {
    using Hierarchical = MoELayer<Expert<FeedForward>, HierarchicalGate<float>>;
    Hierarchical::Config config{
        .width = 3,
        .expert = {.hidden = 4},
        .gate = {.groups = 4, .group_experts = 2, .top_k_groups = 1, .top_k = 1},
        .seed = 0};
    const Hierarchical other(config);
    config.gate.groups = 2;
    config.gate.group_experts = 4;
    Hierarchical layer(config);
    check(other, layer);
  }
  {
    using Shared = MoELayer<Expert<FeedForward>, SharedExpertGate<NoisyTopKGate<float>>>;
    Shared::Config config{.width = 3,
                          .expert = {.hidden = 4},
                          .gate = {.shared = 1, .routed = {.experts = 4, .top_k = 2}},
                          .seed = 0};
    const Shared other(config);
    config.gate.routed.top_k = 1;
    Shared layer(config);
    check(other, layer);
  }
}

TEST_CASE("layer: an activation outside its enumeration is refused", "[layer]") {
  const auto unknown = static_cast<Activation>(99);
  const std::string is = " = 99, must be one of the 7 activations";
  Config<float> config{.width = 3,
                       .expert = {.hidden = 4},
                       .gate = {.experts = 2, .top_k = 1},
                       .output = unknown,
                       .seed = 0};
  CHECK_THROWS_WITH(Layer<float>(config), "moe: MoELayer::Config.output" + is);
  config.output = Activation::identity;
  config.expert.activation = unknown;
  CHECK_THROWS_WITH(Layer<float>(config), "moe: FeedForward::Config.activation" + is);
}
