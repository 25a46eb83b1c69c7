#include "moe/adapt/upcycle.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../layer/user_parts.hpp"
#include "../naive_activation.hpp"
#include "../naive_layer.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "moe/gates/balanced_gate.hpp"
#include "moe/gates/expert_choice_gate.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/noisy_top_k_gate.hpp"
#include "moe/gates/product_key_gate.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/optim/adam.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using test::random_matrix;
using test::same_bits;
using test::values_of;

namespace {

constexpr Index width = 7;
constexpr Index hidden = 12;
constexpr Index tokens = 60;

/// The network from its formula, a scalar at a time, in double.
template <class Scalar>
Matrix<double> naive(const FeedForward<Scalar>& dense, const Matrix<Scalar>& x) {
  const FeedForwardConfig& config = dense.config();
  const auto named = values_of(dense);
  const auto map = [&](const std::string& name, const std::vector<double>& in) {
    const Matrix<double>& weight = named.at(name + ".weight");
    std::vector<double> out(static_cast<std::size_t>(weight.cols()));
    for (Index j = 0; j < weight.cols(); ++j) {
      double sum = config.bias ? named.at(name + ".bias")(0, j) : 0;
      for (Index i = 0; i < weight.rows(); ++i) sum += in[detail::to_size(i)] * weight(i, j);
      out[detail::to_size(j)] = sum;
    }
    return out;
  };
  Matrix<double> y(x.rows(), x.cols());
  for (Index t = 0; t < x.rows(); ++t) {
    std::vector<double> row;
    for (Index i = 0; i < x.cols(); ++i) row.push_back(static_cast<double>(x(t, i)));
    std::vector<double> a = map(config.gated ? "gate" : "up", row);
    const std::vector<double> linear = map("up", row);
    const double limit = config.limit > 0 ? config.limit : std::numeric_limits<double>::infinity();
    for (std::size_t j = 0; j < a.size(); ++j) {
      a[j] = test::naive_activation(config.activation, std::min(a[j], limit));
      if (config.gated) a[j] *= std::clamp(linear[j], -limit, limit) + config.linear_offset;
    }
    const std::vector<double> out = map("down", a);
    for (Index i = 0; i < x.cols(); ++i) y(t, i) = out[detail::to_size(i)];
  }
  return y;
}

template <class Scalar>
FeedForward<Scalar> dense_network(FeedForwardConfig config = {}) {
  config.width = width;
  config.hidden = hidden;
  FeedForward<Scalar> dense(config, 3);
  test::randomize(dense, 11, 0.5);
  return dense;
}

std::vector<FeedForwardConfig> forms() {
  return {{},
          {.activation = Activation::gelu, .bias = false},
          {.activation = Activation::silu, .gated = true},
          {.activation = Activation::gelu_sigmoid,
           .gated = true,
           .bias = true,
           .limit = 0.8,
           .linear_offset = 1},
          {.activation = Activation::tanh, .recompute = true},
          {.activation = Activation::silu, .gated = true, .saved = Precision::bfloat16}};
}

/// Gates whose weights add up to 1, of 12 experts, 6 or 4 of a token.
template <class Scalar, class F>
void for_each_gate(F&& f) {
  f("renormalised",
    UpcycleConfig<TopKGate<Scalar>>{
        .gate = {.experts = 12, .top_k = 6, .renormalise = true, .init_stddev = 1}, .seed = 5});
  f("softmax of the chosen",
    UpcycleConfig<TopKGate<Scalar>>{.gate = {.experts = 12,
                                             .top_k = 6,
                                             .bias = true,
                                             .score = Score::softmax_of_chosen,
                                             .selection_bias = true,
                                             .init_stddev = 1},
                                    .seed = 6});
  f("sigmoids in groups", UpcycleConfig<TopKGate<Scalar>>{.gate = {.experts = 12,
                                                                   .top_k = 6,
                                                                   .score = Score::sigmoid,
                                                                   .renormalise = true,
                                                                   .groups = 2,
                                                                   .init_stddev = 1},
                                                          .seed = 7});
  f("equal scores",
    UpcycleConfig<TopKGate<Scalar>>{
        .gate = {.experts = 12, .top_k = 6, .renormalise = true, .init_stddev = 0}, .seed = 8});
  f("none shared",
    UpcycleConfig<SharedExpertGate<TopKGate<Scalar>>>{
        .gate = {.shared = 0,
                 .routed = {.experts = 12, .top_k = 6, .renormalise = true, .init_stddev = 1}},
        .seed = 10});
  f("noisy", UpcycleConfig<NoisyTopKGate<Scalar>>{.gate = {.experts = 12, .top_k = 6}, .seed = 9});
}

/// For each token the sum of the weights of its slots.
template <class Tape>
Matrix<double> weight_sums(const Tape& tape) {
  Matrix<double> sums = Matrix<double>::Zero(tape.routing().tokens(), 1);
  for (Index t = 0; t < tape.routing().tokens(); ++t) {
    const Range slots = tape.routing().slots_of_token(t);
    for (Index s = slots.first; s < slots.first + slots.count; ++s) {
      sums(t, 0) += static_cast<double>(tape.routing().weight[detail::to_size(s)]);
    }
  }
  return sums;
}

template <class Scalar>
double tolerance() {
  return std::is_same_v<Scalar, float> ? 1e-5 : 1e-13;
}

}  // namespace

