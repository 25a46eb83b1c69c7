#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "torch_peer.hpp"

/// \file
/// The layer in libtorch with tensors of its own for each expert.

namespace bench {

namespace {

using torch::Tensor;

class TorchExpertsPeer : public TorchPeer {
 public:
  TorchExpertsPeer(const Problem& problem, bool sorted) : TorchPeer(problem), sorted_(sorted) {
    const std::int64_t d = problem.width;
    const std::int64_t h = problem.hidden;
    const Tensor weight = view(problem.row_weight.data(), {problem.slots(), 1});
    weight_ = leaf(weight.detach());
    for (std::size_t e = 0; e < problem.experts.size(); ++e) {
      const ExpertArrays<const float*>& from = problem.experts[e];
      const std::int64_t count = problem.offsets[e + 1] - problem.offsets[e];
      counts_.push_back(count);
      experts_.push_back({leaf(view(from.up, {d, h})), leaf(view(from.up_bias, {h})),
                          leaf(view(from.down, {h, d})), leaf(view(from.down_bias, {d})),
                          token_.narrow(0, problem.offsets[e], count)});
      expert_weight_.push_back(leaf(weight.narrow(0, problem.offsets[e], count)));
    }
  }

  std::string name() const override { return sorted_ ? "libtorch_sorted" : "libtorch"; }

  const float* row_dweight() override {
    if (sorted_) return weight_.grad().data_ptr<float>();
    std::vector<Tensor> parts;
    for (const Tensor& weight : expert_weight_) parts.push_back(weight.grad());
    dweight_ = torch::cat(parts);
    return dweight_.data_ptr<float>();
  }
  ExpertArrays<const float*> gradient(std::size_t e) override {
    Expert& expert = experts_[e];
    return {gradient_of(expert.up), gradient_of(expert.up_bias), gradient_of(expert.down),
            gradient_of(expert.down_bias)};
  }

 private:
  struct Expert {
    Tensor up, up_bias, down, down_bias;
    Tensor token;
  };

  Tensor run() override { return sorted_ ? run_sorted() : run_by_expert(); }

  static Tensor output(const Expert& e, const Tensor& x) {
    return torch::addmm(e.down_bias, torch::relu(torch::addmm(e.up_bias, x, e.up)), e.down);
  }

  Tensor run_by_expert() {
    Tensor y = torch::zeros({tokens_, width_});
    for (std::size_t e = 0; e < experts_.size(); ++e) {
      if (counts_[e] == 0) continue;
      const Expert& expert = experts_[e];
      y.index_add_(0, expert.token,
                   output(expert, x_.index_select(0, expert.token)) * expert_weight_[e]);
    }
    return y;
  }

  Tensor run_sorted() {
    const std::vector<Tensor> x = x_.index_select(0, token_).split_with_sizes(counts_);
    std::vector<Tensor> rows;
    rows.reserve(experts_.size());
    for (std::size_t e = 0; e < experts_.size(); ++e) rows.push_back(output(experts_[e], x[e]));
    return combined(torch::cat(rows) * weight_);
  }

  bool sorted_;
  Tensor weight_, dweight_;
  std::vector<Tensor> expert_weight_;
  std::vector<std::int64_t> counts_;
  std::vector<Expert> experts_;
};

}  // namespace

std::unique_ptr<Peer> make_torch_peer(const Problem& problem) {
  return std::make_unique<TorchExpertsPeer>(problem, false);
}
std::unique_ptr<Peer> make_torch_sorted_peer(const Problem& problem) {
  return std::make_unique<TorchExpertsPeer>(problem, true);
}

}  // namespace bench
