#include <limits>

#include "law_runs.hpp"

// The gates' own losses: Pass::loss_scale and set_loss_weights().

using namespace moe;
using namespace moe::test;

namespace {

template <class Law>
constexpr bool has_losses = Law::loss_weights.size() > 0;

/// Weights of its own for each loss.
template <class Law>
typename Law::LossWeights other_weights() {
  typename Law::LossWeights weights;
  double weight = 0.25;
  for (const auto& [name, member] : Law::loss_weights) {
    weights.*member = weight;
    weight *= 2;
  }
  return weights;
}

template <class Law>
void set_loss_weights(typename Law::Gate& gate, const typename Law::LossWeights& weights) {
  if constexpr (has_losses<Law>) gate.set_loss_weights(weights);
}

/// The gradients of the gate's own losses alone.
template <class Law>
Matrix<typename Law::Scalar> no_dweight(Index rows = 12) {
  return Matrix<typename Law::Scalar>::Zero(rows, random_dweight<Law>(rows).cols());
}

template <class Scalar>
double error(Scalar actual, Scalar expected) {
  return test::relative_error(Matrix<Scalar>::Constant(1, 1, actual),
                              Matrix<Scalar>::Constant(1, 1, expected));
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("gates: the single losses add up to the loss", "[gate][laws][loss]",
                        test::GateLaws) {
  const auto gate = make_gate<TestType>();
  typename TestType::Tape tape;
  const auto check = [&](bool training) {
    CHECK(tape.balance.losses.sum() == tape.balance.loss);
    Index used = 0;
    for (const auto loss : test::as_array(tape.balance.losses)) used += loss > 0 ? 1 : 0;
    if (training) CHECK((used > 0) == has_losses<TestType>);
  };
  gate.forward(random_rows<TestType>(), tape, {.step = 3, .loss_scale = 0.3});
  check(true);
  gate.evaluate(random_rows<TestType>(), tape);
  check(false);
}

TEMPLATE_LIST_TEST_CASE("gates: losses and their gradients are in proportion to loss_scale",
                        "[gate][laws][loss]", test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const auto gate = make_gate<TestType>();
  const Matrix<Scalar> x = random_rows<TestType>();
  GateRun<TestType> whole(gate, x, no_dweight<TestType>(), {.step = 3});
  CHECK((whole.dx.cwiseAbs().maxCoeff() > 0) == has_losses<TestType>);
  for (const double scale : {0.25, 2.0, 0.3}) {
    // A power of two changes no digit.
    const double near = scale == 0.3 ? test::tolerance<Scalar> : 0.0;
    GateRun<TestType> part(gate, x, no_dweight<TestType>(), {.step = 3, .loss_scale = scale});
    CHECK(same_routing(part.tape.routing, whole.tape.routing));
    const auto by = static_cast<Scalar>(scale);
    CHECK(error(part.tape.balance.loss, by * whole.tape.balance.loss) <= near);
    for (std::size_t i = 0; i < 6; ++i) {
      CHECK(error(test::as_array(part.tape.balance.losses)[i],
                  by * test::as_array(whole.tape.balance.losses)[i]) <= near);
    }
    CHECK(same_bits(part.tape.balance.importance, whole.tape.balance.importance));
    CHECK(same_bits(part.tape.balance.load, whole.tape.balance.load));
    CHECK(test::relative_error(part.dx, Matrix<Scalar>(by * whole.dx)) <= 10 * near);
    const test::Named gradients = test::gradients_of(whole.gate);
    for (const auto& [name, gradient] : test::gradients_of(part.gate)) {
      INFO(name);
      CHECK(test::relative_error(gradient, Matrix<double>(scale * gradients.at(name))) <=
            10 * near);
    }
  }
  // That of the weights is not scaled, and a scale of 0 is that of no loss.
  auto without = gate;
  set_loss_weights<TestType>(without, {});
  GateRun<TestType> unweighted(without, x, random_dweight<TestType>(), {.step = 3});
  GateRun<TestType> unscaled(gate, x, random_dweight<TestType>(), {.step = 3, .loss_scale = 0});
  check_same(unscaled, unweighted);
  CHECK(unscaled.tape.balance.loss == 0);
  CHECK(unscaled.dx.cwiseAbs().maxCoeff() > 0);
}

TEMPLATE_LIST_TEST_CASE("gates: n passes of a batch, each with 1/n, are one pass",
                        "[gate][laws][loss]", test::GateLaws) {
  // Losses are of a pass: n different micro-batches with 1/n each have the mean of their losses,
  // which is the loss of all their tokens only where that is a mean over tokens, as the z-loss is.
  using Scalar = typename TestType::Scalar;
  const Matrix<Scalar> x = random_rows<TestType>();
  const Matrix<Scalar> r = random_dweight<TestType>();
  GateRun<TestType> once(make_gate<TestType>(), x, r, {.step = 3});
  auto gate = make_gate<TestType>();
  typename TestType::Tape tape;
  Matrix<Scalar> dx = Matrix<Scalar>::Zero(12, x.cols());
  Scalar loss{0};
  for (int pass = 0; pass < 4; ++pass) {
    gate.forward(x, tape, {.step = 3, .loss_scale = 0.25});
    loss += tape.balance.loss;
    gate.backward(x, test::dweight_of(tape.routing, Matrix<Scalar>(r / Scalar{4})), tape, dx);
  }
  CHECK(error(loss, once.tape.balance.loss) <= tolerance<Scalar>);
  CHECK(test::relative_error(dx, once.dx) <= tolerance<Scalar>);
  const test::Named expected = test::gradients_of(once.gate);
  for (const auto& [name, gradient] : test::gradients_of(gate)) {
    INFO(name);
    CHECK(test::relative_error(gradient, expected.at(name)) <= tolerance<Scalar>);
  }
}

TEST_CASE("gates: a loss that is a mean over tokens is that of equal micro-batches with 1/n each",
          "[gate][laws][loss]") {
  using Law = test::SoftmaxLaw<double>;
  auto config = Law::config();
  config.switch_loss_weight = config.sequence_loss_weight = 0;
  const auto gate = make_gate<Law>(1, config);
  const Matrix<double> x = random_rows<Law>();
  const Matrix<double> r = random_dweight<Law>();
  GateRun<Law> whole(gate, x, r, {.step = 3});
  double loss = 0;
  auto sum = gate;
  for (const Index first : {0, 4, 8}) {
    typename Law::Tape tape;
    const Matrix<double> rows = x.middleRows(first, 4);
    sum.forward(rows, tape, {.step = 3, .loss_scale = 1.0 / 3});
    loss += tape.balance.loss;
    Matrix<double> dx = Matrix<double>::Zero(4, x.cols());
    sum.backward(rows, test::dweight_of(tape.routing, Matrix<double>(r.middleRows(first, 4))), tape,
                 dx);
    CHECK(test::relative_error(dx, Matrix<double>(whole.dx.middleRows(first, 4))) < 1e-14);
  }
  CHECK_THAT(loss, Catch::Matchers::WithinRel(whole.tape.balance.loss, 1e-14));
  CHECK(test::relative_error(test::parameter(sum, "weight").gradient(),
                             test::parameter(whole.gate, "weight").gradient()) < 1e-14);
}

TEMPLATE_LIST_TEST_CASE("gates: gradients with loss_scale are derivatives", "[gate][laws][loss]",
                        test::GateLawsInDouble) {
  for (const double scale : {0.3, 3.0}) {
    test::check_gradients<TestType>({.step = 3, .loss_scale = scale});
  }
}

TEMPLATE_LIST_TEST_CASE("gates: a loss_scale out of range is refused", "[gate][laws][loss]",
                        test::GateLaws) {
  const auto gate = make_gate<TestType>();
  typename TestType::Tape tape;
  const std::string begin = std::string("moe: ") + TestType::name + ": Pass.loss_scale = ";
  for (const auto& [scale, number] : {std::pair{-1.0, "-1"},
                                      {std::nan(""), "nan"},
                                      {std::numeric_limits<double>::infinity(), "inf"}}) {
    const Pass pass{.step = 0, .loss_scale = scale};
    CHECK_THROWS_AS(gate.forward(random_rows<TestType>(), tape, pass), std::invalid_argument);
    CHECK_THROWS_WITH(gate.forward(random_rows<TestType>(), tape, pass),
                      begin + number + ", must be finite and at least 0");
    CHECK_FALSE(tape.trained);
  }
}

TEMPLATE_LIST_TEST_CASE("gates: new loss weights are those of the passes after",
                        "[gate][laws][loss]", test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  if constexpr (has_losses<TestType>) {
    const auto weights = other_weights<TestType>();
    const Matrix<Scalar> x = random_rows<TestType>();
    const Matrix<Scalar> r = random_dweight<TestType>();
    const auto gate = make_gate<TestType>();
    GateRun<TestType> before(gate, x, r, {.step = 3});

    // A backward pass has those of its forward pass.
    auto changed = gate;
    typename TestType::Tape tape;
    changed.forward(x, tape, {.step = 3});
    changed.set_loss_weights(weights);
    const Matrix<Scalar> dx = test::gate_dx(changed, x, test::dweight_of(tape.routing, r), tape);
    CHECK(same_bits(dx, before.dx));
    CHECK(same_bits(test::gradients_of(changed), test::gradients_of(before.gate)));

    // The others have the new ones: losses in proportion to each, and other gradients.
    zero_gradients(changed);
    GateRun<TestType> after(changed, x, r, {.step = 3});
    CHECK(after.tape.balance.loss != before.tape.balance.loss);
    CHECK_FALSE(same_bits(after.dx, before.dx));
    auto unit = gate;
    unit.set_loss_weights([&] {
      typename TestType::LossWeights ones;
      for (const auto& [name, member] : TestType::loss_weights) ones.*member = 1;
      return ones;
    }());
    typename TestType::Tape units;
    unit.forward(x, units, {.step = 3});
    for (const bool training : {true, false}) {
      if (!training) {
        changed.evaluate(x, after.tape);
        unit.evaluate(x, units);
      }
      const auto& losses = after.tape.balance.losses;
      const auto& of_one = units.balance.losses;
      Scalar sum{0};
      for (const auto& [name, member] : TestType::loss_weights) {
        const std::string loss = name;
        const auto factor = static_cast<Scalar>(weights.*member);
        const auto check = [&](Scalar actual, Scalar one) {
          INFO(loss);
          CHECK(error(actual, factor * one) <= tolerance<Scalar>);
          sum += actual;
        };
        if (loss == "importance") check(losses.importance, of_one.importance);
        if (loss == "load") check(losses.load, of_one.load);
        if (loss == "switch_loss") check(losses.switch_loss, of_one.switch_loss);
        if (loss == "sequence") check(losses.sequence, of_one.sequence);
        if (loss == "z") check(losses.z, of_one.z);
        if (loss == "threshold") check(losses.threshold, of_one.threshold);
      }
      CHECK(error(after.tape.balance.loss, sum) <= tolerance<Scalar>);
    }

    // Each loss of weight 0 is left out, its gradient too.
    for (const auto& [name, member] : TestType::loss_weights) {
      INFO(name);
      auto alone = gate;
      typename TestType::LossWeights one;
      one.*member = 0.5;
      alone.set_loss_weights(one);
      typename TestType::Tape of_one_loss;
      alone.forward(x, of_one_loss, {.step = 3});
      Index used = 0;
      for (const Scalar loss : test::as_array(of_one_loss.balance.losses)) used += loss != 0;
      CHECK(used <= 1);
    }
  }
}

TEMPLATE_LIST_TEST_CASE("gates: gradients with new loss weights are derivatives",
                        "[gate][laws][loss]", test::GateLawsInDouble) {
  if constexpr (has_losses<TestType>) {
    const auto with = [](const typename TestType::LossWeights& weights) {
      test::check_gradients<TestType>(
          {.step = 3}, 12, [&](typename TestType::Gate& gate) { gate.set_loss_weights(weights); });
    };
    with(other_weights<TestType>());
    for (const auto& [name, member] : TestType::loss_weights) {
      INFO(name);
      typename TestType::LossWeights alone;
      alone.*member = 1.7;
      with(alone);
    }
  }
}

TEMPLATE_LIST_TEST_CASE("gates: a loss weight out of range is refused and changes nothing",
                        "[gate][laws][loss]", test::GateLaws) {
  if constexpr (has_losses<TestType>) {
    auto gate = make_gate<TestType>();
    const auto x = random_rows<TestType>();
    typename TestType::Tape before;
    gate.forward(x, before, {.step = 3});
    for (const auto& [name, member] : TestType::loss_weights) {
      const std::string begin =
          std::string("moe: ") + TestType::loss_name + "::LossWeights." + name + " = ";
      for (const auto& [weight, number] : {std::pair{-1.0, "-1"},
                                           {std::nan(""), "nan"},
                                           {std::numeric_limits<double>::infinity(), "inf"}}) {
        auto weights = other_weights<TestType>();
        weights.*member = weight;
        CHECK_THROWS_AS(gate.set_loss_weights(weights), std::invalid_argument);
        CHECK_THROWS_WITH(gate.set_loss_weights(weights),
                          begin + number + ", must be finite and at least 0");
      }
    }
    typename TestType::Tape after;
    gate.forward(x, after, {.step = 3});
    CHECK(same_balance(after.balance, before.balance));
  }
}
