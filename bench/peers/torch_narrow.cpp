#include <torch/torch.h>

#include "narrow_peer.hpp"

/// \file
/// A layer served with libtorch, all of it in bfloat16: the loop over the experts as it is usually written.

namespace bench {

namespace {

using torch::Tensor;

Tensor rounded(const float* data, at::IntArrayRef shape) {
  return torch::from_blob(const_cast<float*>(data), shape, torch::kFloat).to(torch::kBFloat16);
}

class TorchNarrowPeer : public NarrowPeer {
 public:
  TorchNarrowPeer(const NarrowProblem& problem, const NarrowNetwork& network)
      : tokens_(problem.tokens), width_(problem.width), threads_(problem.threads) {
    at::set_num_threads(static_cast<int>(threads_));
    x_ = rounded(network.x, {tokens_, width_});
    for (const NarrowExpert& from : network.experts) {
      // Transposed, as torch::nn::Linear has its weights.
      const auto weight = [](const float* data, std::int64_t inputs, std::int64_t outputs) {
        return rounded(data, {inputs, outputs}).t().contiguous();
      };
      experts_.push_back({weight(from.up, width_, problem.hidden),
                          rounded(from.up_bias, {problem.hidden}),
                          weight(from.down, problem.hidden, width_),
                          rounded(from.down_bias, {width_}), torch::tensor(from.tokens),
                          rounded(from.token_weights.data(),
                                  {static_cast<std::int64_t>(from.token_weights.size()), 1})});
      weight_bytes_ +=
          static_cast<double>(experts_.back().up.nbytes() + experts_.back().down.nbytes());
    }
  }

  double weight_bytes() const override { return weight_bytes_; }
  void evaluate() override {
    const c10::InferenceMode guard;
    at::set_num_threads(static_cast<int>(threads_));
    y_ = torch::empty({tokens_, width_}, torch::kBFloat16);
    for (const Expert& e : experts_) {
      const Tensor hidden =
          torch::relu(torch::linear(x_.index_select(0, e.token), e.up, e.up_bias));
      y_.index_copy_(0, e.token, torch::linear(hidden, e.down, e.down_bias) * e.token_weight);
    }
  }
  std::vector<float> y() override {
    const Tensor wide = y_.to(torch::kFloat).contiguous();
    return {wide.data_ptr<float>(), wide.data_ptr<float>() + wide.numel()};
  }

 private:
  struct Expert {
    Tensor up, up_bias, down, down_bias;
    Tensor token;
    Tensor token_weight;
  };

  std::int64_t tokens_;
  std::int64_t width_;
  std::int64_t threads_;
  double weight_bytes_ = 0;
  Tensor x_, y_;
  std::vector<Expert> experts_;
};

}  // namespace

std::unique_ptr<NarrowPeer> make_torch_narrow_peer(const NarrowProblem& problem,
                                                   const NarrowNetwork& network) {
  return std::make_unique<TorchNarrowPeer>(problem, network);
}

}  // namespace bench
