#include <dlfcn.h>
#include <torch/torch.h>

#include "peer.hpp"

/// \file
/// The layer in libtorch, with its autograd.

namespace bench {

namespace {

using torch::Tensor;

Tensor view(const float* data, at::IntArrayRef shape) {
  return torch::from_blob(const_cast<float*>(data), shape, torch::kFloat);
}

class TorchPeer : public Peer {
 public:
  TorchPeer(const Problem& problem, bool sorted)
      : sorted_(sorted), tokens_(problem.tokens), width_(problem.width) {
    at::set_num_threads(1);
    // OpenBLAS, where torch multiplies with that, may have threads of its own.
    using SetThreads = void (*)(int);
    if (void* set = dlsym(RTLD_DEFAULT, "openblas_set_num_threads")) {
      reinterpret_cast<SetThreads>(set)(1);
    }
    const std::int64_t d = problem.width;
    const std::int64_t h = problem.hidden;
    x_ = view(problem.x, {tokens_, d}).requires_grad_();
    dy_ = view(problem.dy, {tokens_, d});
    token_ = torch::tensor(
        std::vector<std::int64_t>(problem.sorted_token.begin(), problem.sorted_token.end()));
    weight_ = view(problem.row_weight.data(), {problem.slots(), 1}).requires_grad_();
    for (std::size_t e = 0; e < problem.experts.size(); ++e) {
      const ExpertArrays<const float*>& from = problem.experts[e];
      const std::int64_t count = problem.offsets[e + 1] - problem.offsets[e];
      counts_.push_back(count);
      experts_.push_back(
          {view(from.up, {d, h}).requires_grad_(), view(from.up_bias, {h}).requires_grad_(),
           view(from.down, {h, d}).requires_grad_(), view(from.down_bias, {d}).requires_grad_(),
           token_.narrow(0, problem.offsets[e], count)});
      expert_weight_.push_back(weight_.detach().narrow(0, problem.offsets[e], count));
      expert_weight_.back().requires_grad_();
    }
  }

  std::string name() const override { return sorted_ ? "libtorch_sorted" : "libtorch"; }

  void forward() override { y_ = sorted_ ? forward_sorted() : forward_by_expert(); }

  void step() override {
    // As optimizer.zero_grad(set_to_none=True) does: then gradients are not added to zeros.
    x_.mutable_grad().reset();
    weight_.mutable_grad().reset();
    for (Tensor& weight : expert_weight_) weight.mutable_grad().reset();
    for (Expert& e : experts_) {
      for (Tensor* t : {&e.up, &e.up_bias, &e.down, &e.down_bias}) t->mutable_grad().reset();
    }
    forward();
    y_.backward(dy_);
  }

  const float* y() override { return y_.data_ptr<float>(); }
  const float* dx() override { return x_.grad().data_ptr<float>(); }
  const float* row_dweight() override {
    if (sorted_) return weight_.grad().data_ptr<float>();
    std::vector<Tensor> parts;
    for (const Tensor& weight : expert_weight_) parts.push_back(weight.grad());
    dweight_ = torch::cat(parts);
    return dweight_.data_ptr<float>();
  }
  ExpertArrays<const float*> gradient(std::size_t e) override {
    Expert& expert = experts_[e];
    const auto data = [](Tensor& parameter) {
      parameter.mutable_grad() = parameter.grad().contiguous();
      return static_cast<const float*>(parameter.grad().data_ptr<float>());
    };
    return {data(expert.up), data(expert.up_bias), data(expert.down), data(expert.down_bias)};
  }

 private:
  struct Expert {
    Tensor up, up_bias, down, down_bias;
    Tensor token;
  };

  static Tensor run(const Expert& e, const Tensor& x) {
    return torch::addmm(e.down_bias, torch::relu(torch::addmm(e.up_bias, x, e.up)), e.down);
  }

  Tensor forward_by_expert() {
    Tensor y = torch::zeros({tokens_, width_});
    for (std::size_t e = 0; e < experts_.size(); ++e) {
      if (counts_[e] == 0) continue;
      const Expert& expert = experts_[e];
      y.index_add_(0, expert.token,
                   run(expert, x_.index_select(0, expert.token)) * expert_weight_[e]);
    }
    return y;
  }

  Tensor forward_sorted() {
    const std::vector<Tensor> x = x_.index_select(0, token_).split_with_sizes(counts_);
    std::vector<Tensor> rows;
    rows.reserve(experts_.size());
    for (std::size_t e = 0; e < experts_.size(); ++e) rows.push_back(run(experts_[e], x[e]));
    return torch::zeros({tokens_, width_}).index_add_(0, token_, torch::cat(rows) * weight_);
  }

  bool sorted_;
  std::int64_t tokens_;
  std::int64_t width_;
  Tensor x_, dy_, y_, token_, weight_, dweight_;
  std::vector<Tensor> expert_weight_;
  std::vector<std::int64_t> counts_;
  std::vector<Expert> experts_;
};

}  // namespace

std::unique_ptr<Peer> make_torch_peer(const Problem& problem) {
  return std::make_unique<TorchPeer>(problem, false);
}
std::unique_ptr<Peer> make_torch_sorted_peer(const Problem& problem) {
  return std::make_unique<TorchPeer>(problem, true);
}

}  // namespace bench
