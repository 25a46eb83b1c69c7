#include <Eigen/Core>

#include "composed.hpp"

namespace bench {

namespace {

using Eigen::Index;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using In = Eigen::Map<const Matrix>;
using Out = Eigen::Map<Matrix>;
using RowIn = Eigen::Map<const Eigen::RowVectorXf>;

struct EigenProducts {
  static constexpr const char* name = "eigen";
  EigenProducts(Index width, Index hidden) : d(width), h(hidden) {}

  void up(Index n, const float* x, const ExpertArrays<const float*>& expert, float* a) const {
    Out out(a, n, h);
    out.noalias() = In(x, n, d) * In(expert.up, d, h);
    out = (out.rowwise() + RowIn(expert.up_bias, h)).cwiseMax(0.0f);
  }
  void down(Index n, const float* a, const ExpertArrays<const float*>& expert, float* y) const {
    Out out(y, n, d);
    out.noalias() = In(a, n, h) * In(expert.down, h, d);
    out.rowwise() += RowIn(expert.down_bias, d);
  }
  void down_input(Index n, const float* dy, const ExpertArrays<const float*>& expert,
                  float* da) const {
    Out(da, n, h).noalias() = In(dy, n, d) * In(expert.down, h, d).transpose();
  }
  void up_input(Index n, const float* dpre, const ExpertArrays<const float*>& expert,
                float* dx) const {
    Out(dx, n, d).noalias() = In(dpre, n, h) * In(expert.up, d, h).transpose();
  }
  void down_weight(Index n, const float* a, const float* dy, float* gradient) const {
    Out(gradient, h, d).noalias() = In(a, n, h).transpose() * In(dy, n, d);
  }
  void up_weight(Index n, const float* x, const float* dpre, float* gradient) const {
    Out(gradient, d, h).noalias() = In(x, n, d).transpose() * In(dpre, n, h);
  }

  Index d;
  Index h;
};

}  // namespace

std::unique_ptr<Peer> make_eigen_peer(const Problem& problem) {
  return std::make_unique<ComposedPeer<EigenProducts>>(problem);
}

}  // namespace bench
