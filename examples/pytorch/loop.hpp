#pragma once

#include <torch/torch.h>

#include <cstddef>
#include <cstdint>
#include <vector>

/// \file
/// The same layer in PyTorch's own operations.

namespace examples {

/// y of a mixture of ReLU experts behind a softmax gate whose `top_k` weights are renormalised, by a loop
/// over the experts. Parameters are in the order of TorchLayer::parameters(): the gate's weight, then
/// weight and bias of both linear maps of each expert. Slots are sorted first, so that the loop does not
/// search all of them for each expert's.
inline torch::Tensor loop_over_experts(const torch::Tensor& x,
                                       const std::vector<torch::Tensor>& parameters,
                                       std::int64_t top_k) {
  const auto experts = static_cast<std::int64_t>(parameters.size() / 4);
  const auto [scores, choices] = torch::softmax(x.mm(parameters[0]), 1).topk(top_k, 1);
  const torch::Tensor weight = (scores / scores.sum(1, true)).flatten();
  const torch::Tensor chosen = choices.flatten();
  const torch::Tensor sorted_slot = chosen.argsort();
  const torch::Tensor count = torch::bincount(chosen, {}, experts);
  torch::Tensor y = torch::zeros_like(x);
  std::int64_t first = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    const torch::Tensor* of = parameters.data() + 1 + 4 * e;
    const torch::Tensor slot = sorted_slot.narrow(0, first, count[e].item<std::int64_t>());
    if (slot.size(0) == 0) continue;
    first += slot.size(0);
    const torch::Tensor token = slot.div(top_k, "floor");
    const torch::Tensor hidden = torch::relu(torch::addmm(of[1], x.index_select(0, token), of[0]));
    const torch::Tensor rows = torch::addmm(of[3], hidden, of[2]);
    y.index_add_(0, token, rows * weight.index_select(0, slot).unsqueeze(1));
  }
  return y;
}

}  // namespace examples
