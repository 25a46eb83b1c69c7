#include <algorithm>
#include <limits>

#include "../gates/law_runs.hpp"

// Padding in a layer's passes.

using namespace moe;
using namespace moe::test;

namespace {

template <class Law>
using Layer = MoELayer<Expert<FeedForward, typename Law::Scalar>, typename Law::Gate>;

using Laws =
    std::tuple<test::NoisyTopKLaw<float>, test::NoisyTopKLaw<double>, test::SoftmaxLaw<double>,
               test::SigmoidLaw<float>, test::ExpertChoiceLaw<double>,
               test::SharedExpertLaw<test::NoisyTopKLaw<double>, true>>;

template <class Law>
Layer<Law> make_layer(Activation output = Activation::identity) {
  auto gate = Law::config();
  gate.width = 0;
  Layer<Law> layer(
      {.width = 5, .expert = {.hidden = 6}, .gate = gate, .output = output, .seed = 4});
  test::randomize(layer, 3, 0.7);
  return layer;
}

/// Two rows are valid together, and two are not.
Mask mask_of(Index rows) {
  Mask valid;
  for (Index row = 0; row < rows; ++row) {
    valid.push_back(static_cast<std::uint8_t>(
        philox({1, 2, 3, 4}, static_cast<std::uint64_t>(row / 2))[0] % 3));
  }
  return valid;
}

template <class Scalar>
Matrix<Scalar> with_nan_in_padding(Matrix<Scalar> matrix, const Mask& valid) {
  spoil_padding(valid, matrix);
  return matrix;
}

template <class Scalar>
void check_padding(const Matrix<Scalar>& matrix, const Mask& valid, double value) {
  for (Index row = 0; row < matrix.rows(); ++row) {
    if (valid[detail::to_size(row)] != 0) continue;
    CHECK((matrix.row(row).array() == static_cast<Scalar>(value)).all());
  }
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("layer: a masked pass is that over the valid rows", "[layer][mask]", Laws) {
  using Scalar = typename TestType::Scalar;
  for (const Activation output : {Activation::identity, Activation::sigmoid}) {
    for (const Index rows : {12, 300}) {
      const double of_zero = output == Activation::sigmoid ? 0.5 : 0;
      const Mask valid = mask_of(rows);
      auto layer = make_layer<TestType>(output);
      auto compact_layer = layer;
      const Matrix<Scalar> x = random_matrix<Scalar>(rows, 5, 1);
      const Matrix<Scalar> dy = random_matrix<Scalar>(rows, 5, 2);

      const Pass pass{.step = 3, .first_token = 5};
      const std::vector<double> drawn =
          TestType::drawn_noise(layer.gate(), derive_seed(layer.config().seed, 0), x, pass);
      const Index columns = static_cast<Index>(drawn.size()) / rows;
      const Matrix<double> noise = compacted(
          Matrix<double>(Eigen::Map<const Matrix<double>>(drawn.data(), rows, columns)), valid);
      typename Layer<TestType>::Tape expected;
      compact_layer.forward(
          compacted(x, valid), expected,
          {.step = 9, .noise = {noise.data(), static_cast<std::size_t>(noise.size())}});
      compact_layer.backward(compacted(dy, valid), expected);

      Pass masked = pass;
      masked.valid = valid;
      typename Layer<TestType>::Tape tape;
      layer.forward(with_nan_in_padding(x, valid), tape, masked);
      layer.backward(with_nan_in_padding(dy, valid), tape);
      CHECK(same_bits(compacted(tape.y, valid), expected.y));
      check_padding(tape.y, valid, of_zero);
      CHECK(test::same_balance(tape.balance(), expected.balance()));
      CHECK(same_bits(compacted(tape.dx, valid), expected.dx));
      check_padding(tape.dx, valid, 0);
      CHECK(test::same_bits(test::gradients_of(layer), test::gradients_of(compact_layer)));
      CHECK(tape.dx.cwiseAbs().maxCoeff() > 0);

      typename Layer<TestType>::Tape served;
      layer.evaluate(with_nan_in_padding(x, valid), served, {.valid = valid});
      layer.evaluate(compacted(x, valid), expected);
      CHECK(same_bits(compacted(served.y, valid), expected.y));
      check_padding(served.y, valid, of_zero);
      CHECK(test::same_balance(served.balance(), expected.balance()));
    }
  }
}

TEMPLATE_LIST_TEST_CASE("layer: nothing but padding is no work", "[layer][mask]", Laws) {
  using Scalar = typename TestType::Scalar;
  const Mask none(12, 0);
  for (const Activation output : {Activation::identity, Activation::sigmoid}) {
    auto layer = make_layer<TestType>(output);
    const Matrix<Scalar> x = with_nan_in_padding(random_matrix<Scalar>(12, 5, 1), none);
    typename Layer<TestType>::Tape tape;
    layer.forward(x, tape, {.step = 3, .valid = none});
    check_padding(tape.y, none, output == Activation::sigmoid ? 0.5 : 0);
    CHECK(tape.balance().loss == 0);
    CHECK((layer.backward(x, tape).array() == 0).all());
    for (const auto& [name, gradient] : test::gradients_of(layer)) {
      INFO(name);
      CHECK((gradient.array() == 0).all());
    }
  }
}

TEMPLATE_LIST_TEST_CASE("layer: a bad pass is refused with its numbers", "[layer][mask]", Laws) {
  using Scalar = typename TestType::Scalar;
  const auto layer = make_layer<TestType>();
  const Matrix<Scalar> x = random_matrix<Scalar>(12, 5, 1);
  typename Layer<TestType>::Tape tape;
  const Mask wrong(11, 1);
  const char* const message = "moe: MoELayer: Pass.valid has 11 entries, x has 12 rows";
  CHECK_THROWS_WITH(layer.forward(x, tape, {.step = 0, .valid = wrong}), message);
  CHECK_FALSE(tape.trained);
  CHECK_THROWS_WITH(layer.evaluate(x, tape, {.valid = wrong}), message);
  CHECK_THROWS_AS(layer.evaluate(x, tape, {.valid = wrong}), std::invalid_argument);
  CHECK_THROWS_WITH(layer.forward(x, tape, {.step = 0, .loss_scale = -0.5}),
                    "moe: MoELayer: Pass.loss_scale = -0.5, must be finite and at least 0");
  const std::vector<double> noise(5, 0.5);
  CHECK_THROWS_AS(layer.forward(x, tape, {.step = 0, .noise = noise}), std::invalid_argument);
  CHECK_FALSE(tape.trained);
}

TEMPLATE_TEST_CASE("layer: gradients of masked passes with loss_scale are derivatives",
                   "[layer][mask]", test::NoisyTopKLaw<double>, test::SoftmaxLaw<double>,
                   test::SigmoidLaw<double>) {
  const Mask valid{1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1};  // of sequences of unequal length
  const Pass pass{.step = 2, .valid = valid, .loss_scale = 0.3};
  for (const Activation output : {Activation::identity, Activation::sigmoid}) {
    auto layer = [&] {
      auto gate = TestType::config();
      gate.width = 0;
      return Layer<TestType>({.width = 5,
                              .expert = {.hidden = 3, .activation = Activation::gelu},
                              .gate = gate,
                              .output = output,
                              .seed = 4});
    }();
    const Matrix<double> dy = random_matrix(12, 5, 2);
    bool checked = false;
    for (std::uint64_t seed = 1; !checked && seed < 60; ++seed) {
      test::randomize(layer, seed, 0.7);
      Matrix<double> x = random_matrix(12, 5, seed);
      typename Layer<TestType>::Tape tape;
      layer.forward(x, tape, pass);
      bool same = true;
      const auto loss = [&] {
        typename Layer<TestType>::Tape fresh;
        const Matrix<double>& y = layer.forward(x, fresh, pass);
        same = same && TestType::choices(fresh.gate) == TestType::choices(tape.gate);
        return y.cwiseProduct(dy).sum() + fresh.balance().loss;
      };
      test::difference_gradient(x, loss);
      for_each_parameter(layer, [&](const std::string& name, Parameter<double>& p) {
        if (name.starts_with("gate")) test::difference_gradient(p.value, loss, 0.7e-4);
      });
      if (!same) continue;
      zero_gradients(layer);
      const Matrix<double> dx = layer.backward(dy, tape);
      test::check_scaled_gradients(layer, dx, x, loss, 0.7, 1, 1);
      checked = true;
    }
    CHECK(checked);
  }
}

namespace {

/// Gives every row a slot, padding too.
struct ToPadding {
  using Scalar = double;
  struct Config {
    Index width = 0;
  };
  using Tape = GateTape<double>;
  ToPadding(const Config&, std::uint64_t) {}
  Index experts() const { return 1; }
  void forward(const MatrixRef<double>& x, Tape& tape, const Pass&) const { route(x, tape); }
  void evaluate(const MatrixRef<double>& x, Tape& tape, const EvaluationPass&) const {
    route(x, tape);
  }
  void backward(const MatrixRef<double>&, std::span<const double>, Tape&, Matrix<double>&) {}
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}

 private:
  static void route(const MatrixRef<double>& x, Tape& tape) {
    tape.routing.experts = 1;
    tape.routing.token_offsets.clear();
    for (Index t = 0; t <= x.rows(); ++t) tape.routing.token_offsets.push_back(t);
    tape.routing.expert.assign(detail::to_size(x.rows()), 0);
    tape.routing.weight.assign(detail::to_size(x.rows()), 1.0);
  }
};

}  // namespace

TEST_CASE("layer: a gate that gives padding a slot is refused", "[layer][mask]") {
  const MoELayer<Expert<FeedForward, double>, ToPadding> layer(
      {.width = 5, .expert = {.hidden = 2}, .seed = 0});
  decltype(layer)::Tape tape;
  const Matrix<double> x = random_matrix(4, 5, 1);
  const Mask valid{1, 1, 0, 1};
  const char* const message = "moe: MoELayer: row 2 of x is not valid, but the gate gave it a slot";
  CHECK_THROWS_WITH(layer.forward(x, tape, {.step = 0, .valid = valid}), message);
  CHECK_THROWS_WITH(layer.evaluate(x, tape, {.valid = valid}), message);
  CHECK_NOTHROW(layer.forward(x, tape, {.step = 0}));
}
