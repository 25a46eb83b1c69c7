#include <torch/library.h>

#include "torch_layer.hpp"

/// \file
/// The layers that Python finds in torch.classes.moe after torch.classes.load_library().

namespace {

template <class Gate>
typename Gate::Config gate_config(std::int64_t experts, std::int64_t top_k, double balance) {
  typename Gate::Config config;
  config.experts = experts;
  config.top_k = top_k;
  if constexpr (requires { config.switch_loss_weight; }) {
    config.renormalise = true;
    config.switch_loss_weight = balance;
  } else {
    config.importance_weight = balance;
    config.load_weight = balance;
  }
  return config;
}

template <class Gate>
void define(torch::Library& library, const char* name) {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward, typename Gate::Scalar>, Gate>;
  using Bound = examples::TorchLayer<Layer>;
  using Int = std::int64_t;
  library.class_<Bound>(name)
      .def(torch::init([](Int width, Int hidden, Int experts, Int top_k, double balance, Int seed) {
             return c10::make_intrusive<Bound>(
                 Layer({.width = width,
                        .expert = {.hidden = hidden},
                        .gate = gate_config<Gate>(experts, top_k, balance),
                        .seed = static_cast<std::uint64_t>(seed)}));
           }),
           "",
           {torch::arg("width"), torch::arg("hidden"), torch::arg("experts"), torch::arg("top_k"),
            torch::arg("balance"), torch::arg("seed")})
      .def("parameters", &Bound::parameters)
      .def("evaluate", &Bound::evaluate)
      .def("forward", [](const c10::intrusive_ptr<Bound>& layer, const torch::Tensor& x,
                         const std::vector<torch::Tensor>& parameters, Int step) {
        return Bound::apply(layer, static_cast<std::uint64_t>(step), x,
                            torch::TensorList(parameters));
      });
}

}  // namespace

TORCH_LIBRARY(moe, library) {
  define<moe::TopKGate<float>>(library, "TopKFloat");
  define<moe::TopKGate<double>>(library, "TopKDouble");
  define<moe::NoisyTopKGate<float>>(library, "NoisyTopKFloat");
  define<moe::NoisyTopKGate<double>>(library, "NoisyTopKDouble");
}