TEMPLATE_TEST_CASE("upcycle: the layer's y is the dense network's at the start", "[adapt]", float,
                   double) {
  using Scalar = TestType;
  const Matrix<Scalar> x = random_matrix<Scalar>(tokens, width, 1);
  for (const FeedForwardConfig& form : forms()) {
    const FeedForward<Scalar> dense = dense_network<Scalar>(form);
    const Matrix<double> expected = naive(dense, x);
    for_each_gate<Scalar>([&](const char* gate, auto config) {
      for (const Index slices : {1, 2, 3, 6}) {
        INFO(gate << ", " << slices << " slices");
        config.slices = slices;
        const auto layer = upcycle(dense, config);
        CHECK(layer.config().expert.hidden == hidden / slices);
        CHECK(layer.config().expert.recompute == form.recompute);
        CHECK(layer.config().expert.saved == form.saved);
        const Matrix<double> y = layer.evaluate(x).template cast<double>();
        CHECK(test::relative_error(y, expected) < tolerance<Scalar>());
      }
    });
  }
}

TEST_CASE("upcycle: a training pass with its noise is the dense network too, of whole copies",
          "[adapt]") {
  const Matrix<double> x = random_matrix(tokens, width, 1);
  const FeedForward<double> dense = dense_network<double>({.activation = Activation::silu});
  const Matrix<double> expected = naive(dense, x);
  const auto check = [&](const auto& config) {
    auto layer = upcycle(dense, config);
    typename decltype(layer)::Tape tape;
    CHECK(test::relative_error(layer.forward(x, tape, {.step = 3}), expected) < 1e-13);
    CHECK(tape.balance().unused_experts() == 0);
  };
  check(UpcycleConfig<NoisyTopKGate<double>>{.gate = {.experts = 5, .top_k = 2}, .seed = 1});
  check(UpcycleConfig<HierarchicalGate<double>>{
      .gate = {.groups = 3, .group_experts = 2, .top_k_groups = 2, .top_k = 1}, .seed = 1});
  check(UpcycleConfig<TopKGate<double>>{
      .gate = {.experts = 5, .top_k = 2, .renormalise = true, .jitter = 0.5}, .seed = 1});
  // Shared experts and chosen ones, whose weights add up to 1 together.
  check(UpcycleConfig<SharedExpertGate<TopKGate<double>>>{
      .gate = {.shared = 1,
               .scale = 0.25,
               .routed = {.experts = 5, .top_k = 2, .renormalise = true, .scale = 0.75}},
      .seed = 1});
}

