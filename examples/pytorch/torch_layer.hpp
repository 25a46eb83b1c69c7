#pragma once

#include <torch/custom_class.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "moe/moe.hpp"

namespace examples {

/// A MoELayer as a function of PyTorch's autograd, without copies:
///
///     auto layer = c10::make_intrusive<examples::TorchLayer<Layer>>(Layer(config));
///     auto y = examples::TorchLayer<Layer>::apply(layer, step, x, parameters);
///
/// Parameters are tensors in the layer's memory. y, dx and gradients are matrices that become tensors. The memory
/// of a gradient goes back to the layer when the next backward pass begins, unless a tensor still refers to it.
/// x and dy are read in place (one that is not contiguous is copied first), and the layer saves a copy of x.
/// Passes may run in several threads; backward passes wait for each other.
template <class Layer>
struct TorchLayer : torch::CustomClassHolder, torch::autograd::Function<TorchLayer<Layer>> {
  using Scalar = typename Layer::Scalar;
  using Matrix = moe::Matrix<Scalar>;
  using Tensor = torch::Tensor;
  using Context = torch::autograd::AutogradContext;

  /// Takes the layer, whose parameters PyTorch trains from here on.
  explicit TorchLayer(Layer layer) : layer_(std::make_shared<Layer>(std::move(layer))) {
    moe::for_each_parameter(*layer_, [&](const std::string& name, auto& p) {
      own_.insert(name, as_tensor({layer_, &p.value}).requires_grad_(p.trained));
      lent_.emplace_back(&p, nullptr);
    });
  }

  /// By name, in the order in which apply() takes them; a bias is 1 x N. They are the same tensors at each call.
  c10::Dict<std::string, Tensor> parameters() const { return own_.copy(); }

  /// y (T x D) without noise and without a graph, as MoELayer::evaluate(). `parameters` are as for
  /// apply(). Throws c10::Error, or std::invalid_argument as MoELayer::evaluate() does.
  Tensor evaluate(const Tensor& x, const std::vector<Tensor>& parameters) const {
    check(parameters);
    return take(layer_->evaluate(view(x.contiguous())));
  }

  /// What apply() calls: y (T x D) of a training pass over x (T x D). `parameters` are those of parameters(), or
  /// others that share their storage; one that requires no gradient is not trained. The gate's losses are part
  /// of the backward pass. Throws c10::Error, or std::invalid_argument as MoELayer::forward() does.
  static Tensor forward(Context* context, const c10::intrusive_ptr<TorchLayer>& self,
                        std::uint64_t step, const Tensor& x, torch::TensorList parameters) {
    self->check(parameters);
    const auto tape = c10::make_intrusive<Tape>();
    self->layer_->forward(view(x.contiguous()), *tape, {.step = step});
    context->save_for_backward(parameters.vec());
    context->saved_data["layer"] = c10::IValue::make_capsule(self);
    context->saved_data["tape"] = c10::IValue::make_capsule(tape);
    return take(std::move(tape->y));
  }

  /// What autograd calls: the gradients with respect to the arguments of apply(), undefined for the layer, the step
  /// and parameters that are not trained. Throws c10::Error where a parameter was changed since forward().
  static std::vector<Tensor> backward(Context* context, const std::vector<Tensor>& dy) {
    TORCH_CHECK(!torch::GradMode::is_enabled(), "TorchLayer has no second derivatives");
    auto& self = static_cast<TorchLayer&>(*context->saved_data["layer"].toCapsule());
    auto& tape = static_cast<Tape&>(*context->saved_data["tape"].toCapsule());
    const std::lock_guard lock(self.mutex_);
    for (auto next = self.lent_.begin(); const Tensor& given : context->get_saved_variables()) {
      auto& [p, gradient] = *next++;
      p->trained = given.requires_grad();
      p->zero_gradient_in(gradient.use_count() == 1 ? std::move(*gradient) : Matrix());
    }
    self.layer_->backward(view(dy[0].contiguous()), tape);
    std::vector<Tensor> gradients = {Tensor(), Tensor(), take(std::move(tape.dx))};
    for (auto& [p, gradient] : self.lent_) {
      gradient = p->trained ? std::make_shared<Matrix>(std::move(p->gradient())) : nullptr;
      gradients.push_back(gradient ? as_tensor(gradient) : Tensor());
    }
    return gradients;
  }

 private:
  struct Tape : torch::CustomClassHolder, Layer::Tape {};

  /// Throws c10::Error unless these are the tensors of parameters(), or others of their storage and shape.
  void check(torch::TensorList given) const {
    TORCH_CHECK(given.size() == own_.size(), given.size(), " parameters, must be ", own_.size());
    for (auto next = given.begin(); const auto& own : own_) {
      const Tensor &tensor = *next++, value = own.value();
      TORCH_CHECK(tensor.is_set_to(value), own.key(), " has shape ", tensor.sizes(), ", strides ",
                  tensor.strides(), ", must be ", value.sizes(), " in the layer's memory");
    }
  }

  /// A contiguous tensor of T x D as a matrix, valid as long as the tensor.
  static Eigen::Map<const Matrix> view(const Tensor& rows) {
    TORCH_CHECK(rows.dim() == 2 && rows.is_cpu(), "a tensor of shape ", rows.sizes(), " on ",
                rows.device(), ", must be T x D and on the CPU");
    return {rows.data_ptr<Scalar>(), rows.size(0), rows.size(1)};
  }

  /// A matrix as a tensor, which owns it.
  static Tensor as_tensor(const std::shared_ptr<Matrix>& owner) {
    return torch::from_blob(
        owner->data(), {owner->rows(), owner->cols()}, [owner](void*) {}, torch::dtype<Scalar>());
  }
  static Tensor take(Matrix rows) { return as_tensor(std::make_shared<Matrix>(std::move(rows))); }

  std::shared_ptr<Layer> layer_;
  c10::Dict<std::string, Tensor> own_;
  /// The parameters, and the memory of their last gradients, which tensors own too.
  std::vector<std::pair<moe::Parameter<Scalar>*, std::shared_ptr<Matrix>>> lent_;
  std::mutex mutex_;
};

}  // namespace examples
