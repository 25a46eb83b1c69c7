#include "moe/testing/check_gradients.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../layer/user_parts.hpp"
#include "../naive_layer.hpp"
#include "../reinforce/policies.hpp"
#include "../support.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;
using moe::test::random_matrix;

namespace {

enum class Fault {
  none,
  sign,
  transposed,
  lost_term,
  off_by_one,
  not_a_number,
  written_over,
  row_written_over
};

/// y = x·W + b with faults to choose from in the gradients of a 3 x 3 matrix and of b.
struct Faulty {
  Fault fault = Fault::none;
  Parameter<double> weight{3, 3};
  Parameter<double> bias{1, 3};

  Faulty() {
    weight.value = random_matrix(3, 3, 1);
    bias.value = random_matrix(1, 3, 2);
    detail::track_gradients(weight);
    detail::track_gradients(bias);
  }
  Matrix<double> forward(const Matrix<double>& x) const {
    return (x * weight.value).rowwise() + bias.value.row(0);
  }
  void backward(const Matrix<double>& x, const Matrix<double>& dy) {
    const Matrix<double> dweight = x.transpose() * dy;
    if (fault == Fault::written_over) weight.gradient().setZero();
    if (fault == Fault::row_written_over) weight.gradient().row(2).setZero();
    weight.gradient() += fault == Fault::sign         ? Matrix<double>(-dweight)
                         : fault == Fault::transposed ? Matrix<double>(dweight.transpose())
                                                      : dweight;
    if (fault == Fault::lost_term) weight.gradient()(1, 2) -= x(0, 1) * dy(0, 2);
    if (fault == Fault::not_a_number) weight.gradient()(2, 1) = std::nan("");
    for (Index t = 0; t < dy.rows() - (fault == Fault::off_by_one ? 1 : 0); ++t) {
      bias.gradient() += dy.row(t);
    }
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight);
    visit("bias", self.bias);
  }
};

GradientCheck check(Fault fault) {
  Faulty module;
  module.fault = fault;
  const Matrix<double> x = random_matrix(4, 3, 3);
  const Matrix<double> r = random_matrix(4, 3, 4);
  return check_gradients(
      module, [&] { return module.forward(x).cwiseProduct(r).sum(); },
      [&] { module.backward(x, r); });
}

using Layer = MoELayer<Expert<FeedForward, double>>;

Layer make_layer(Activation activation) {
  Layer layer({.width = 4,
               .expert = {.hidden = 5, .activation = activation},
               .gate = {.experts = 5, .top_k = 2},
               .seed = 1});
  test::randomize(layer, 2, 0.6);
  return layer;
}

enum class Forgotten { nothing, scale, padding_in_loss, padding_in_y, padding_in_maximum, weights };

/// The noisy gate, which forgets something of the pass in forward() and in backward() alike, with a loss of
/// its own: the mean over tokens of the squares of x.
template <Forgotten forgotten>
class Forgetful : public NoisyTopKGate<double> {
 public:
  using Base = NoisyTopKGate<double>;
  using Base::Base;

  void forward(const MatrixRef<double>& x, Tape& tape, Pass pass) const {
    if (forgotten == Forgotten::scale) pass.loss_scale = 1;
    Base::forward(x, tape, pass);
    for (Index row = 0; row < x.rows(); ++row) {
      if (counts(tape, row)) tape.balance.loss += factor(tape) * x.row(row).squaredNorm();
    }
    // Weights that depend on a row of padding, as those of a gate that normalises over all rows do; a maximum
    // does not see a NaN.
    double largest = 0;
    for (Index i = 0; i < x.size(); ++i) largest = std::max(largest, x.data()[i]);
    const bool sees = (forgotten == Forgotten::padding_in_y && std::isnan(x.sum())) ||
                      (forgotten == Forgotten::padding_in_maximum && largest > 100);
    if (sees) std::fill(tape.routing.weight.begin(), tape.routing.weight.end(), 0.5);
    if (forgotten == Forgotten::weights) tape.routing.weight[0] = std::nan("");
  }
  void backward(const MatrixRef<double>& x, std::span<const double> dweight, Tape& tape,
                Matrix<double>& dx) {
    Base::backward(x, dweight, tape, dx);
    for (Index row = 0; row < x.rows(); ++row) {
      if (counts(tape, row)) dx.row(row) += 2 * factor(tape) * x.row(row);
    }
  }

 private:
  static double factor(const Tape& tape) {
    return tape.loss_scale / static_cast<double>(tape.tokens.count);
  }
  static bool counts(const Tape& tape, Index row) {
    return forgotten == Forgotten::padding_in_loss || tape.routing.slots_of_token(row).count > 0;
  }
};