TEST_CASE("upcycle: weights that do not add up to one multiply the dense output", "[adapt]") {
  const Matrix<double> x = random_matrix(tokens, width, 1);
  const FeedForward<double> dense = dense_network<double>();
  const Matrix<double> expected = naive(dense, x);
  const auto check = [&](auto config, bool add_up_to_one) {
    for (const Index slices : {1, 2, 3}) {
      INFO(slices << " slices");
      config.slices = slices;
      const auto layer = upcycle(dense, config);
      typename std::remove_const_t<decltype(layer)>::Tape tape;
      const Matrix<double> y = layer.forward(x, tape, {.step = 1});
      const Matrix<double> sums = weight_sums(tape);
      const Matrix<double> scaled = sums.col(0).asDiagonal() * expected;
      CHECK(test::relative_error(y, scaled) < 1e-13);
      double from_one = 0;
      for (Index t = 0; t < tokens; ++t) {
        if (sums(t, 0) != 0) from_one = std::max(from_one, std::abs(sums(t, 0) - 1));
      }
      CHECK((from_one < 1e-13) == add_up_to_one);
    }
  };
  check(UpcycleConfig<TopKGate<double>>{.gate = {.experts = 12, .top_k = 6, .init_stddev = 1},
                                        .seed = 1},
        false);
  check(UpcycleConfig<ExpertChoiceGate<double>>{.gate = {.experts = 12}, .seed = 1}, false);
  // Of the tokens that an expert took.
  check(UpcycleConfig<BalancedGate<double>>{.gate = {.experts = 12, .top_k = 6}, .seed = 1}, true);
}

TEST_CASE("upcycle: a weight on the input is exact with one slot of weight 1", "[adapt]") {
  const Matrix<double> x = random_matrix(tokens, width, 1);
  const FeedForward<double> dense = dense_network<double>(
      {.activation = Activation::silu, .gated = true, .weighted_input = true});
  const Matrix<double> expected = naive(dense, x);
  const auto layer = upcycle(
      dense,
      UpcycleConfig<TopKGate<double>>{
          .gate = {.experts = 4, .top_k = 1, .renormalise = true, .init_stddev = 1}, .seed = 1});
  CHECK(test::relative_error(layer.evaluate(x), expected) < 1e-13);
}

TEST_CASE("upcycle: a slice is its columns, with the weights of its output times the slices",
          "[adapt]") {
  const FeedForward<double> dense = dense_network<double>({.gated = true, .bias = true});
  const auto whole = values_of(dense);
  const auto layer = upcycle(
      dense,
      UpcycleConfig<TopKGate<double>>{.gate = {.experts = 6, .top_k = 3}, .slices = 3, .seed = 1});
  const auto parts = values_of(layer);
  for (Index e = 0; e < 6; ++e) {
    const std::string expert = "experts." + std::to_string(e) + '.';
    const Index first = e % 3 * 4;
    INFO(expert);
    for (const char* name : {"gate.weight", "gate.bias", "up.weight", "up.bias"}) {
      const Matrix<double> columns = whole.at(name).middleCols(first, 4);
      CHECK(same_bits(parts.at(expert + name), columns));
    }
    const Matrix<double> rows = 3 * whole.at("down.weight").middleRows(first, 4);
    CHECK(same_bits(parts.at(expert + "down.weight"), rows));
    CHECK(same_bits(parts.at(expert + "down.bias"), whole.at("down.bias")));
  }
  // The columns of the gate are drawn once a copy.
  const Matrix<double>& gate = parts.at("gate.weight");
  for (Index e = 0; e < 6; ++e) {
    CHECK(same_bits(gate.col(e), gate.col(e - e % 3)));
    if (e >= 3) CHECK_FALSE(same_bits(gate.col(e), gate.col(0)));
  }
}

