#include "moe/nn/residual.hpp"

#include <vector>

#include "../allocation.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/nn/linear.hpp"
#include "moe/nn/rms_norm.hpp"
#include "moe/testing/check_gradients.hpp"

using namespace moe;
using test::random_matrix;

namespace {

template <class Scalar>
using Mixture = MoELayer<Expert<FeedForward, Scalar>>;

template <class Scalar>
typename Mixture<Scalar>::Config mixture() {
  return {.width = 6,
          .expert = {.hidden = 5, .activation = Activation::gelu},
          .gate = {.experts = 4, .top_k = 2},
          .seed = 3};
}

/// A module of a user: a norm before a mixture.
struct NormedMixture {
  using Layer = Mixture<double>;
  using Config = Layer::Config;
  struct Tape {
    RMSNorm<double>::Tape norm;
    Layer::Tape layer;
    Matrix<double> y;
    Matrix<double> dx;
    const auto& balance() const { return layer.balance(); }
  };

  explicit NormedMixture(const Config& config) : norm({.width = config.width}), layer(config) {}
  const Matrix<double>& forward(const MatrixRef<double>& x, Tape& tape, const Pass& pass) const {
    return tape.y = layer.forward(norm.forward(x, tape.norm), tape.layer, pass);
  }
  const Matrix<double>& backward(const MatrixRef<double>& dy, Tape& tape) {
    return tape.dx = norm.backward(layer.backward(dy, tape.layer), tape.norm);
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("norm", self.norm);
    visit("layer", self.layer);
  }

  RMSNorm<double> norm;
  Layer layer;
};

}  // namespace

TEST_CASE("residual: worked by hand", "[nn][residual]") {
  Residual<Linear<double>> block({.inputs = 2, .outputs = 2}, 1);
  for_each_parameter(block, [](const std::string& name, Parameter<double>& parameter) {
    if (name == "weight") parameter.value << 1, 2, 3, 4;
    if (name == "bias") parameter.value << 10, 20;
  });
  Matrix<double> x(1, 2);
  x << 5, 6;
  Residual<Linear<double>>::Tape tape;
  // x·W = (5 + 18, 10 + 24), with the bias (33, 54).
  CHECK(block.forward(x, tape) == (Matrix<double>(1, 2) << 38, 60).finished());
  CHECK(block.evaluate(x) == (Matrix<double>(1, 2) << 38, 60).finished());
  block.forward(x, tape);
  Matrix<double> dy(1, 2);
  dy << 1, -1;
  // dy·Wᵀ = (1 - 2, 3 - 4).
  CHECK(block.backward(dy, tape) == (Matrix<double>(1, 2) << 0, -2).finished());
  for_each_parameter(block, [](const std::string& name, Parameter<double>& parameter) {
    if (name == "weight") {
      CHECK(parameter.gradient() == (Matrix<double>(2, 2) << 5, -5, 6, -6).finished());
    }
    if (name == "bias") CHECK(parameter.gradient() == (Matrix<double>(1, 2) << 1, -1).finished());
  });
}

TEST_CASE("residual: gradients of a mixture inside, and of a user's module", "[nn][residual]") {
  Residual<Mixture<double>> block(mixture<double>());
  GradientCheck check = check_layer_gradients(block, random_matrix(7, 6, 1), {.step = 2});
  INFO(check.text());
  CHECK(check.error < 1e-7);
  CHECK(check.kinks < 10);

  Residual<NormedMixture> normed(mixture<double>());
  check = check_layer_gradients(normed, random_matrix(7, 6, 1), {.step = 2});
  INFO(check.text());
  CHECK(check.error < 1e-7);
  CHECK(check.checked > 7 * 6 + 6);
}

