#include <algorithm>
#include <limits>
#include <string_view>

#include "../allocation.hpp"
#include "law_runs.hpp"
#include "token_choice_checks.hpp"

// What every gate must do. mask_laws_test.cpp has what padding means to it, loss_laws_test.cpp its
// losses, noise_laws_test.cpp noise that is given,
// refusal_laws_test.cpp what it refuses.

using namespace moe;
using namespace moe::test;

// The laws take the class in messages from the gates.
using namespace std::string_view_literals;
static_assert(NoisyTopKGate<>::name == "NoisyTopKGate"sv);
static_assert(HierarchicalGate<>::name == "HierarchicalGate"sv);
static_assert(ProductKeyGate<>::name == "ProductKeyGate"sv);
static_assert(TopKGate<>::name == "TopKGate"sv);
static_assert(BalancedGate<>::name == "BalancedGate"sv);
static_assert(ExpertChoiceGate<>::name == "ExpertChoiceGate"sv);
static_assert(SharedExpertGate<TopKGate<>>::name == "SharedExpertGate"sv);

TEMPLATE_LIST_TEST_CASE("gates: are gates", "[gate][laws]", test::GateLaws) {
  static_assert(Gate<typename TestType::Gate>);
  const auto gate = make_gate<TestType>();
  CHECK(gate.config().width == 5);
  typename TestType::Tape tape;
  CHECK(gate.forward(random_rows<TestType>(), tape, {.step = 0}).experts == gate.experts());
}

TEMPLATE_LIST_TEST_CASE("gates: gradients agree with differences", "[gate][laws]",
                        test::GateLawsInDouble) {
  test::check_gradients<TestType>({.step = 3, .first_token = 5});
}

TEMPLATE_LIST_TEST_CASE("gates: backward adds the same again", "[gate][laws]", test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const Matrix<Scalar> x = random_rows<TestType>();
  const Matrix<Scalar> r = random_dweight<TestType>();
  GateRun<TestType> run(make_gate<TestType>(), x, r, {.step = 3});
  const test::Named once = test::gradients_of(run.gate);
  const auto dweight = test::dweight_of(run.tape.routing, r);
  for (const double times : {2.0, 3.0}) {
    CHECK(same_bits(test::gate_dx(run.gate, x, dweight, run.tape), run.dx));
    for (const auto& [name, gradient] : test::gradients_of(run.gate)) {
      INFO(name);
      CHECK((once.at(name).cwiseAbs().maxCoeff() > 0) ==
            (name.find("selection_bias") == std::string::npos &&
             !(name.find("noise_weight") != std::string::npos &&
               std::is_same_v<TestType, test::NoisyTopKLaw<Scalar, false>>)));
      CHECK(test::relative_error(gradient, Matrix<double>(times * once.at(name))) <
            test::tolerance<Scalar> / 10);
    }
  }
  // To dx too.
  Matrix<Scalar> dx = x;
  run.gate.backward(x, dweight, run.tape, dx);
  CHECK(test::relative_error(dx, Matrix<Scalar>(x + run.dx)) < test::tolerance<Scalar>);
}

TEMPLATE_LIST_TEST_CASE("gates: the same bits on any number of threads", "[gate][laws]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const Matrix<Scalar> x = random_rows<TestType>(600);
  const Matrix<Scalar> r = random_dweight<TestType>(600);
  const auto run = [&](int threads, typename TestType::Tape& served) {
    const test::Threads scope(threads);
    GateRun<TestType> result(make_gate<TestType>(), x, r, {.step = 1});
    result.gate.evaluate(x, served);
    return result;
  };
  typename TestType::Tape served;
  GateRun<TestType> expected = run(1, served);
  for (const int threads : {2, 3, 8}) {
    INFO(threads << " threads");
    typename TestType::Tape other;
    GateRun<TestType> actual = run(threads, other);
    check_same(actual, expected);
    CHECK(same_routing(other.routing, served.routing));
    CHECK(same_balance(other.balance, served.balance));
  }
}