TEST_CASE("upcycle: noise is on all but the first copy, drawn by the seed", "[adapt]") {
  const FeedForward<double> dense = dense_network<double>();
  for (const Index slices : {1, 2}) {
    const auto make = [&](double noise_stddev, std::uint64_t seed) {
      return values_of(
          upcycle(dense, UpcycleConfig<TopKGate<double>>{.gate = {.experts = 6, .top_k = 2},
                                                         .slices = slices,
                                                         .noise_stddev = noise_stddev,
                                                         .seed = seed}));
    };
    const auto clean = make(0, 1);
    const auto noisy = make(0.01, 1);
    const auto again = make(0.01, 1);
    const auto other = make(0.01, 2);
    double squares = 0;
    double count = 0;
    std::vector<double> first_numbers;
    for (const auto& [name, value] : noisy) {
      INFO(name);
      CHECK(same_bits(value, again.at(name)));
      if (!name.starts_with("experts.")) {
        CHECK(same_bits(value, clean.at(name)));
        continue;
      }
      const Index e = name[std::string("experts.").size()] - '0';
      if (e < slices) {
        CHECK(same_bits(value, clean.at(name)));
        CHECK(same_bits(value, other.at(name)));
        continue;
      }
      const Matrix<double> noise = value - clean.at(name);
      CHECK((noise.array() != 0).all());
      CHECK_FALSE(same_bits(value, other.at(name)));
      squares += noise.squaredNorm();
      count += static_cast<double>(noise.size());
      first_numbers.push_back(noise(0, 0));
    }
    // No two experts and no two parameters get the same.
    std::sort(first_numbers.begin(), first_numbers.end());
    for (std::size_t i = 1; i < first_numbers.size(); ++i) {
      CHECK(first_numbers[i] - first_numbers[i - 1] > 1e-9);
    }
    // A standard deviation of `count` numbers is known to 1/sqrt(2·count), here 2.6 %.
    CHECK_THAT(std::sqrt(squares / count), Catch::Matchers::WithinRel(0.01, 0.1));
  }
}

TEST_CASE("upcycle: what is frozen in the network is frozen in its copies", "[adapt]") {
  FeedForward<float> dense = dense_network<float>();
  for_each_parameter(dense, [](const std::string& name, auto& p) {
    p.trained = !name.starts_with("down.");
    p.gradient().setOnes();
  });
  for (const Index slices : {1, 2}) {
    auto layer =
        upcycle(dense, UpcycleConfig<NoisyTopKGate<float>>{
                           .gate = {.experts = 4, .top_k = 2}, .slices = slices, .seed = 1});
    for_each_parameter(layer, [&](const std::string& name, auto& p) {
      INFO(name);
      CHECK(p.trained == (name.find("down.") == name.npos));
      CHECK(p.gradient().isZero(0));
    });
  }
}

TEST_CASE("upcycle: an expert of a layer becomes a layer, whose experts may come and go",
          "[adapt]") {
  using Layer = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  Layer teacher({.width = width,
                 .expert = {.hidden = hidden},
                 .gate = {.experts = 3, .top_k = 1},
                 .seed = 1});
  teacher.copy_experts({1}, {.noise_stddev = 0.1, .seed = 2});
  const FeedForward<double>& dense = teacher.experts()[3].network();
  Layer layer =
      upcycle(dense, UpcycleConfig<TopKGate<double>>{
                         .gate = {.experts = 4, .top_k = 2, .renormalise = true}, .seed = 3});
  const Matrix<double> x = random_matrix(tokens, width, 1);
  CHECK(test::relative_error(layer.evaluate(x), naive(dense, x)) < 1e-13);
  Adam<double> adam;
  Layer::Tape tape;
  const auto train = [&] {
    zero_gradients(layer);
    layer.forward(x, tape, {.step = 1});
    layer.backward(x, tape);
    adam.update(layer, 0.01);
  };
  train();
  adam.follow(layer, layer, layer.copy_experts({0}, {.seed = 4}));
  train();
  CHECK(layer.experts().size() == 5);
}