TEMPLATE_TEST_CASE("residual: x plus what the layer alone gives, to the last bit", "[nn][residual]",
                   float, double) {
  const Mixture<TestType> layer(mixture<TestType>());
  const Residual<Mixture<TestType>> block{layer};
  const auto x = random_matrix<TestType>(9, 6, 4);
  const std::vector<std::uint8_t> valid{1, 0, 1, 1, 1, 1, 1, 0, 1};
  typename Mixture<TestType>::Tape alone;
  typename Residual<Mixture<TestType>>::Tape tape;
  Matrix<TestType> expected = x + layer.forward(x, alone, {.step = 5, .valid = valid});
  CHECK(test::same_bits(block.forward(x, tape, {.step = 5, .valid = valid}), expected));
  CHECK(tape.balance().loss == alone.balance().loss);
  // A row of padding stays as it is.
  CHECK(test::same_bits(tape.y.row(1), x.row(1)));
  expected = x + layer.evaluate(x, alone, {.valid = valid});
  CHECK(test::same_bits(block.evaluate(x, tape, {.valid = valid}), expected));
  expected = x + layer.evaluate(x);
  CHECK(test::same_bits(block.evaluate(x), expected));
  CHECK(test::same_bits(block.evaluate(x, tape), expected));
}

TEST_CASE("residual: in a residual, and rows that are not packed", "[nn][residual]") {
  const Linear<double> linear({.inputs = 3, .outputs = 3}, 5);
  const Residual<Residual<Linear<double>>> twice{Residual<Linear<double>>(linear)};
  const Matrix<double> wide = random_matrix(4, 7, 6);
  const auto x = wide.middleCols(2, 3);
  const Matrix<double> expected = 2 * x + linear.evaluate(x);
  CHECK(test::relative_error(twice.evaluate(x), expected) < 1e-15);
  CHECK(twice.module().module().config().outputs == 3);
}

TEST_CASE("residual: a pass of a mixture takes no memory after the first", "[nn][residual]") {
  const test::Threads scope(GENERATE(1, 3));
  Residual<Mixture<float>> block(mixture<float>());
  const auto x = random_matrix<float>(300, 6, 1);
  Residual<Mixture<float>>::Tape tape;
  const auto pass = [&] {
    zero_gradients(block);
    block.forward(x, tape, {.step = 1});
    block.backward(x, tape);
    block.evaluate(x, tape);
  };
  pass();
  CHECK(test::allocations_in(pass) == 0);
}

TEST_CASE("residual: the verbs of the layer inside", "[nn][residual]") {
  using Layer = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  Residual<Layer> block({.width = 6,
                         .expert = {.hidden = 5},
                         .gate = {.experts = 4,
                                  .top_k = 2,
                                  .selection_bias = true,
                                  .bias_rate = 0.25,
                                  .switch_loss_weight = 0.5},
                         .seed = 3});
  const auto x = random_matrix(7, 6, 1);
  Residual<Layer>::Tape tape;
  block.forward(x, tape, {.step = 1});
  const double loss = tape.balance().loss;
  CHECK(loss > 0);
  // Of 7 tokens and 2 experts a token the mean is 3.5, which no load is.
  const Vector<double> load = tape.balance().load;
  block.module().update_selection_bias(tape.module);
  int seen = 0;
  for_each_parameter(block, [&](const std::string& name, const Parameter<double>& parameter) {
    if (name != "gate.selection_bias") return;
    ++seen;
    for (Index i = 0; i < 4; ++i) CHECK(parameter.value(0, i) == (load[i] < 3.5 ? 0.25 : -0.25));
  });
  CHECK(seen == 1);

  Residual<Layer> heavier = block;
  heavier.module().set_loss_weights({.switch_loss = 1.5});
  block.forward(x, tape, {.step = 2});
  const double light = tape.balance().loss;
  heavier.forward(x, tape, {.step = 2});
  CHECK_THAT(tape.balance().loss, Catch::Matchers::WithinRel(3 * light, 1e-14));
  CHECK(heavier.config().gate.switch_loss_weight == 1.5);

  block.module().add_experts(2, Seed{9});
  CHECK(block.config().gate.experts == 6);
  block.forward(x, tape, {.step = 3});
  CHECK(tape.balance().load.size() == 6);
}

