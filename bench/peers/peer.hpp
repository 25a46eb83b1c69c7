#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

/// \file
/// The same layer made with another library. Plain C++, so that a peer is compiled with whatever
/// its library needs. All matrices are row-major, one token a row.

namespace bench {

/// The parameters of one expert, or their gradients.
template <class Pointer>
struct ExpertArrays {
  Pointer up;         ///< D x H
  Pointer up_bias;    ///< H
  Pointer down;       ///< H x D
  Pointer down_bias;  ///< D
};

/// What is to be computed: of expert e, the rows offsets[e] up to offsets[e + 1], each a token and a
/// weight. y_t = Σ weight·(relu(x_t·up + up_bias)·down + down_bias).
struct Problem {
  std::ptrdiff_t width = 0;
  std::ptrdiff_t hidden = 0;
  std::ptrdiff_t tokens = 0;
  const float* x = nullptr;   ///< T x D
  const float* dy = nullptr;  ///< T x D
  std::vector<ExpertArrays<const float*>> experts;
  std::vector<std::ptrdiff_t> offsets;       ///< E + 1
  std::vector<std::ptrdiff_t> sorted_token;  ///< S
  std::vector<float> row_weight;             ///< S

  std::ptrdiff_t slots() const { return static_cast<std::ptrdiff_t>(sorted_token.size()); }
};

class Peer {
 public:
  virtual ~Peer() = default;
  virtual std::string name() const = 0;

  /// y, and all that backward needs, as in training.
  virtual void forward() = 0;
  /// forward(), then dx, the gradient of each row's weight and those of all parameters, which need
  /// not be added to anything.
  virtual void step() = 0;

  // Valid until the next call of the two above.
  virtual const float* y() = 0;            ///< T x D
  virtual const float* dx() = 0;           ///< T x D
  virtual const float* row_dweight() = 0;  ///< S
  virtual ExpertArrays<const float*> gradient(std::size_t expert) = 0;
};

/// Each keeps a reference to the problem.
std::unique_ptr<Peer> make_eigen_peer(const Problem& problem);
std::unique_ptr<Peer> make_openblas_peer(const Problem& problem);
std::unique_ptr<Peer> make_onednn_peer(const Problem& problem);
/// As it is usually written: each expert picks its tokens and adds to the result.
std::unique_ptr<Peer> make_torch_peer(const Problem& problem);
/// As one writes it who knows what autograd makes of that: one index_select and one index_add.
std::unique_ptr<Peer> make_torch_sorted_peer(const Problem& problem);
/// With the weights of all experts in one tensor, and one batched product for all; of experts with the same
/// number of slots.
std::unique_ptr<Peer> make_torch_bmm_peer(const Problem& problem);
/// With the weights of all experts in one tensor, by grouped_mm; only with MOE_BENCH_TORCH_GROUPED.
std::unique_ptr<Peer> make_torch_grouped_peer(const Problem& problem);

}  // namespace bench
