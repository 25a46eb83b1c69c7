#include <algorithm>
#include <limits>
#include <memory>

#include "../routing/shared_batch.hpp"
#include "law_runs.hpp"

// What padding means to every gate.

using namespace moe;
using namespace moe::test;

namespace {

/// Several masks of rows in which padding comes first, last, now and then and nearly always; a flag
/// that is set need not be 1.
template <class Law>
std::vector<Mask> masks(Index rows) {
  const Index flags = rows / Law::sequences;
  const auto mask = [&](auto&& is_valid) {
    Mask valid;
    for (Index row = 0; row < rows; ++row) {
      const Index flag = Law::flag_of_row(row, rows);
      valid.push_back(is_valid(flag) ? static_cast<std::uint8_t>(1 + flag % 3 * 100) : 0);
    }
    return valid;
  };
  return {mask([&](Index i) { return i >= flags / 3; }),
          mask([&](Index i) { return i <= flags / 2; }), mask([](Index i) { return i % 2 == 1; }),
          mask([](Index i) {
            return philox({1, 2, 3, 4}, static_cast<std::uint64_t>(i))[0] % 3 > 0;
          }),
          mask([&](Index i) { return i == flags / 2; })};
}

/// The numbers that the valid rows of a pass over all of x would draw.
template <class Law>
std::vector<double> compacted_noise(const typename Law::Gate& gate,
                                    const Matrix<typename Law::Scalar>& x, const Pass& pass,
                                    const Mask& valid) {
  const std::vector<double> drawn = Law::drawn_noise(gate, Law::seed, x, pass);
  if (drawn.empty()) return {};
  const Index columns = static_cast<Index>(drawn.size()) / x.rows();
  const Matrix<double> all = Eigen::Map<const Matrix<double>>(drawn.data(), x.rows(), columns);
  const Matrix<double> rows = compacted(all, valid);
  return {rows.data(), rows.data() + rows.size()};
}

/// The routing of the valid rows alone; padding must have no slots.
template <class Scalar>
Routing<Scalar> compacted_routing(Routing<Scalar> routing, const Mask& valid) {
  IndexedVector<Index> offsets{0};
  REQUIRE(routing.tokens() == static_cast<Index>(valid.size()));
  for (Index row = 0; row < routing.tokens(); ++row) {
    if (valid[detail::to_size(row)] != 0) {
      offsets.push_back(routing.token_offsets[row + 1]);
    } else {
      REQUIRE(routing.slots_of_token(row).count == 0);
    }
  }
  routing.token_offsets = offsets;
  return routing;
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("gates: a masked pass is that over the valid rows", "[gate][laws][mask]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  for (const Index rows : {12, 300}) {
    for (const Mask& valid : masks<TestType>(rows)) {
      const auto gate = make_gate<TestType>();
      Matrix<Scalar> x = random_rows<TestType>(rows);
      const Matrix<Scalar> r = random_dweight<TestType>(rows);
      Pass pass{.step = 3, .first_token = 5};
      const std::vector<double> noise = compacted_noise<TestType>(gate, x, pass, valid);
      GateRun<TestType> expected(gate, compacted(x, valid), compacted(r, valid),
                                 {.step = 4, .noise = noise});
      spoil_padding(valid, x);
      pass.valid = valid;
      GateRun<TestType> masked(gate, x, r, pass);
      CHECK(same_routing(compacted_routing(masked.tape.routing, valid), expected.tape.routing));
      CHECK(same_balance(masked.tape.balance, expected.tape.balance));
      CHECK(same_bits(compacted(masked.dx, valid), expected.dx));
      CHECK(same_bits(test::gradients_of(masked.gate), test::gradients_of(expected.gate)));
      for (Index row = 0; row < rows; ++row) {
        if (valid[detail::to_size(row)] == 0) CHECK((masked.dx.row(row).array() == 0).all());
      }
      CHECK(masked.dx.cwiseAbs().maxCoeff() > 0);

      typename TestType::Tape served;
      typename TestType::Tape compact;
      gate.evaluate(x, served, {.valid = valid});
      gate.evaluate(compacted(x, valid), compact);
      CHECK(same_routing(compacted_routing(served.routing, valid), compact.routing));
      CHECK(same_balance(served.balance, compact.balance));
    }
  }
}

TEMPLATE_LIST_TEST_CASE("gates: backward leaves what dx has at padding", "[gate][laws][mask]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const Mask valid = masks<TestType>(12)[2];
  auto gate = make_gate<TestType>();
  const Matrix<Scalar> x = random_rows<TestType>();
  typename TestType::Tape tape;
  gate.forward(x, tape, {.step = 3, .valid = valid});
  Matrix<Scalar> dx = random_rows<TestType>(12, 9);
  const Matrix<Scalar> before = dx;
  gate.backward(x, test::dweight_of(tape.routing, random_dweight<TestType>()), tape, dx);
  for (Index row = 0; row < 12; ++row) {
    if (valid[detail::to_size(row)] == 0) CHECK(same_bits(dx.row(row), before.row(row)));
  }
  CHECK_FALSE(same_bits(dx, before));
}

TEMPLATE_LIST_TEST_CASE("gates: a mask without padding is no mask", "[gate][laws][mask]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const auto gate = make_gate<TestType>();
  const Matrix<Scalar> x = random_rows<TestType>();
  const Mask all(12, 1);
  GateRun<TestType> without(gate, x, random_dweight<TestType>(), {.step = 3});
  GateRun<TestType> with(gate, x, random_dweight<TestType>(), {.step = 3, .valid = all});
  check_same(with, without);
  typename TestType::Tape tape;
  typename TestType::Tape masked;
  CHECK(same_routing(gate.evaluate(x, masked, {.valid = all}), gate.evaluate(x, tape)));
  CHECK(same_balance(masked.balance, tape.balance));
  // A tape of a masked pass keeps nothing of its mask.
  const Mask none(12, 0);
  gate.evaluate(x, masked, {.valid = none});
  CHECK(same_routing(gate.evaluate(x, masked), tape.routing));
}

TEMPLATE_LIST_TEST_CASE("gates: nothing but padding is no tokens", "[gate][laws][mask]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const Mask none(12, 0);
  auto gate = make_gate<TestType>();
  Matrix<Scalar> x = random_rows<TestType>();
  spoil_padding(none, x);
  const auto check = [&](const typename TestType::Tape& tape) {
    CHECK(tape.routing.tokens() == 12);
    CHECK(tape.routing.slots() == 0);
    CHECK(tape.routing.token_offsets == IndexedVector<Index>(13, 0));
    CHECK(tape.balance.loss == 0);
    CHECK(test::as_array(tape.balance.losses) == std::array<Scalar, 6>{});
    CHECK((tape.balance.importance.array() == 0).all());
    CHECK((tape.balance.load.array() == 0).all());
    CHECK(tape.balance.unused_experts() ==
          static_cast<Index>(tape.balance.tokens_per_expert.size()));
    CHECK(tape.balance.max_over_mean_load() == 0);
    CHECK(tape.balance.cv_load() == 0);
  };
  GateRun<TestType> run(gate, x, random_dweight<TestType>(), {.step = 3, .valid = none});
  check(run.tape);
  CHECK((run.dx.array() == 0).all());
  for (const auto& [name, gradient] : test::gradients_of(run.gate)) {
    INFO(name);
    CHECK((gradient.array() == 0).all());
  }
  typename TestType::Tape tape;
  gate.evaluate(x, tape, {.valid = none});
  check(tape);
}

TEMPLATE_LIST_TEST_CASE("gates: a mask of another length is refused", "[gate][laws][mask]",
                        test::GateLaws) {
  const auto gate = make_gate<TestType>();
  const auto x = random_rows<TestType>();
  typename TestType::Tape tape;
  for (const std::size_t size : {1u, 11u, 13u}) {
    const Mask wrong(size, 1);
    const std::string message = std::string("moe: ") + TestType::name + ": Pass.valid has " +
                                std::to_string(size) + " entries, x has 12 rows";
    CHECK_THROWS_WITH(gate.forward(x, tape, {.step = 0, .valid = wrong}), message);
    CHECK_FALSE(tape.trained);
    CHECK_THROWS_WITH(gate.evaluate(x, tape, {.valid = wrong}), message);
    CHECK_THROWS_AS(gate.evaluate(x, tape, {.valid = wrong}), std::invalid_argument);
  }
}

TEMPLATE_LIST_TEST_CASE("gates: gradients of masked passes are derivatives", "[gate][laws][mask]",
                        test::GateLawsInDouble) {
  // Sequences of unequal length too.
  const Mask uneven{1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1};
  test::check_gradients<TestType>({.step = 3, .first_token = 5, .valid = uneven});
  const Mask one_sequence{1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0};  // of the two of SoftmaxLaw
  test::check_gradients<TestType>({.step = 3, .valid = one_sequence});
  for (const Mask& valid : masks<TestType>(12)) {
    test::check_gradients<TestType>({.step = 2, .valid = valid});
  }
}

TEMPLATE_LIST_TEST_CASE("gates: parts of a shared batch choose, lose and learn as the whole",
                        "[gate][laws][mask]", test::GateLawsInDouble) {
  for (const std::vector<Index>& sizes : {std::vector<Index>{5, 7}, {12}, {3, 0, 9}, {330, 270}}) {
    Index rows = 0;
    for (const Index size : sizes) rows += size;
    std::vector<Mask> all = masks<TestType>(rows);
    all.emplace_back();                          // without a mask
    all.emplace_back(detail::to_size(rows), 1);  // the first part is all padding
    std::fill_n(all.back().begin(), sizes[0], 0);
    all.emplace_back(detail::to_size(rows), 1);  // the last one is
    std::fill_n(all.back().rbegin(), sizes.back(), 0);
    const Matrix<double> r = random_dweight<TestType>(rows);
    for (const Mask& valid : all) {
      INFO(sizes.size() << " parts, the first of " << sizes[0] << ", mask " << (&valid - &all[0]));
      const auto gate = make_gate<TestType>();
      Matrix<double> x = random_rows<TestType>(rows);
      if (!valid.empty()) spoil_padding(valid, x);
      GateRun<TestType> whole(gate, x, r, {.step = 3, .valid = valid});
      typename TestType::Tape whole_served;
      gate.evaluate(x, whole_served, {.valid = valid});

      std::vector<std::unique_ptr<GateRun<TestType>>> parts(sizes.size());
      std::vector<typename TestType::Tape> served(sizes.size());
      test::share_batch(
          sizes,
          [&](std::size_t i, const SharedBatch& batch) {
            const Index first = batch.first_row();
            const Matrix<double> own = x.middleRows(first, sizes[i]);
            const Matrix<double> own_r = r.middleRows(first, sizes[i]);
            const auto own_valid =
                valid.empty()
                    ? std::span<const std::uint8_t>()
                    : std::span(valid).subspan(detail::to_size(first), detail::to_size(sizes[i]));
            parts[i] = std::make_unique<GateRun<TestType>>(
                gate, own, own_r,
                Pass{.step = 3,
                     .first_token = static_cast<std::uint32_t>(first),
                     .valid = own_valid,
                     .batch = &batch});
            gate.evaluate(own, served[i], {.valid = own_valid, .batch = &batch});
          },
          valid);

      // Slots of some rows of a routing.
      const auto check_part = [&](const Routing<double>& part, const Routing<double>& of,
                                  Index first) {
        const Index begin = of.token_offsets[first];
        for (Index t = 0; t <= part.tokens(); ++t) {
          CHECK(part.token_offsets[t] == of.token_offsets[first + t] - begin);
        }
        REQUIRE(part.slots() == part.token_offsets.back());
        for (Index s = 0; s < part.slots(); ++s) {
          CHECK(part.expert[s] == of.expert[begin + s]);
          CHECK(part.weight[s] == of.weight[begin + s]);
        }
      };
      const auto check_balance = [](const Balance<double>& part, const Balance<double>& of) {
        CHECK(part.tokens_per_expert == of.tokens_per_expert);
        CHECK(test::relative_error(part.importance, of.importance) < 1e-14);
        CHECK(test::relative_error(part.load, of.load) < 1e-13);
        CHECK_THAT(part.loss, Catch::Matchers::WithinRel(of.loss, 1e-13));
        for (std::size_t i = 0; i < 6; ++i) {
          CHECK_THAT(test::as_array(part.losses)[i],
                     Catch::Matchers::WithinRel(test::as_array(of.losses)[i], 1e-13));
        }
      };
      Index first = 0;
      test::Named sum;
      for (std::size_t i = 0; i < sizes.size(); first += sizes[i], ++i) {
        INFO("part " << i);
        check_part(parts[i]->tape.routing, whole.tape.routing, first);
        check_balance(parts[i]->tape.balance, whole.tape.balance);
        check_part(served[i].routing, whole_served.routing, first);
        check_balance(served[i].balance, whole_served.balance);
        CHECK(test::relative_error(parts[i]->dx,
                                   Matrix<double>(whole.dx.middleRows(first, sizes[i]))) < 1e-12);
        for (const auto& [name, gradient] : test::gradients_of(parts[i]->gate)) {
          if (i == 0) sum[name].setZero(gradient.rows(), gradient.cols());
          sum[name] += gradient;
        }
      }
      for (const auto& [name, gradient] : test::gradients_of(whole.gate)) {
        INFO(name);
        CHECK(test::relative_error(sum.at(name), gradient) < 1e-12);
      }
    }
  }
}

TEMPLATE_TEST_CASE(
    "gates: the sequence loss is the mean of the sequences' own losses, padded or not",
    "[gate][laws][mask]", test::SoftmaxLaw<double>, test::SoftmaxOfChosenLaw<double>) {
  // Each sequence alone has the loss of a batch; one without tokens has no part in the mean.
  auto config = TestType::config();
  config.capacity_factor = config.z_loss_weight = config.switch_loss_weight = 0;
  config.capacity = 0;
  config.drawn_second = false;  // by the number of the row, which is another one here
  config.sequences = 3;
  config.sequence_loss_weight = 0.6;
  auto alone = config;
  alone.sequences = 1;
  alone.switch_loss_weight = 0.6;
  alone.sequence_loss_weight = 0;
  const auto gate = make_gate<TestType>(1, config);
  const auto gate_of_one = make_gate<TestType>(1, alone);
  const Matrix<double> x = random_rows<TestType>();
  const bool time_major = config.row_order == RowOrder::time_major;
  for (const std::vector<Index>& lengths :
       {std::vector<Index>{4, 1, 3}, {2, 0, 4}, {0, 0, 1}, {4, 4, 4}}) {
    Mask valid(12, 0);
    double expected = 0;
    double sequences = 0;
    for (Index s = 0; s < 3; ++s) {
      const Index length = lengths[detail::to_size(s)];
      Matrix<double> rows(length, x.cols());
      for (Index i = 0; i < length; ++i) {
        const Index row = time_major ? 3 * i + s : 4 * s + i;
        valid[detail::to_size(row)] = 1;
        rows.row(i) = x.row(row);
      }
      if (length == 0) continue;
      typename TestType::Tape tape;
      gate_of_one.forward(rows, tape, {.step = 0});
      expected += tape.balance.loss;
      sequences += 1;
    }
    typename TestType::Tape tape;
    gate.forward(x, tape, {.step = 0, .valid = valid});
    CHECK_THAT(tape.balance.losses.sequence,
               Catch::Matchers::WithinRel(expected / sequences, 1e-13));
    CHECK(tape.balance.loss == tape.balance.losses.sequence);
    gate.evaluate(x, tape, {.valid = valid});
    CHECK_THAT(tape.balance.losses.sequence,
               Catch::Matchers::WithinRel(expected / sequences, 1e-13));
  }
}
