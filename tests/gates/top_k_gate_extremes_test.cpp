#include "../naive_layer.hpp"
#include "gates.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "top_k.hpp"

using namespace moe;
using namespace moe::test;

TEMPLATE_TEST_CASE("top-k gate: a token with NaN or infinity spoils no other", "[routing][gate]",
                   float, double) {
  using S = TestType;
  constexpr S infinity = std::numeric_limits<S>::infinity();
  for (const Score score : all_scores) {
    for (const bool limited : {false, true}) {
      for (const S bad : {std::numeric_limits<S>::quiet_NaN(), infinity, -infinity}) {
        TopKConfig config = everything(score);
        config.random_second = limited;
        config.capacity_factor = limited ? 1 : 0;
        TopKGate<S> gate(config, 1);
        Matrix<S> x = random_matrix<S>(6, 5, 2);
        TopKTape<S> clean;
        TopKTape<S> spoilt;
        gate.forward(x, clean, {.step = 0});
        x(2, 1) = bad;
        gate.forward(x, spoilt, {.step = 0});
        for (Index t = 0; t < 6; ++t) {
          for (std::size_t c = detail::to_size(2 * t); c < detail::to_size(2 * t + 2); ++c) {
            CHECK((spoilt.choices.expert[c] >= 0 && spoilt.choices.expert[c] < 12));
            if (t != 2) {
              CHECK(spoilt.choices.expert[c] == clean.choices.expert[c]);
              CHECK(spoilt.choices.weight[c] == clean.choices.weight[c]);
            } else if (std::isnan(bad) || !detail::is_elementwise(score)) {
              CHECK(std::isnan(spoilt.choices.weight[c]));
            }
          }
        }
        if (std::isnan(bad)) CHECK(std::isnan(spoilt.balance.loss));
        CHECK_NOTHROW(detail::check_routing(spoilt.routing));
        const std::vector<S> ones(spoilt.routing.weight.size(), S{1});
        const Matrix<S> dx = test::gate_dx<TopKGate<S>>(gate, x, ones, spoilt);
        if (std::isnan(bad)) CHECK(std::isnan(dx(2, 0)));
        CHECK(std::isfinite(dx(1, 0)));
      }
    }
  }
}

TEMPLATE_TEST_CASE("top-k gate: extreme logits give finite weights and gradients",
                   "[routing][gate]", float, double) {
  using S = TestType;
  for (const Score score : all_scores) {
    for (const S size : {S(1e-30), S{1}, S{1e4}}) {
      TopKGate<S> gate({.width = 1,
                        .experts = 4,
                        .top_k = 2,
                        .score = score,
                        .renormalise = true,
                        .selection_bias = true,
                        .switch_loss_weight = 1,
                        .z_loss_weight = S{1} / (1 + size)},
                       1);
      parameter(gate, "weight").value << -1, -2, -3, -4;
      parameter(gate, "selection_bias").value << 0, 0, 3 * size, 2 * size;
      TopKTape<S> tape;
      gate.forward(Matrix<S>{{size}, {-size}}, tape, {.step = 0});
      for (const S w : tape.routing.weight) CHECK(std::isfinite(w));
      CHECK(std::isfinite(tape.balance.loss));
      const std::vector<S> dweight{1, 2, 3, 4};
      const Matrix<S> dx = test::gate_dx(gate, Matrix<S>{{size}, {-size}}, dweight, tape);
      // Where all scores of a token are 0, dividing by their sum can make a gradient of no use.
      if (!detail::is_elementwise(score) || size < 100) {
        CHECK(std::isfinite(dx(0, 0)));
        CHECK(std::isfinite(dx(1, 0)));
      }
    }
  }
}

TEMPLATE_TEST_CASE("top-k gate: extreme shapes", "[routing][gate]", float, double) {
  using S = TestType;
  for (const Score score : all_scores) {
    const auto run = [&](Index tokens, Index experts, Index top_k, Index groups) {
      INFO("T " << tokens << ", E " << experts << ", K " << top_k);
      TopKConfig config = everything(score);
      config.experts = experts;
      config.top_k = top_k;
      config.random_second = top_k == 2;
      config.groups = groups;
      config.top_k_groups = (groups + 1) / 2;
      config.sequences = 1;
      TopKGate<S> gate(config, 1);
      TopKTape<S> tape;
      gate.forward(random_matrix<S>(tokens, 5, 1), tape, {.step = 0});
      detail::check_routing(tape.routing);
      CHECK(tape.routing.tokens() == tokens);
      CHECK(tape.routing.slots() <= tokens * top_k);
      CHECK(std::isfinite(tape.balance.loss));
      const std::vector<S> ones(tape.routing.weight.size(), S{1});
      CHECK(test::gate_dx(gate, random_matrix<S>(tokens, 5, 1), ones, tape).allFinite());
      CHECK(parameter(gate, "weight").gradient().allFinite());
      gate.evaluate(random_matrix<S>(tokens, 5, 1), tape);
      CHECK(tape.routing.slots() == tokens * top_k);
    };
    run(0, 12, 2, 4);
    run(1, 1, 1, 1);
    run(1, 12, 2, 12);
    run(7, 5, 5, 1);
    run(3, 40, 2, 4);
    run(1, 131072, 8, 16);
  }
  // Fewer tokens than experts leave one place each, none of which is taken twice.
  TopKGate<S> gate({.width = 5, .experts = 40, .top_k = 2, .capacity_factor = 1}, 1);
  TopKTape<S> tape;
  gate.forward(Matrix<S>::Ones(3, 5), tape, {.step = 0});
  CHECK(tape.routing.token_offsets == Indices{0, 2, 2, 2});
}