TEST_CASE("upcycle: a network from a file, the library's own or PyTorch's", "[adapt][io]") {
  const test::TemporaryFolder folder;
  const FeedForward<float> trained =
      dense_network<float>({.activation = Activation::silu, .gated = true, .bias = true});
  const Matrix<float> x = random_matrix<float>(tokens, width, 1);
  const UpcycleConfig<TopKGate<float>> config{
      .gate = {.experts = 4, .top_k = 2, .renormalise = true}, .seed = 1};
  const Matrix<float> expected = upcycle(trained, config).evaluate(x);
  CHECK(test::relative_error(expected.cast<double>(), naive(trained, x)) < 1e-5);

  save_module(folder.file("own"), trained);
  const SafetensorsFile own(folder.file("own"));
  FeedForward<float> dense(own.config<FeedForward<float>>(), 0);
  own.read_module(dense);
  CHECK(same_bits(upcycle(dense, config).evaluate(x), expected));

  // The layer is saved and made again from its file as any other.
  const auto check_saved = [&](const auto& layer) {
    using Layer = std::remove_cvref_t<decltype(layer)>;
    save_module(folder.file("layer"), layer);
    const SafetensorsFile saved(folder.file("layer"));
    Layer made(saved.config<Layer>());
    saved.read_module(made);
    CHECK(same_bits(made.evaluate(x), layer.evaluate(x)));
    Layer same(layer.config());
    saved.read_module(same);
  };
  check_saved(upcycle(trained, config));
  check_saved(upcycle(
      trained,
      UpcycleConfig<TopKGate<float>>{
          .gate = {.experts = 4, .top_k = 2}, .slices = 2, .noise_stddev = 0.1, .seed = 1}));
  const SharedExpertGate<TopKGate<float>>::Config shared{
      .routed = {.experts = 4, .top_k = 2, .renormalise = true}};
  const auto layer =
      upcycle(trained, UpcycleConfig<SharedExpertGate<TopKGate<float>>>{.gate = shared, .seed = 1});
  check_saved(layer);
  CHECK(layer.config().gate.routed.width == width);

  // PyTorch's Linear has a weight of [out, in].
  std::map<std::string, Matrix<float>> theirs;
  for_each_parameter(trained, [&](const std::string& name, const auto& p) {
    const auto dot = name.find('.');
    Matrix<float>& tensor = theirs["mlp." + name.substr(0, dot) + "_proj" + name.substr(dot)];
    if (name.ends_with("weight")) {
      tensor = p.value.transpose();
    } else {
      tensor = p.value;
    }
  });
  SafetensorsWriter writer;
  for (const auto& [name, tensor] : theirs) writer.add(name, tensor);
  writer.write(folder.file("theirs"));
  const SafetensorsFile file(folder.file("theirs"));
  FeedForward<float> read(trained.config(), 0);
  for_each_parameter(read, [&](const std::string& name, auto& p) {
    const auto dot = name.find('.');
    p.value = file.matrix<float>("mlp." + name.substr(0, dot) + "_proj" + name.substr(dot));
    if (name.ends_with("weight")) p.value = p.value.transpose().eval();
  });
  CHECK(same_bits(upcycle(read, config).evaluate(x), expected));

  // A forgotten transpose is found, but for a square weight.
  for_each_parameter(read, [&](const std::string& name, auto& p) {
    if (name == "up.weight") p.value = p.value.transpose().eval();
  });
  CHECK_THROWS_WITH(upcycle(read, config), "moe: upcycle: up.weight is 12 x 7, must be 7 x 12");
}

