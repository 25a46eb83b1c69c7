#pragma once

#include <torch/torch.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moe/parameter.hpp"
#include "tensors.hpp"

namespace examples {

/// The parameters of a module as tensors in its memory, and their gradients. A gradient's tensor that is still
/// held when the next backward pass begins keeps its memory, and the parameter takes other.
template <class Module>
class ParameterTensors {
  using Scalar = typename Module::Scalar;

 public:
  explicit ParameterTensors(std::shared_ptr<Module> module) : module_(std::move(module)) {
    moe::for_each_parameter(*module_, [&](const std::string& name, auto& parameter) {
      entries_.push_back({name, &parameter, {}});
    });
  }

  /// By name, in the order of the module; a bias is 1 x N.
  c10::Dict<std::string, torch::Tensor> by_name() const {
    c10::Dict<std::string, torch::Tensor> tensors;
    for (const Entry& entry : entries_) {
      const torch::Tensor tensor = share(entry.parameter->value, module_);
      tensors.insert(entry.name, tensor.requires_grad_(entry.parameter->trained));
    }
    return tensors;
  }

  /// Throws c10::Error unless these are the tensors of by_name(), or others that show the same.
  void check(torch::TensorList tensors) const {
    TORCH_CHECK(tensors.size() == entries_.size(), tensors.size(), " parameters, must be ",
                entries_.size());
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const auto& value = entries_[i].parameter->value;
      const torch::Tensor& tensor = tensors[i];
      TORCH_CHECK(tensor.data_ptr() == value.data(), entries_[i].name,
                  " is not in the layer's memory any more");
      TORCH_CHECK(tensor.sizes() == torch::IntArrayRef({value.rows(), value.cols()}) &&
                      tensor.is_contiguous(),
                  entries_[i].name, " has shape ", tensor.sizes(), " and strides ",
                  tensor.strides(), ", must be ", value.rows(), " x ", value.cols(),
                  " and contiguous");
    }
  }

  /// Prepares a backward pass: gradients are zero, and what is trained is what requires a gradient.
  void begin_backward(const std::vector<torch::Tensor>& tensors) {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      moe::Parameter<Scalar>& parameter = *entries_[i].parameter;
      parameter.trained = tensors[i].requires_grad();
      if (const auto lent = entries_[i].lent.lock()) lent->memory.swap(parameter.gradient());
      entries_[i].lent.reset();  // a second swap would take the memory back
    }
    moe::zero_gradients(*module_, moe::Updates::lazy);
  }
  /// Appends the gradients after it, in the same order; that of a parameter that is not trained is undefined.
  void append_gradients(std::vector<torch::Tensor>& to) {
    for (Entry& entry : entries_) {
      to.emplace_back();
      if (!entry.parameter->trained) continue;
      const auto lent = std::make_shared<Lent>(Lent{module_, {}});
      to.back() = share(entry.parameter->gradient(), lent);
      entry.lent = lent;
    }
  }

 private:
  /// What a gradient's tensor owns: the module, whose memory it shows, or that memory.
  struct Lent {
    std::shared_ptr<Module> module;
    moe::Matrix<Scalar> memory;
  };
  struct Entry {
    std::string name;
    moe::Parameter<Scalar>* parameter;
    std::weak_ptr<Lent> lent;
  };

  std::shared_ptr<Module> module_;
  std::vector<Entry> entries_;
};

}  // namespace examples
