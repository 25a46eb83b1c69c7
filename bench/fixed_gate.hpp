#pragma once

#include <algorithm>
#include <moe/moe.hpp>
#include <span>
#include <vector>

namespace bench {

using moe::Index;

/// A gate that has nothing to learn and nothing to compute: the slots go round the experts, so that
/// each gets exactly S/E of them, from tokens all over the batch. For questions about the experts.
template <class Scalar_>
class FixedGate {
 public:
  using Scalar = Scalar_;
  struct Config {
    Index width = 0;
    Index experts = 0;
    Index top_k = 0;
  };
  struct Tape : moe::GateTape<Scalar> {
    std::vector<Scalar> dslot;  ///< S, what backward was given
  };

  explicit FixedGate(const Config& config, std::uint64_t = 0) : config_(config) {}
  Index experts() const { return config_.experts; }

  void forward(const moe::MatrixRef<Scalar>& x, Tape& tape, const moe::Pass& = {.step = 0}) const {
    route(x.rows(), tape.routing);
    tape.trained = true;
  }
  void evaluate(const moe::MatrixRef<Scalar>& x, Tape& tape,
                const moe::EvaluationPass& = {}) const {
    route(x.rows(), tape.routing);
  }
  void backward(const moe::MatrixRef<Scalar>&, std::span<const Scalar> dslot, Tape& tape,
                moe::Matrix<Scalar>&) {
    tape.dslot.assign(dslot.begin(), dslot.end());
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}

 private:
  void route(Index tokens, moe::Routing<Scalar>& routing) const {
    const Index top_k = config_.top_k;
    const Index slots = tokens * top_k;
    // Always the same, so that only the first pass pays for it.
    if (routing.experts == config_.experts && routing.slots() == slots) return;
    routing.experts = config_.experts;
    routing.token_offsets.clear();
    for (Index t = 0; t <= tokens; ++t) routing.token_offsets.push_back(t * top_k);
    routing.expert.clear();
    routing.weight.clear();
    for (Index slot = 0; slot < slots; ++slot) {
      routing.expert.push_back(slot % config_.experts);
      // Not all alike, so that a wrong weight would show.
      routing.weight.push_back(static_cast<Scalar>(1 + slot % 3) / static_cast<Scalar>(2 * top_k));
    }
    for (auto token = routing.expert.begin(); token != routing.expert.end(); token += top_k) {
      std::sort(token, token + top_k);
    }
  }

  Config config_;
};

template <class Scalar>
using FixedLayer = moe::MoELayer<moe::Expert<moe::FeedForward, Scalar>, FixedGate<Scalar>>;

}  // namespace bench
