#include "moe/routing/shared_batch.hpp"

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
void check_shared(const typename Gate::Config& config, const std::vector<Index>& sizes) {
  const Gate fresh(config, 7);
  Index tokens = 0;
  for (const Index size : sizes) tokens += size;
  const Matrix<double> x = random_matrix(tokens, config.width, 1);
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
  whole.gate.forward(x, whole.tape, {.step = 3});
  backward(whole, 0, x);

  std::vector<Outcome<Gate>> parts(sizes.size(), {fresh, {}, {}});
  test::share_batch(sizes, [&](std::size_t i, const SharedBatch& batch) {
    Outcome<Gate>& o = parts[i];
    const Index first = batch.first_row();
    o.gate.forward(x.middleRows(first, sizes[i]), o.tape,
                   {.step = 3, .first_token = static_cast<std::uint32_t>(first), .batch = &batch});
    backward(o, first, x.middleRows(first, sizes[i]));
  });

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

}  // namespace

TEST_CASE("shared batch: parts of a batch route, lose and learn as the whole", "[routing][gate]") {
  for (const std::vector<Index>& sizes : {std::vector<Index>{5, 7}, {12}, {3, 0, 9}, {330, 270}}) {
    INFO(sizes.size() << " parts, the first of " << sizes[0]);
    check_shared<NoisyTopKGate<double>>({.width = 4, .experts = 6, .top_k = 2}, sizes);
    check_shared<TopKGate<double>>({.width = 4,
                                           .experts = 6,
                                           .top_k = 2,
                                           .jitter = 0.1,
                                           .switch_loss_weight = 0.3,
                                           .z_loss_weight = 0.2},
                                          sizes);
    check_shared<TopKGate<double>>({.width = 4,
                                           .experts = 6,
                                           .top_k = 2,
                                           .capacity_factor = 0.8,
                                           .place_order = PlaceOrder::largest_weight,
                                           .sequence_loss_weight = 0.3,
                                           .sequences = 3,
                                           .row_order = RowOrder::sequence_major},
                                          sizes);
    check_shared<BalancedGate<double>>(
        {.width = 4, .experts = 6, .top_k = 2, .threshold_weight = 0.3}, sizes);
    check_shared<ExpertChoiceGate<double>>({.width = 4, .experts = 6, .capacity_factor = 1.5},
                                           sizes);
    check_shared<HierarchicalGate<double>>(
        {.width = 4, .groups = 3, .group_experts = 2, .top_k_groups = 2, .top_k = 1}, sizes);
    check_shared<SharedExpertGate<NoisyTopKGate<double>>>(
        {.width = 4, .shared = 1, .gated = true, .routed = {.experts = 6, .top_k = 2}}, sizes);
  }
}
