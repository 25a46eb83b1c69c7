#pragma once

#include <torch/torch.h>

#include <memory>
#include <utility>

#include "moe/matrix.hpp"

/// \file
/// Matrices as tensors and tensors as matrices, without a copy.

namespace examples {

/// A matrix as a tensor that keeps `owner` alive, and with it the matrix.
template <class Scalar>
torch::Tensor share(moe::Matrix<Scalar>& matrix, std::shared_ptr<void> owner) {
  return torch::from_blob(
      matrix.data(), {matrix.rows(), matrix.cols()}, [owner = std::move(owner)](void*) {},
      c10::CppTypeToScalarType<Scalar>::value);
}

/// A tensor that takes the memory of a matrix, which is empty afterwards.
template <class Scalar>
torch::Tensor take(moe::Matrix<Scalar>& matrix) {
  const auto owner = std::make_shared<moe::Matrix<Scalar>>(std::move(matrix));
  return share(*owner, owner);
}

/// A contiguous tensor of T x D on the CPU as a matrix, valid as long as the tensor. Throws c10::Error for another shape, device
/// or type.
template <class Scalar>
moe::ConstMatrixView<Scalar> view(const torch::Tensor& tensor) {
  TORCH_CHECK(tensor.dim() == 2 && tensor.device().is_cpu() && tensor.is_contiguous(),
              "a tensor of shape ", tensor.sizes(), " on ", tensor.device(),
              ", must be T x D, contiguous and on the CPU");
  return {tensor.data_ptr<Scalar>(), tensor.size(0), tensor.size(1),
          Eigen::OuterStride<>(tensor.size(1))};
}

}  // namespace examples
