#pragma once

#include <torch/custom_class.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "moe/moe.hpp"
#include "parameter_tensors.hpp"
#include "tensors.hpp"

namespace examples {

/// A MoELayer for PyTorch's autograd, without copies: parameters and gradients are tensors in the layer's
/// memory, y and dx take the tape's, and x and dy are read where they are (one that is not contiguous is
/// made so first, and the layer saves an x of its own). A gradient that is still held when the next
/// backward pass begins keeps its memory, and the layer takes other. Passes may run in several threads;
/// backward passes wait for each other.
template <class Layer>
class TorchLayer : public torch::CustomClassHolder {
  using Scalar = typename Layer::Scalar;
  using Tensor = torch::Tensor;
  using Tensors = std::vector<Tensor>;
  using Self = c10::intrusive_ptr<TorchLayer>;

 public:
  using Config = typename Layer::Config;

  explicit TorchLayer(const Config& config)
      : layer_(std::make_shared<Layer>(config)), parameters_(layer_) {}

  /// By name, in the order in which forward() takes them; a bias is 1 x N.
  c10::Dict<std::string, Tensor> parameters() const { return parameters_.by_name(); }

  /// y (T x D) of a training pass over x (T x D). `parameters` are those of parameters(), or others that
  /// share their memory; one that requires no gradient is not trained. The gate's losses are part of the
  /// backward pass. Throws c10::Error, or std::invalid_argument as MoELayer::forward() does.
  static Tensor forward(const Self& self, const Tensor& x, const Tensors& parameters,
                        std::int64_t step) {
    return Function::apply(x, torch::TensorList(parameters), self, step);
  }

  /// y (T x D) without noise and without a graph, as MoELayer::evaluate(). `parameters` are as for
  /// forward(). Throws c10::Error, or std::invalid_argument as MoELayer::evaluate() does.
  Tensor evaluate(const Tensor& x, const Tensors& parameters) const {
    parameters_.check(parameters);
    typename Layer::Tape tape;
    layer_->evaluate(view<Scalar>(x.contiguous()), tape);
    return take(tape.y);
  }

 private:
  struct Pass : torch::CustomClassHolder {
    Self self;
    typename Layer::Tape tape;
  };

  struct Function : torch::autograd::Function<Function> {
    using Context = torch::autograd::AutogradContext;

    static Tensor forward(Context* context, const Tensor& x, torch::TensorList parameters,
                          const Self& self, std::int64_t step) {
      self->parameters_.check(parameters);
      const auto pass = c10::make_intrusive<Pass>();
      pass->self = self;
      self->layer_->forward(view<Scalar>(x.contiguous()), pass->tape,
                            {.step = static_cast<std::uint64_t>(step)});
      context->save_for_backward(parameters.vec());
      context->saved_data["pass"] = c10::IValue::make_capsule(pass);
      return take(pass->tape.y);
    }

    static Tensors backward(Context* context, const Tensors& dy) {
      TORCH_CHECK(!torch::GradMode::is_enabled(), "TorchLayer has no second derivatives");
      const Tensors parameters = context->get_saved_variables();  // throws where one was changed
      const auto pass =
          c10::static_intrusive_pointer_cast<Pass>(context->saved_data["pass"].toCapsule());
      return pass->self->backward(dy[0].contiguous(), parameters, pass->tape);
    }
  };

  /// dx, the gradients, and nothing for `self` and `step`.
  Tensors backward(const Tensor& dy, const Tensors& parameters, typename Layer::Tape& tape) {
    const std::lock_guard lock(mutex_);
    parameters_.begin_backward(parameters);
    layer_->backward(view<Scalar>(dy), tape);
    Tensors gradients = {take(tape.dx)};
    parameters_.append_gradients(gradients);
    gradients.resize(gradients.size() + 2);
    return gradients;
  }

  std::shared_ptr<Layer> layer_;
  ParameterTensors<Layer> parameters_;
  std::mutex mutex_;
};

}  // namespace examples
