#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

/// \file
/// The products of a layer served with another library. Plain C++, so that a peer is compiled with
/// whatever its library needs.

namespace bench {

/// Tokens that go round the experts, one expert each.
struct NarrowProblem {
  std::ptrdiff_t width;
  std::ptrdiff_t hidden;
  std::ptrdiff_t experts;
  std::ptrdiff_t tokens;
  std::ptrdiff_t threads;
};

/// The numbers of the layer that is compared with; all matrices are row-major.
struct NarrowExpert {
  const float* up;         ///< D x H
  const float* up_bias;    ///< H
  const float* down;       ///< H x D
  const float* down_bias;  ///< D
  std::vector<std::int64_t> tokens;
  std::vector<float> token_weights;
};
struct NarrowNetwork {
  const float* x;  ///< T x D
  std::vector<NarrowExpert> experts;
};

class NarrowPeer {
 public:
  virtual ~NarrowPeer() = default;
  virtual double weight_bytes() const = 0;
  /// relu(x·up)·down of all tokens; with a network, its biases and its tokens' weights too.
  virtual void evaluate() = 0;
  /// What evaluate() has computed (T x D), of a peer with a network; else nothing.
  virtual std::vector<float> y() { return {}; }
};

/// ggml's mul_mat_id with weights of its type "f32", "bf16", "f16", "q8_0" or "q4_0", in the layout that
/// it repacks them to where it does.
std::unique_ptr<NarrowPeer> make_ggml_peer(const std::string& type, const NarrowProblem& problem);

/// libtorch with x, weights, biases and y in bfloat16. Copies the network.
std::unique_ptr<NarrowPeer> make_torch_narrow_peer(const NarrowProblem& problem,
                                                   const NarrowNetwork& network);

}  // namespace bench