TEST_CASE("upcycle: what cannot be the dense network is refused", "[adapt]") {
  using TopK = TopKGate<double>;
  const FeedForward<double> dense = dense_network<double>();
  const auto refused = [&](const auto& config, const std::string& message) {
    CHECK_THROWS_WITH(upcycle(dense, config), Contains(message));
    CHECK_THROWS_AS(upcycle(dense, config), std::invalid_argument);
  };
  const auto of_slices = [](Index experts, Index top_k, Index slices) {
    return UpcycleConfig<TopK>{
        .gate = {.experts = experts, .top_k = top_k}, .slices = slices, .seed = 1};
  };
  refused(of_slices(4, 2, 0), "upcycle: slices = 0, must be at least 1");
  refused(of_slices(4, 2, -2), "upcycle: slices = -2, must be at least 1");
  refused(of_slices(10, 5, 5), "upcycle: slices = 5, must divide the network's hidden = 12");
  refused(of_slices(14, 2, 24), "upcycle: slices = 24, must divide the network's hidden = 12");
  refused(of_slices(5, 2, 2), "upcycle: slices = 2, must divide the gate's experts = 5");
  refused(of_slices(4, 3, 2), "upcycle: slices = 2, must divide the gate's top_k = 3");
  refused(UpcycleConfig<TopK>{.gate = {.experts = 6, .top_k = 2, .groups = 2, .top_k_groups = 2},
                              .slices = 2,
                              .seed = 1},
          "upcycle: slices = 2, must divide the gate's experts / groups = 3");

  const auto with_noise = [&](double noise) {
    auto config = of_slices(4, 2, 1);
    config.noise_stddev = noise;
    return config;
  };
  refused(with_noise(-0.5), "upcycle: noise_stddev = -0.5, must be finite and at least 0");
  refused(with_noise(std::nan("")), "upcycle: noise_stddev = nan");
  refused(with_noise(std::numeric_limits<double>::infinity()), "upcycle: noise_stddev = inf");

  refused(of_slices(4, 5, 1), "TopKGate::Config.top_k = 5");
  refused(of_slices(0, 1, 1), "TopKGate::Config.experts = 0");
  auto wide = of_slices(4, 2, 1);
  wide.gate.width = 8;
  refused(wide, "MoELayer::Config.gate.width = 8, must be 0 or Config.width = 7");

  // Gates that cannot score two experts alike.
  refused(
      UpcycleConfig<HierarchicalGate<double>>{
          .gate = {.groups = 2, .group_experts = 4, .top_k_groups = 2, .top_k = 2},
          .slices = 2,
          .seed = 1},
      "upcycle: slices = 2");
  refused(
      UpcycleConfig<ProductKeyGate<double>>{
          .gate = {.row_keys = 2, .column_keys = 4, .top_k = 2}, .slices = 2, .seed = 1},
      "upcycle: slices = 2");
  refused(
      UpcycleConfig<SharedExpertGate<TopK>>{
          .gate = {.shared = 2, .routed = {.experts = 4, .top_k = 2}}, .slices = 2, .seed = 1},
      "upcycle: slices = 2");

  // Without shared experts it is the gate inside, whose numbers count.
  const auto none_shared = [](const TopKConfig& routed) {
    return UpcycleConfig<SharedExpertGate<TopK>>{
        .gate = {.shared = 0, .routed = routed}, .slices = 2, .seed = 1};
  };
  refused(none_shared({.experts = 6, .top_k = 3, .renormalise = true}),
          "upcycle: slices = 2, must divide the gate's routed.top_k = 3");
  refused(none_shared({.experts = 6, .top_k = 2, .groups = 2}),
          "upcycle: slices = 2, must divide the gate's routed.experts / groups = 3");
  refused(none_shared({.experts = 4, .top_k = 2, .drawn_second = true}),
          "upcycle: slices = 2, must be 1 with the gate's routed.drawn_second");

  refused(UpcycleConfig<test::HashGate>{.gate = {.experts = 4}, .slices = 2, .seed = 1},
          "upcycle: slices = 2, must be 1 with a gate that has no change_experts()");

  // In training the second slot could be no slice of the first one's copy.
  auto random = of_slices(4, 2, 2);
  random.gate.random_second = true;
  refused(random, "upcycle: slices = 2, must be 1 with the gate's random_second");
  auto drawn = of_slices(4, 2, 2);
  drawn.gate.drawn_second = true;
  refused(drawn, "upcycle: slices = 2, must be 1 with the gate's drawn_second");
  random.slices = drawn.slices = 1;
  CHECK_NOTHROW(upcycle(dense, random));
  CHECK_NOTHROW(upcycle(dense, drawn));

  const FeedForward<double> weighted = dense_network<double>({.weighted_input = true});
  CHECK_THROWS_WITH(upcycle(weighted, of_slices(4, 2, 2)),
                    "moe: upcycle: slices = 2, must be 1 for a network with weighted_input");
  FeedForward<double> moved = dense_network<double>();
  const FeedForward<double> taken = std::move(moved);
  CHECK_THROWS_AS(upcycle(moved, of_slices(4, 2, 1)), std::invalid_argument);
}