template <Forgotten forgotten>
GradientCheck check_forgetful(const Pass& pass) {
  MoELayer<Expert<FeedForward, double>, Forgetful<forgotten>> layer(
      {.width = 4,
       .expert = {.hidden = 5, .activation = Activation::gelu},
       .gate = {.experts = 5, .top_k = 2},
       .seed = 1});
  test::randomize(layer, 2, 0.6);
  return check_layer_gradients(layer, random_matrix(6, 4, 5), pass);
}

/// A network whose gradient is that of its last call.
template <class Scalar>
struct WritesOver : test::SineMap<Scalar> {
  using test::SineMap<Scalar>::SineMap;
  void backward(ConstMatrixView<Scalar> x, ConstMatrixView<Scalar> saved,
                ConstMatrixView<Scalar> dy, MatrixView<Scalar> dx) {
    this->w.gradient().setZero();
    test::SineMap<Scalar>::backward(x, saved, dy, dx);
  }
};

/// A network that takes the memory of dx for zeros.
template <class Scalar>
struct AddsToDx : test::SineMap<Scalar> {
  using test::SineMap<Scalar>::SineMap;
  void backward(ConstMatrixView<Scalar> x, ConstMatrixView<Scalar> saved,
                ConstMatrixView<Scalar> dy, MatrixView<Scalar> dx) {
    const Matrix<Scalar> before = dx;
    test::SineMap<Scalar>::backward(x, saved, dy, dx);
    dx += before;
  }
};

struct GateThatWritesOver : NoisyTopKGate<double> {
  using NoisyTopKGate::NoisyTopKGate;
  void backward(const MatrixRef<double>& x, std::span<const double> dweight, Tape& tape,
                Matrix<double>& dx) {
    zero_gradients(*this);
    NoisyTopKGate::backward(x, dweight, tape, dx);
  }
};

struct PolicyThatWritesOver : test::SmallPolicy<double> {
  PolicyThatWritesOver() : SmallPolicy({.mixture = false}) {}
  void backward(const Matrix<double>& dlogits, Tape& tape) {
    for_each_parameter(*this, [](const std::string& name, Parameter<double>& p) {
      if (name == "symbol.weight") p.gradient().setZero();
    });
    SmallPolicy::backward(dlogits, tape);
  }
};

