#include <cblas.h>

#include "composed.hpp"

/// \file
/// OpenBLAS has no layer of this kind; its cblas_sgemm computes the products.

namespace bench {

namespace {

using Index = std::ptrdiff_t;

/// C (m x n) = A·B, each as stored or transposed, where A·B has `k` steps.
void multiply(CBLAS_TRANSPOSE a_form, CBLAS_TRANSPOSE b_form, Index m, Index n, Index k,
              const float* a, const float* b, float* c) {
  const auto size = [](Index i) { return static_cast<blasint>(i); };
  cblas_sgemm(CblasRowMajor, a_form, b_form, size(m), size(n), size(k), 1.0f, a,
              size(a_form == CblasTrans ? m : k), b, size(b_form == CblasTrans ? k : n), 0.0f, c,
              size(n));
}

struct OpenblasProducts {
  static constexpr const char* name = "openblas";
  OpenblasProducts(Index width, Index hidden) : d(width), h(hidden) { openblas_set_num_threads(1); }

  void up(Index n, const float* x, const ExpertArrays<const float*>& expert, float* a) const {
    multiply(CblasNoTrans, CblasNoTrans, n, h, d, x, expert.up, a);
    for (Index i = 0; i < n; ++i) add_bias(expert.up_bias, true, h, a + i * h);
  }
  void down(Index n, const float* a, const ExpertArrays<const float*>& expert, float* y) const {
    multiply(CblasNoTrans, CblasNoTrans, n, d, h, a, expert.down, y);
    for (Index i = 0; i < n; ++i) add_bias(expert.down_bias, false, d, y + i * d);
  }
  void down_input(Index n, const float* dy, const ExpertArrays<const float*>& expert,
                  float* da) const {
    multiply(CblasNoTrans, CblasTrans, n, h, d, dy, expert.down, da);
  }
  void up_input(Index n, const float* dpre, const ExpertArrays<const float*>& expert,
                float* dx) const {
    multiply(CblasNoTrans, CblasTrans, n, d, h, dpre, expert.up, dx);
  }
  void down_weight(Index n, const float* a, const float* dy, float* gradient) const {
    multiply(CblasTrans, CblasNoTrans, h, d, n, a, dy, gradient);
  }
  void up_weight(Index n, const float* x, const float* dpre, float* gradient) const {
    multiply(CblasTrans, CblasNoTrans, d, h, n, x, dpre, gradient);
  }

  Index d;
  Index h;
};

}  // namespace

std::unique_ptr<Peer> make_openblas_peer(const Problem& problem) {
  return std::make_unique<ComposedPeer<OpenblasProducts>>(problem);
}

}  // namespace bench
