#pragma once

#include <dlfcn.h>
#include <torch/torch.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "peer.hpp"

/// \file
/// What all ways to write the layer in libtorch share.

namespace bench {

/// Computes y in run() from leaf() tensors; autograd does the rest.
class TorchPeer : public Peer {
 public:
  explicit TorchPeer(const Problem& problem) : tokens_(problem.tokens), width_(problem.width) {
    at::set_num_threads(1);
    // OpenBLAS, where torch multiplies with that, may have threads of its own.
    using SetThreads = void (*)(int);
    if (void* set = dlsym(RTLD_DEFAULT, "openblas_set_num_threads")) {
      reinterpret_cast<SetThreads>(set)(1);
    }
    x_ = leaf(view(problem.x, {tokens_, width_}));
    dy_ = view(problem.dy, {tokens_, width_});
    token_ = torch::tensor(
        std::vector<std::int64_t>(problem.sorted_token.begin(), problem.sorted_token.end()));
  }

  void forward() override { y_ = run(); }

  void step() override {
    // As optimizer.zero_grad(set_to_none=True) does: then gradients are not added to zeros.
    for (torch::Tensor& each : leaves_) each.mutable_grad().reset();
    forward();
    y_.backward(dy_);
  }

  const float* y() override { return y_.data_ptr<float>(); }
  const float* dx() override { return x_.grad().data_ptr<float>(); }

 protected:
  /// T x D.
  virtual torch::Tensor run() = 0;

  static torch::Tensor view(const float* data, at::IntArrayRef shape) {
    return torch::from_blob(const_cast<float*>(data), shape, torch::kFloat);
  }
  /// A tensor whose gradient is wanted.
  torch::Tensor leaf(torch::Tensor tensor) {
    leaves_.push_back(tensor.requires_grad_());
    return tensor;
  }
  static const float* gradient_of(torch::Tensor& tensor) {
    tensor.mutable_grad() = tensor.grad().contiguous();
    return tensor.grad().data_ptr<float>();
  }
  /// Adds the slots' rows, S x D, to their tokens' rows of y.
  torch::Tensor combined(const torch::Tensor& rows) const {
    return torch::zeros({tokens_, width_}).index_add_(0, token_, rows);
  }

  std::int64_t tokens_;
  std::int64_t width_;
  torch::Tensor x_, token_;

 private:
  torch::Tensor dy_, y_;
  std::vector<torch::Tensor> leaves_;
};

}  // namespace bench