template <template <class> class Network, class Gate>
GradientCheck check_parts() {
  MoELayer<Expert<Network, double>, Gate> layer(
      {.width = 3, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
  test::randomize(layer, 2, 0.6);
  return check_layer_gradients(layer, random_matrix(7, 3, 5), {.step = 3});
}

}  // namespace

TEST_CASE("check gradients: a pass that is forgotten in forward and backward alike", "[testing]") {
  using Catch::Matchers::StartsWith;
  const std::vector<std::uint8_t> valid{1, 1, 0, 1, 1, 0};
  const Pass padded{.step = 3, .valid = valid};
  CHECK(check_forgetful<Forgotten::nothing>(padded).error < 1e-7);
  CHECK(check_forgetful<Forgotten::nothing>({.step = 3, .loss_scale = 0.25}).error < 1e-7);
  CHECK(check_forgetful<Forgotten::nothing>({.step = 3, .loss_scale = 0}).error < 1e-7);
  CHECK_THROWS_WITH(check_forgetful<Forgotten::scale>({.step = 3}),
                    StartsWith("moe: check_layer_gradients: the gate's loss is "));
  CHECK_THROWS_WITH(check_forgetful<Forgotten::scale>({.step = 3}),
                    Catch::Matchers::EndsWith(" with 0.5, must be in proportion"));
  CHECK_THROWS_WITH(
      check_forgetful<Forgotten::padding_in_loss>(padded),
      Catch::Matchers::EndsWith(" and nan with nan in padding, which must not be read"));
  CHECK_THROWS_WITH(
      check_forgetful<Forgotten::padding_in_y>(padded),
      "moe: check_layer_gradients: row 0 of y changes with nan in padding, which must "
      "not be read");
  CHECK_THROWS_WITH(check_forgetful<Forgotten::padding_in_maximum>(padded),
                    "moe: check_layer_gradients: row 0 of y changes with 1000 in padding, which "
                    "must not be read");
  // A y of NaN is not the fault of what reads padding: every difference is NaN and left out.
  const GradientCheck none = check_forgetful<Forgotten::weights>(padded);
  CHECK(none.kinks == none.checked);
  CHECK(std::isnan(none.error));  // so that error < 1e-7 is false where nothing was compared
  CHECK(none.text() ==
        "all " + std::to_string(none.checked) + " entries were left out: nothing was compared");
  // Without padding there is nothing to read.
  CHECK(check_forgetful<Forgotten::padding_in_loss>({.step = 3}).error < 1e-7);
}

TEST_CASE("check gradients: right ones pass, and each fault is found and named", "[testing]") {
  const GradientCheck right = check(Fault::none);
  CHECK(right.error < 1e-9);
  CHECK(right.checked == 12);
  CHECK(right.kinks == 0);
  const auto expect = [](Fault fault, const std::string& parameter) {
    const GradientCheck wrong = check(fault);
    CHECK(wrong.error > 1e-2);
    CHECK(wrong.parameter == parameter);
    CHECK(std::abs(wrong.gradient - wrong.difference) > 1e-3);
    return wrong;
  };
  expect(Fault::sign, "weight");
  expect(Fault::transposed, "weight");
  expect(Fault::off_by_one, "bias");
  const GradientCheck lost = expect(Fault::lost_term, "weight");
  CHECK(lost.row == 1);
  CHECK(lost.column == 2);
  const GradientCheck nan = check(Fault::not_a_number);
  CHECK(std::isnan(nan.error));
  CHECK(nan.row == 2);
  CHECK(nan.column == 1);
  CHECK(nan.text().starts_with("weight(2, 1) is nan, differences say "));
}

TEST_CASE("check gradients: a gradient that is written over instead of added to", "[testing]") {
  using Catch::Matchers::EndsWith;
  using Catch::Matchers::StartsWith;
  CHECK_THROWS_WITH(check(Fault::written_over),
                    StartsWith("moe: check_gradients: the gradient of weight(0, 0) was "));
  CHECK_THROWS_WITH(check(Fault::written_over),
                    EndsWith(": backward must add to the gradient, the same in every pass"));
  CHECK_THROWS_WITH(check(Fault::row_written_over),
                    StartsWith("moe: check_gradients: the gradient of weight(2, 0) was "));

  // A loss of 3·w.
  Linear<double> linear({.inputs = 1, .outputs = 1, .bias = false}, 1);
  CHECK_THROWS_WITH(
      check_gradients(
          linear, [&] { return 3 * linear.weight.value(0, 0); },
          [&] { linear.weight.gradient()(0, 0) = 3; }),
      "moe: check_gradients: the gradient of weight(0, 0) was 3 before a backward pass and is 3 "
      "after it, must be 6: backward must add to the gradient, the same in every pass");
}

TEST_CASE(
    "check gradients: a second pass that is lost, or throws, leaves the gradients of the first",
    "[testing]") {
  // A loss of w/10000: the gradient is small beside what it is set to before the second pass.
  Linear<double> linear({.inputs = 1, .outputs = 1, .bias = false}, 1);
  double& gradient = linear.weight.gradient()(0, 0);
  const auto loss = [&] { return 1e-4 * linear.weight.value(0, 0); };
  CHECK_THROWS_WITH(check_gradients(linear, loss,
                                    [&] {
                                      if (gradient == 0) gradient = 1e-4;
                                    }),
                    "moe: check_gradients: the gradient of weight(0, 0) was 1 before a backward "
                    "pass and is 1 after it, must be 1.0001: backward must add to the gradient, "
                    "the same in every pass");
  CHECK(gradient == 1e-4);

  CHECK_THROWS_WITH(check_gradients(linear, loss,
                                    [&] {
                                      if (gradient != 0) throw std::runtime_error("twice");
                                      gradient += 1e-4;
                                    }),
                    "twice");
  CHECK(gradient == 1e-4);
}

TEST_CASE("check gradients: a network, a gate and a policy that write over a gradient",
          "[testing]") {
  using Catch::Matchers::StartsWith;
  CHECK(check_parts<test::SineMap, NoisyTopKGate<double>>().error < 1e-7);
  CHECK_THROWS_WITH(
      (check_parts<WritesOver, NoisyTopKGate<double>>()),
      StartsWith("moe: check_layer_gradients: the gradient of experts.0.w(0, 0) was "));
  CHECK_THROWS_WITH(
      (check_parts<test::SineMap, GateThatWritesOver>()),
      StartsWith("moe: check_layer_gradients: the gradient of gate.weight(0, 0) was "));

  PolicyThatWritesOver policy;
  const std::vector<Index> inputs{0, 2};
  const std::vector<Index> previous{0, 0, 0, 0, 1, -1, 2, 1};
  CHECK_THROWS_WITH(
      check_policy_gradients(policy, inputs, 2, previous),
      StartsWith("moe: check_policy_gradients: the gradient of symbol.weight(0, 0) was "));
}

TEST_CASE("check gradients: a dx that is added to what its memory held", "[testing]") {
  const GradientCheck wrong = check_parts<AddsToDx, NoisyTopKGate<double>>();
  CHECK(wrong.error > 1e-2);
  CHECK(wrong.parameter == "x");
}

TEST_CASE("check gradients: afterwards the gradients are those of one pass", "[testing]") {
  Layer layer = make_layer(Activation::gelu);
  const Matrix<double> x = random_matrix(6, 4, 5);
  const auto gradients = [&] {
    std::vector<Matrix<double>> all;
    for_each_parameter(layer, [&](const std::string&, Parameter<double>& parameter) {
      all.push_back(parameter.gradient());
    });
    return all;
  };
  check_layer_gradients(layer, x, {.step = 3});
  const auto checked = gradients();
  zero_gradients(layer);
  Layer::Tape tape;
  const Matrix<double> dy = detail::loss_weights_like(layer.forward(x, tape, {.step = 3}));
  layer.backward(dy, tape);
  const bool same = gradients() == checked;
  CHECK(same);
}

TEST_CASE("check gradients: the rounding of a gradient of zero is no lost pass", "[testing]") {
  // w·(Σ x - Σ x) with numbers of 1e6, which cancel but for their last bits.
  int rounded = 0;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const Matrix<double> x = random_matrix(1, 40, seed, 1e6 / 3);
    Linear<double> linear({.inputs = 1, .outputs = 1, .bias = false}, 1);
    const auto add = [&](double& sum) {
      for (Index i = 0; i < x.size(); ++i) sum += x(0, i);
      for (Index i = x.size(); i-- > 0;) sum -= x(0, i);
    };
    double rounding = 0;
    add(rounding);
    rounded += rounding == 0 ? 0 : 1;
    check_gradients(
        linear, [&] { return linear.weight.value(0, 0) * rounding; },
        [&] { add(linear.weight.gradient()(0, 0)); });
  }
  CHECK(rounded > 40);
}