TEMPLATE_LIST_TEST_CASE("gates: passes are const, replay, and may be in flight together",
                        "[gate][laws]", test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const auto gate = make_gate<TestType>();
  const Matrix<Scalar> x = random_rows<TestType>();
  const Matrix<Scalar> longer = random_rows<TestType>(18, 2);
  const Matrix<Scalar> r = random_dweight<TestType>();
  GateRun<TestType> expected(gate, x, r, {.step = 3});
  GateRun<TestType> of_longer(gate, longer, random_dweight<TestType>(18), {.step = 4});

  // A used tape is as good as a new one.
  auto again = gate;
  const auto& for_passes = again;  // which change nothing but their tapes
  typename TestType::Tape tape;
  typename TestType::Tape other;
  for_passes.evaluate(longer, tape);
  for_passes.forward(x, tape, {.step = 3});
  for_passes.forward(longer, other, {.step = 4});
  CHECK(same_routing(tape.routing, expected.tape.routing));
  CHECK(same_routing(other.routing, of_longer.tape.routing));
  CHECK(same_balance(tape.balance, expected.tape.balance));
  CHECK(same_balance(other.balance, of_longer.tape.balance));
  CHECK(same_bits(test::gate_dx(again, x, test::dweight_of(tape.routing, r), tape), expected.dx));
  CHECK(same_bits(test::gradients_of(again), test::gradients_of(expected.gate)));
  const auto dweight = test::dweight_of(other.routing, random_dweight<TestType>(18));
  CHECK(same_bits(test::gate_dx(again, longer, dweight, other), of_longer.dx));
  CHECK(same_routing(again.evaluate(x), [&] {
    typename TestType::Tape served;
    return gate.evaluate(x, served);
  }()));
}

TEMPLATE_LIST_TEST_CASE("gates: slots are grouped and ascend, weights and figures are theirs",
                        "[gate][laws]", test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const auto gate = make_gate<TestType>();
  for (const Index rows : {0, 6, 12, 120}) {
    const Matrix<Scalar> x = random_rows<TestType>(rows, 2);
    for (const bool training : {true, false}) {
      typename TestType::Tape tape;
      const Routing<Scalar>& routing =
          training ? gate.forward(x, tape, {.step = 3}) : gate.evaluate(x, tape);
      CHECK(&routing == &tape.routing);
      CHECK(tape.trained == training);
      test::check_routing(routing, rows, gate.experts());
      for (const Scalar weight : routing.weight) CHECK(weight >= 0);
      // The balance may speak of the last experts only, those that are not shared.
      const Balance<Scalar>& balance = tape.balance;
      const Index counted = balance.importance.size();
      CHECK(balance.load.size() == counted);
      CHECK(static_cast<Index>(balance.tokens_per_expert.size()) == counted);
      Vector<Scalar> importance = Vector<Scalar>::Zero(gate.experts());
      std::vector<Index> tokens(detail::to_size(gate.experts()), 0);
      for (Index s = 0; s < routing.slots(); ++s) {
        importance[routing.expert[s]] += routing.weight[s];
        ++tokens[detail::to_size(routing.expert[s])];
      }
      CHECK(test::relative_error(balance.importance, Vector<Scalar>(importance.tail(counted))) <
            test::tolerance<Scalar>);
      CHECK(std::ranges::equal(balance.tokens_per_expert,
                               std::span(tokens).last(detail::to_size(counted))));
      CHECK(std::isfinite(balance.loss));
      CHECK(balance.loss >= 0);
    }
  }
}

TEMPLATE_LIST_TEST_CASE("gates: a token's slots depend on no other token, unless they must",
                        "[gate][laws]", test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  if (TestType::whole_batch) return;
  const auto gate = make_gate<TestType>();
  const Matrix<Scalar> x = random_rows<TestType>(60);
  typename TestType::Tape all;
  gate.forward(x, all, {.step = 4, .first_token = 7});
  typename TestType::Tape one;
  for (const Index first : {0, 6, 54}) {
    const Pass pass{.step = 4, .first_token = static_cast<std::uint32_t>(7 + first)};
    gate.forward(x.middleRows(first, 6), one, pass);
    const Index begin = all.routing.token_offsets[first];
    REQUIRE(one.routing.slots() == all.routing.token_offsets[first + 6] - begin);
    for (Index s = 0; s < one.routing.slots(); ++s) {
      CHECK(one.routing.expert[s] == all.routing.expert[begin + s]);
      CHECK(one.routing.weight[s] == all.routing.weight[begin + s]);
    }
  }
}

TEMPLATE_LIST_TEST_CASE("gates: no tokens", "[gate][laws]", test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const Matrix<Scalar> none(0, 5);
  GateRun<TestType> run(make_gate<TestType>(), none, random_dweight<TestType>(0), {.step = 0});
  const auto check = [&](const typename TestType::Tape& tape) {
    CHECK(tape.routing.tokens() == 0);
    CHECK(tape.routing.slots() == 0);
    CHECK(tape.balance.loss == 0);
    CHECK(test::as_array(tape.balance.losses) == std::array<Scalar, 6>{});
    CHECK((tape.balance.load.array() == 0).all());
    CHECK(tape.balance.load.size() > 0);
  };
  check(run.tape);
  CHECK(run.dx.rows() == 0);
  CHECK(run.dx.cols() == 5);
  CHECK(test::has_zero_gradients(run.gate));
  typename TestType::Tape tape;
  run.gate.evaluate(none, tape);
  check(tape);
}

