#include "moe/gates/gate.hpp"

#include "../support.hpp"
#include "moe/gates/noisy_top_k_gate.hpp"
#include "moe/routing/dispatch.hpp"

using namespace moe;

namespace {

/// The least a gate can be: all tokens to expert 0.
struct Minimal {
  using Scalar = float;
  struct Config {
    Index width = 0;
  };
  using Tape = GateTape<float>;
  explicit Minimal(const Config&, std::uint64_t) {}
  Index experts() const { return 1; }
  void forward(const MatrixRef<float>& x, Tape& tape, const Pass&) const { evaluate(x, tape); }
  void evaluate(const MatrixRef<float>& x, Tape& tape, const EvaluationPass& = {}) const {
    tape.routing.experts = 1;
    tape.routing.token_offsets.clear();
    for (Index t = 0; t <= x.rows(); ++t) tape.routing.token_offsets.push_back(t);
    tape.routing.expert.assign(detail::to_size(x.rows()), 0);
    tape.routing.weight.assign(detail::to_size(x.rows()), 1.0f);
  }
  void backward(const MatrixRef<float>&, std::span<const float>, Tape&, Matrix<float>&) {}
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}
};

struct WithoutTape : Minimal {
  using Minimal::Minimal;
  struct Tape {};  // not a GateTape
};
struct WithoutWidth : Minimal {
  struct Config {
    Index size = 0;
  };
  explicit WithoutWidth(const Config&, std::uint64_t) : Minimal({}, 0) {}
};
struct WithoutSeed : Minimal {
  explicit WithoutSeed(const Config& config) : Minimal(config, 0) {}
};
struct WithoutBackward : Minimal {
  using Minimal::Minimal;
  void backward(const MatrixRef<float>&, std::span<const float>, Tape&, Matrix<float>&) = delete;
};
struct ForwardNotConst : Minimal {
  using Minimal::Minimal;
  void forward(const MatrixRef<float>& x, Tape& tape, const Pass& key) {
    Minimal::forward(x, tape, key);
  }
};
struct ExpertsAsInt : Minimal {
  using Minimal::Minimal;
  int experts() const { return 1; }
};

static_assert(Gate<Minimal>);
static_assert(Gate<NoisyTopKGate<float>>);
static_assert(Gate<NoisyTopKGate<double>>);
static_assert(!Gate<int>);
static_assert(!Gate<WithoutTape>);
static_assert(!Gate<WithoutWidth>);
static_assert(!Gate<WithoutSeed>);
static_assert(!Gate<WithoutBackward>);
static_assert(!Gate<ForwardNotConst>);
static_assert(!Gate<ExpertsAsInt>);

}  // namespace

TEST_CASE("gate: the smallest gate makes a routing that can be grouped", "[routing][gate]") {
  const Minimal gate({.width = 2}, 0);
  GateTape<float> tape;
  gate.forward(test::random_matrix<float>(5, 2, 1), tape, {.step = 0});
  Dispatch<float> dispatch;
  sort_by_expert(tape.routing, dispatch);
  CHECK(dispatch.slots_of(0) == 5);
  CHECK(dispatch.token == std::vector<Index>{0, 1, 2, 3, 4});
}

TEST_CASE("gate: a fresh tape is empty", "[routing][gate]") {
  const GateTape<double> tape;
  CHECK(tape.routing.tokens() == 0);
  CHECK(tape.routing.slots() == 0);
  CHECK(tape.balance.loss == 0);
}