TEST_CASE("residual: another module in place of the one inside", "[nn][residual]") {
  Residual<Linear<double>> block({.inputs = 2, .outputs = 2}, 1);
  Residual<Linear<double>>::Tape tape;
  const auto x = random_matrix(4, 2, 1);
  block.forward(x, tape);
  block.module() = Linear<double>({.inputs = 3, .outputs = 2}, 1);
  CHECK_THROWS_WITH(block.backward(x, tape),
                    "moe: Linear::backward without a forward pass on this tape");
  CHECK_THROWS_WITH(block.forward(x, tape), "moe: Linear: x has 2 columns, the layer has 3 inputs");
  CHECK_THROWS_WITH(block.forward(random_matrix(4, 3, 1), tape),
                    "moe: Residual: x is 4 x 3, the module's y 4 x 2");
  block.module() = Linear<double>({.inputs = 3, .outputs = 3}, 1);
  const auto wide = random_matrix(4, 3, 1);
  CHECK(test::relative_error(block.evaluate(wide), wide + block.module().evaluate(wide)) < 1e-15);
}

TEST_CASE("residual: configuration, names and files are those of the module", "[nn][residual]") {
  Mixture<float> layer(mixture<float>());
  const Residual<Mixture<float>> block{layer};
  CHECK(block.config().gate.experts == 4);
  CHECK(block.module().config().width == 6);
  std::vector<std::string> names;
  for_each_parameter(block, [&](const std::string& name, const auto&) { names.push_back(name); });
  CHECK(names.front() == "gate.weight");
  CHECK(parameter_count(block) == parameter_count(layer));

  const test::TemporaryFolder folder;
  const std::string path = folder.file("block.safetensors");
  save_module(path, layer);
  const SafetensorsFile file(path);
  Residual<Mixture<float>> loaded(file.config<Residual<Mixture<float>>>());
  file.read_module(loaded);
  const auto x = random_matrix<float>(5, 6, 1);
  CHECK(test::same_bits(loaded.evaluate(x), block.evaluate(x)));
}

TEST_CASE("residual: what is wrong is named", "[nn][residual]") {
  CHECK_THROWS_WITH((Residual<Linear<float>>({.inputs = 0, .outputs = 2}, 1)),
                    "moe: Linear::Config.inputs = 0, must be at least 1");
  Residual<Linear<float>> wider({.inputs = 2, .outputs = 3}, 1);
  Residual<Linear<float>>::Tape tape;
  const auto x = random_matrix<float>(4, 2, 1);
  CHECK_THROWS_WITH(wider.forward(x, tape), "moe: Residual: x is 4 x 2, the module's y 4 x 3");
  CHECK_THROWS_WITH(wider.evaluate(x), "moe: Residual: x is 4 x 2, the module's y 4 x 3");
  CHECK_THROWS_WITH(wider.backward(random_matrix<float>(4, 3, 1), tape),
                    "moe: Residual::backward without a forward pass on this tape");
  CHECK_THROWS_WITH(wider.forward(random_matrix<float>(4, 3, 1), tape),
                    "moe: Linear: x has 3 columns, the layer has 2 inputs");
}

TEST_CASE("residual: the module's own y as x is refused", "[nn][residual]") {
  Residual<Linear<float>> block({.inputs = 2, .outputs = 2}, 1);
  Residual<Linear<float>>::Tape tape;
  block.forward(random_matrix<float>(4, 2, 1), tape);
  const Matrix<float> before = tape.module.y;
  for (const Index rows : {4, 2}) {
    const MatrixRef<float> own = tape.module.y.bottomRows(rows);
    CHECK_THROWS_AS(block.forward(own, tape), std::invalid_argument);
    CHECK_THROWS_AS(block.evaluate(own, tape), std::invalid_argument);
  }
  CHECK(test::same_bits(tape.module.y, before));
}