TEMPLATE_LIST_TEST_CASE("gates: rows of zeros are tokens like any other", "[gate][laws]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  GateRun<TestType> run(make_gate<TestType>(), Matrix<Scalar>::Zero(12, 5),
                        random_dweight<TestType>(), {.step = 0});
  CHECK(run.tape.routing.slots() > 0);
  for (const Scalar weight : run.tape.routing.weight) CHECK(std::isfinite(weight));
  CHECK(std::isfinite(run.tape.balance.loss));
  CHECK(run.dx.allFinite());
  for (const auto& [name, gradient] : test::gradients_of(run.gate)) CHECK(gradient.allFinite());
}

TEMPLATE_LIST_TEST_CASE("gates: a token with NaN or infinity shows, and spoils no other",
                        "[gate][laws]", test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  using Limits = std::numeric_limits<Scalar>;
  auto gate = make_gate<TestType>();
  for (const Scalar bad : {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity()}) {
    Matrix<Scalar> x = random_rows<TestType>();
    typename TestType::Tape clean;
    gate.forward(x, clean, {.step = 3});
    x(2, 1) = bad;
    for (const bool training : {true, false}) {
      typename TestType::Tape tape;
      const Routing<Scalar>& routing =
          training ? gate.forward(x, tape, {.step = 3}) : gate.evaluate(x, tape);
      test::check_routing(routing, 12, gate.experts());
      const bool shows = std::isnan(bad) || TestType::infinity_shows;
      test::for_each_slot(routing, [&](Index t, Index i, std::size_t s) {
        if (t != 2) CHECK(std::isfinite(routing.weight[s]));
        if (t == 2 && i >= TestType::shared_experts && shows) CHECK(std::isnan(routing.weight[s]));
      });
      if (!training) continue;
      for (Index t = 0; t < 12 && !TestType::whole_batch; ++t) {
        if (t == 2) continue;  // which may have lost its second choice
        const Range slots = routing.slots_of_token(t);
        const Range expected = clean.routing.slots_of_token(t);
        REQUIRE(slots.count == expected.count);
        for (Index s = 0; s < slots.count; ++s) {
          CHECK(routing.expert[slots.first + s] == clean.routing.expert[expected.first + s]);
          CHECK(routing.weight[slots.first + s] == clean.routing.weight[expected.first + s]);
        }
      }
      if (std::isnan(bad) && TestType::loss_weights.size() > 0)
        CHECK(std::isnan(tape.balance.loss));
      Matrix<Scalar> dx;
      CHECK_NOTHROW(
          dx = test::gate_dx(gate, x, std::vector<Scalar>(routing.weight.size(), Scalar{1}), tape));
    }
  }
}

TEMPLATE_LIST_TEST_CASE("gates: a parameter that is not trained gets no gradient", "[gate][laws]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const Matrix<Scalar> x = random_rows<TestType>();
  const Matrix<Scalar> r = random_dweight<TestType>();
  GateRun<TestType> all(make_gate<TestType>(), x, r, {.step = 3});
  const test::Named expected = test::gradients_of(all.gate);
  for (const auto& [frozen, unused] : expected) {
    auto gate = make_gate<TestType>();
    test::parameter(gate, frozen).trained = false;
    GateRun<TestType> run(std::move(gate), x, r, {.step = 3});
    CHECK(same_bits(run.dx, all.dx));
    for (const auto& [name, gradient] : test::gradients_of(run.gate)) {
      INFO(name << " where " << frozen << " is frozen");
      if (name == frozen) {
        CHECK((gradient.array() == 0).all());
      } else {
        CHECK(same_bits(gradient, expected.at(name)));
      }
    }
  }
}

TEMPLATE_LIST_TEST_CASE("gates: take no memory after the first pass of a shape",
                        "[gate][laws][allocation]", test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  for (const int threads : {1, 3}) {
    const test::Threads scope(threads);
    auto gate = make_gate<TestType>();
    const Matrix<Scalar> x = random_rows<TestType>(300);
    std::vector<std::uint8_t> valid(300, 1);
    std::fill_n(valid.begin(), 60, 0);
    const std::vector<Scalar> ones(detail::to_size(300 * gate.experts()), Scalar{1});
    Matrix<Scalar> dx(300, 5);
    typename TestType::Tape training;
    typename TestType::Tape serving;
    const auto pass = [&](const Pass& as) {
      gate.forward(x, training, as);
      dx.setZero();
      gate.backward(x, std::span(ones).first(detail::to_size(training.routing.slots())), training,
                    dx);
      gate.evaluate(x, serving, {.valid = as.valid});
    };
    for (const Pass& as : {Pass{.step = 1}, Pass{.step = 1, .valid = valid, .loss_scale = 0.5}}) {
      pass(as);
      CHECK(test::allocations_in([&] {
              for (int i = 0; i < 3; ++i) pass(as);
            }) == 0);
    }
  }
}