TEST_CASE("check gradients: a layer, with its gate, its experts and dx", "[testing]") {
  Layer layer = make_layer(Activation::gelu);
  const Matrix<double> x = random_matrix(6, 4, 5);
  const GradientCheck right = check_layer_gradients(layer, x, {.step = 3});
  CHECK(right.error < 1e-7);
  CHECK(right.checked == 6 * 4 + parameter_count(layer));
  CHECK(right.kinks < right.checked / 10);
  // What is frozen is not checked.
  for_each_parameter(layer, [](const std::string& name, Parameter<double>& p) {
    if (name.starts_with("experts.")) p.trained = false;
  });
  CHECK(check_layer_gradients(layer, x, {.step = 3}).checked == 6 * 4 + 2 * 4 * 5);
}

TEST_CASE("check gradients: kinks are left out and counted", "[testing]") {
  // A token and a bias that put a hidden unit of a ReLU at 0.
  Layer layer = make_layer(Activation::relu);
  for_each_parameter(layer, [](const std::string& name, Parameter<double>& p) {
    if (name.ends_with("up.bias")) p.value.setZero();
  });
  Matrix<double> x = random_matrix(6, 4, 5);
  x.row(2).setZero();
  const GradientCheck check = check_layer_gradients(layer, x, {.step = 3});
  CHECK(check.kinks >= 4);
  CHECK(check.error < 1e-7);
}

TEST_CASE("check gradients: a policy with a mixture inside", "[testing]") {
  using Policy = test::SmallPolicy<double>;
  Policy policy({.nan_in_padding = true});
  const std::vector<Index> inputs{0, 2};
  // Two steps of four rows; the second row has ended after one.
  const std::vector<Index> previous{0, 0, 0, 0, 1, -1, 2, 1};
  const NoiseKey noise{.step = 4};
  const auto losses = [](const Policy::Tape& tape) {
    return static_cast<double>(tape.mixture.balance().loss);
  };
  const GradientCheck right = check_policy_gradients(policy, inputs, 2, previous, noise, losses);
  CHECK(right.error < 1e-7);
  CHECK(right.checked == parameter_count(policy));
  // Without the balance losses the gate's gradients do not fit.
  const GradientCheck wrong = check_policy_gradients(policy, inputs, 2, previous, noise);
  CHECK(wrong.error > 1e-3);
  CHECK(wrong.parameter.find("gate") != std::string::npos);
}
