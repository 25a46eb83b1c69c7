#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "torch_peer.hpp"

/// \file
/// The layer in libtorch with one tensor for the weights of all experts.

namespace bench {

namespace {

using torch::Tensor;

class TorchStackedPeer : public TorchPeer {
 public:
  explicit TorchStackedPeer(const Problem& problem)
      : TorchPeer(problem),
        weight_(leaf(view(problem.row_weight.data(), {problem.slots(), 1}))),
        up_(stacked(problem, &Arrays::up, {problem.width, problem.hidden})),
        up_bias_(stacked(problem, &Arrays::up_bias, {problem.hidden})),
        down_(stacked(problem, &Arrays::down, {problem.hidden, problem.width})),
        down_bias_(stacked(problem, &Arrays::down_bias, {problem.width})) {}

  const float* row_dweight() override { return weight_.grad().data_ptr<float>(); }
  ExpertArrays<const float*> gradient(std::size_t e) override {
    const auto of_expert = [e](Tensor& parameter) {
      return gradient_of(parameter) + static_cast<std::int64_t>(e) * parameter[0].numel();
    };
    return {of_expert(up_), of_expert(up_bias_), of_expert(down_), of_expert(down_bias_)};
  }

 protected:
  /// x·weight + bias of all slots' rows, each with its own expert's (E x inputs x outputs, E x outputs).
  virtual Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias) const = 0;

 private:
  using Arrays = ExpertArrays<const float*>;

  Tensor stacked(const Problem& problem, const float* Arrays::*array, at::IntArrayRef shape) {
    std::vector<Tensor> parts;
    for (const Arrays& expert : problem.experts) parts.push_back(view(expert.*array, shape));
    return leaf(torch::stack(parts));
  }

  Tensor run() override {
    const Tensor hidden = torch::relu(product(x_.index_select(0, token_), up_, up_bias_));
    return combined(product(hidden, down_, down_bias_) * weight_);
  }

  Tensor weight_, up_, up_bias_, down_, down_bias_;
};

/// One batched product for all experts, which must have the same number of slots each.
class TorchBatchedPeer : public TorchStackedPeer {
 public:
  explicit TorchBatchedPeer(const Problem& problem) : TorchStackedPeer(problem) {
    for (std::size_t e = 0; e < problem.experts.size(); ++e) {
      if (problem.offsets[e + 1] - problem.offsets[e] != problem.offsets[1]) {
        throw std::invalid_argument("libtorch_bmm: expert " + std::to_string(e) + " has " +
                                    std::to_string(problem.offsets[e + 1] - problem.offsets[e]) +
                                    " slots, expert 0 has " + std::to_string(problem.offsets[1]));
      }
    }
  }
  std::string name() const override { return "libtorch_bmm"; }

 private:
  Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias) const override {
    const Tensor by_expert = x.view({weight.size(0), -1, weight.size(1)});
    return torch::baddbmm(bias.unsqueeze(1), by_expert, weight).flatten(0, 1);
  }
};

#ifdef MOE_BENCH_TORCH_GROUPED
/// torch.nn.functional.grouped_mm, which adds no bias and is of any number of slots an expert.
class TorchGroupedPeer : public TorchStackedPeer {
 public:
  explicit TorchGroupedPeer(const Problem& problem) : TorchStackedPeer(problem) {
    std::vector<std::int64_t> expert;
    std::vector<std::int32_t> ends;
    for (std::size_t e = 0; e < problem.experts.size(); ++e) {
      ends.push_back(static_cast<std::int32_t>(problem.offsets[e + 1]));
      expert.resize(static_cast<std::size_t>(problem.offsets[e + 1]), static_cast<std::int64_t>(e));
    }
    expert_ = torch::tensor(expert);
    ends_ = torch::tensor(ends, torch::kInt);
  }
  std::string name() const override { return "libtorch_grouped"; }

 private:
  Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias) const override {
    return at::_grouped_mm(x, weight, ends_) + bias.index_select(0, expert_);
  }

  Tensor expert_;  ///< of each slot
  Tensor ends_;    ///< of each expert's slots
};
#endif

}  // namespace

std::unique_ptr<Peer> make_torch_bmm_peer(const Problem& problem) {
  return std::make_unique<TorchBatchedPeer>(problem);
}
#ifdef MOE_BENCH_TORCH_GROUPED
std::unique_ptr<Peer> make_torch_grouped_peer(const Problem& problem) {
  return std::make_unique<TorchGroupedPeer>(problem);
}
#endif

}  // namespace bench
