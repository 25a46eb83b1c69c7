#include "moe/routing/shared_batch.hpp"

#include <cstdint>
#include <numeric>
#include <vector>

#include "../support.hpp"
#include "gates/gates.hpp"
#include "moe/moe.hpp"
#include "shared_batch.hpp"

using namespace moe;
using test::random_matrix;
using test::relative_error;

namespace {

/// What a gate makes of a batch and its gradients, as a whole or as parts.
template <class Gate>
struct Outcome {
  Gate gate;
  typename Gate::Tape tape;
  Matrix<double> dx;
};

/// The parts of a batch that is shared choose, lose and learn as the whole batch does.
template <class Gate>
void check_shared(const typename Gate::Config& config, const std::vector<Index>& sizes,
                  const std::vector<std::uint8_t>& valid = {}) {
  const Gate fresh(config, 7);
  Index tokens = 0;
  for (const Index size : sizes) tokens += size;
  const Matrix<double> x = random_matrix(tokens, config.width, 1);
  const auto valid_of = [&](Index first, Index count) {
    const std::span<const std::uint8_t> all(valid);
    return all.empty() ? all : all.subspan(detail::to_size(first), detail::to_size(count));
  };
  // The gradient by the weight of a slot, whichever part it is in.
  const auto backward = [&](Outcome<Gate>& o, Index first, const Matrix<double>& rows) {
    const Routing<double>& routing = o.tape.routing;
    std::vector<double> dweight(routing.expert.size());
    for (Index t = 0; t < routing.tokens(); ++t) {
      for (Index s = routing.token_offsets[detail::to_size(t)];
           s < routing.token_offsets[detail::to_size(t) + 1]; ++s) {
        dweight[detail::to_size(s)] =
            std::sin(static_cast<double>(17 * (first + t) + routing.expert[detail::to_size(s)]));
      }
    }
    o.dx = test::gate_dx<Gate>(o.gate, rows, dweight, o.tape);
  };

  Outcome<Gate> whole{fresh, {}, {}};
  whole.gate.forward(x, whole.tape, {.step = 3, .valid = valid});
  backward(whole, 0, x);

  std::vector<Outcome<Gate>> parts(sizes.size(), {fresh, {}, {}});
  test::share_batch(
      sizes,
      [&](std::size_t i, const SharedBatch& batch) {
        Outcome<Gate>& o = parts[i];
        const Index first = batch.first_row();
        o.gate.forward(x.middleRows(first, sizes[i]), o.tape,
                       {.step = 3,
                        .first_token = static_cast<std::uint32_t>(first),
                        .valid = valid_of(first, sizes[i]),
                        .batch = &batch});
        backward(o, first, x.middleRows(first, sizes[i]));
      },
      valid);

  Index first = 0;
  std::vector<Matrix<double>> gradients;
  for (std::size_t i = 0; i < sizes.size(); first += sizes[i], ++i) {
    INFO("part " << i);
    const Outcome<Gate>& o = parts[i];
    const auto begin = whole.tape.routing.token_offsets[detail::to_size(first)];
    const auto end = whole.tape.routing.token_offsets[detail::to_size(first + sizes[i])];
    CHECK(o.tape.routing.expert == std::vector<Index>(whole.tape.routing.expert.begin() + begin,
                                                      whole.tape.routing.expert.begin() + end));
    for (Index s = begin; s < end; ++s) {
      CHECK(o.tape.routing.weight[detail::to_size(s - begin)] ==
            whole.tape.routing.weight[detail::to_size(s)]);
    }
    CHECK(o.tape.balance.tokens_per_expert == whole.tape.balance.tokens_per_expert);
    CHECK(relative_error(Matrix<double>(o.tape.balance.importance),
                         Matrix<double>(whole.tape.balance.importance)) < 1e-14);
    CHECK_THAT(o.tape.balance.loss, Catch::Matchers::WithinRel(whole.tape.balance.loss, 1e-13));
    CHECK(relative_error(o.dx, Matrix<double>(whole.dx.middleRows(first, sizes[i]))) < 1e-12);
    std::size_t p = 0;
    for_each_parameter(o.gate, [&](const std::string&, const auto& parameter) {
      const Matrix<double> gradient = parameter.gradient();
      if (i == 0) {
        gradients.push_back(gradient);
      } else {
        gradients[p] += gradient;
      }
      ++p;
    });
  }
  std::size_t p = 0;
  for_each_parameter(whole.gate, [&](const std::string& name, const auto& parameter) {
    INFO(name);
    const Matrix<double> gradient = parameter.gradient();
    if (gradient.size() > 0) CHECK(relative_error(gradients[p], gradient) < 1e-12);
    ++p;
  });
}

/// Every gate.
void check_gates(const std::vector<Index>& sizes, const std::vector<std::uint8_t>& valid) {
  check_shared<NoisyTopKGate<double>>({.width = 4, .experts = 6, .top_k = 2}, sizes, valid);
  check_shared<TopKGate<double>>({.width = 4,
                                  .experts = 6,
                                  .top_k = 2,
                                  .jitter = 0.1,
                                  .switch_loss_weight = 0.3,
                                  .z_loss_weight = 0.2},
                                 sizes, valid);
  check_shared<TopKGate<double>>({.width = 4,
                                  .experts = 6,
                                  .top_k = 2,
                                  .capacity_factor = 0.8,
                                  .place_order = PlaceOrder::largest_weight,
                                  .sequence_loss_weight = 0.3,
                                  .sequences = 3,
                                  .row_order = RowOrder::sequence_major},
                                 sizes, valid);
  check_shared<BalancedGate<double>>(
      {.width = 4, .experts = 6, .top_k = 2, .threshold_weight = 0.3}, sizes, valid);
  check_shared<ExpertChoiceGate<double>>({.width = 4, .experts = 6, .capacity_factor = 1.5}, sizes,
                                         valid);
  check_shared<HierarchicalGate<double>>(
      {.width = 4, .groups = 3, .group_experts = 2, .top_k_groups = 2, .top_k = 1}, sizes, valid);
  check_shared<SharedExpertGate<NoisyTopKGate<double>>>(
      {.width = 4, .shared = 1, .gated = true, .routed = {.experts = 6, .top_k = 2}}, sizes, valid);
}

}  // namespace

TEST_CASE("shared batch: parts of a batch route, lose and learn as the whole", "[routing][gate]") {
  for (const std::vector<Index>& sizes : {std::vector<Index>{5, 7}, {12}, {3, 0, 9}, {330, 270}}) {
    INFO(sizes.size() << " parts, the first of " << sizes[0]);
    check_gates(sizes, {});
  }
}

TEST_CASE("shared batch: parts with padding, or of nothing else", "[routing][gate]") {
  for (const std::vector<Index>& sizes : {std::vector<Index>{5, 7}, {12}, {3, 0, 9}, {330, 270}}) {
    INFO(sizes.size() << " parts, the first of " << sizes[0]);
    const Index rows = std::accumulate(sizes.begin(), sizes.end(), Index{0});
    std::vector<std::uint8_t> some(detail::to_size(rows), 1);
    std::vector<std::uint8_t> not_in_the_first(detail::to_size(rows), 1);
    for (Index row = 0; row < rows; row += 3) some[detail::to_size(row)] = 0;
    std::fill_n(not_in_the_first.begin(), sizes[0], std::uint8_t{0});
    check_gates(sizes, some);
    if (sizes.size() > 1) check_gates(sizes, not_in_the_first);
  }
}
