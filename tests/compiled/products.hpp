#pragma once

#include <Eigen/Core>

#include "moe/kernels/gemm_bfloat16.hpp"
#include "moe/weights/bfloat16.hpp"
#include "moe/weights/float16.hpp"
#include "moe/weights/int4.hpp"
#include "moe/weights/int8.hpp"
#include "moe/weights/integer_product.hpp"
#include "moe/weights/narrow_gemm.hpp"

/// \file
/// Explicit instantiations of products that many tests use, besides those of moe/instantiations.hpp: of narrow
/// weights, and of Eigen's own matrices, with which tests compare. The tests' precompiled header has this file,
/// so that no test instantiates them, and products.cpp does.

#ifdef MOE_TEST_INSTANTIATE
#define MOE_TEST_EXTERN
#else
#define MOE_TEST_EXTERN extern
#endif

#define MOE_TEST_NARROW_PRODUCTS(Format)                                                          \
  MOE_TEST_EXTERN template void gemm_serial<GemmNN<float, NarrowOperand<Format>>>(                \
      const GemmNN<float, NarrowOperand<Format>>&, Precision);                                    \
  MOE_TEST_EXTERN template void gemm_serial<GemmNT<float, NarrowOperand<Format>>>(                \
      const GemmNT<float, NarrowOperand<Format>>&, Precision);                                    \
  MOE_TEST_EXTERN template void gemm_serial<Format>(const GemmNN<float, NarrowOperand<Format>>&); \
  MOE_TEST_EXTERN template void gemm_serial<Format>(const GemmNT<float, NarrowOperand<Format>>&); \
  MOE_TEST_EXTERN template void gemm<float>(const GemmNN<float, NarrowOperand<Format>>&);         \
  MOE_TEST_EXTERN template void gemm<float>(const GemmNT<float, NarrowOperand<Format>>&);

namespace moe::detail {
MOE_TEST_NARROW_PRODUCTS(BFloat16)
MOE_TEST_NARROW_PRODUCTS(Float16)
MOE_TEST_NARROW_PRODUCTS(Int8)
MOE_TEST_NARROW_PRODUCTS(Int4)
MOE_TEST_EXTERN template void gemm_integer<Int8>(const GemmNN<float, NarrowOperand<Int8>>&);
MOE_TEST_EXTERN template void gemm_integer<Int4>(const GemmNN<float, NarrowOperand<Int4>>&);
}  // namespace moe::detail

#define MOE_TEST_EIGEN_PRODUCTS(Scalar)                                               \
  MOE_TEST_EXTERN template struct gebp_kernel<                                        \
      Scalar, Scalar, Index, blas_data_mapper<Scalar, Index, ColMajor, Unaligned, 1>, \
      gebp_traits<Scalar, Scalar>::mr, gebp_traits<Scalar, Scalar>::nr, false, false>;

namespace Eigen::internal {
MOE_TEST_EIGEN_PRODUCTS(float)
MOE_TEST_EIGEN_PRODUCTS(double)
}  // namespace Eigen::internal

#undef MOE_TEST_EIGEN_PRODUCTS
#undef MOE_TEST_NARROW_PRODUCTS
#undef MOE_TEST_EXTERN