namespace {

/// A wave in each of four directions, of which a small network gets only a part.
struct Waves {
  explicit Waves(std::uint64_t seed) : x(random_matrix(512, 4, seed)) {
    y = (2.5 * x.array()).sin().matrix();
  }
  double error(const Matrix<double>& guess) const {
    return (guess - y).squaredNorm() / y.squaredNorm();
  }
  Matrix<double> x, y;
};

template <class Layer>
void train(Layer& layer, const Waves& waves, std::uint64_t updates) {
  Adam<double> adam;
  typename Layer::Tape tape;
  for (std::uint64_t step = 0; step < updates; ++step) {
    zero_gradients(layer);
    const Matrix<double>& y = layer.forward(waves.x, tape, {.step = step});
    layer.backward(2 * (y - waves.y) / static_cast<double>(waves.x.rows()), tape);
    adam.update(layer, 0.01);
  }
}

}  // namespace

TEST_CASE("upcycle: training tells the copies apart, and gets below the dense network",
          "[adapt][learning]") {
  const test::Threads threads(1);
  const Waves training(1);
  const Waves held_out(2);
  MoELayer<Expert<FeedForward, double>, TopKGate<double>> dense(
      {.width = 4,
       .expert = {.hidden = 8, .activation = Activation::silu},
       .gate = {.experts = 1, .top_k = 1},
       .seed = 1});
  train(dense, training, 400);
  const double start = held_out.error(dense.evaluate(held_out.x));
  const FeedForward<double>& network = dense.experts()[0].network();
  for (const Index slices : {1, 2}) {
    auto layer =
        upcycle(network, UpcycleConfig<TopKGate<double>>{.gate = {.experts = 8,
                                                                  .top_k = 2 * slices,
                                                                  .score = Score::softmax_of_chosen,
                                                                  .switch_loss_weight = 0.01,
                                                                  .init_stddev = 0.5},
                                                         .slices = slices,
                                                         .seed = 2});
    CHECK_THAT(held_out.error(layer.evaluate(held_out.x)), Catch::Matchers::WithinRel(start, 1e-9));
    train(layer, training, 400);
    const double end = held_out.error(layer.evaluate(held_out.x));
    auto longer = dense;
    train(longer, training, 400);
    const double dense_end = held_out.error(longer.evaluate(held_out.x));
    INFO(slices << " slices: dense " << start << " -> " << dense_end << ", layer -> " << end);
    CHECK(end < 0.8 * dense_end);
    CHECK(dense_end < start);
    const auto values = values_of(layer);
    for (Index e = 0; e + slices < 8; ++e) {
      const auto up = [&](Index expert) {
        return values.at("experts." + std::to_string(expert) + ".up.weight");
      };
      CHECK(test::relative_error(up(e), up(e + slices)) > 0.01);
    }
  }
}
