#pragma once

#include <cstddef>
#include <memory>
#include <string>

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

class NarrowPeer {
 public:
  virtual ~NarrowPeer() = default;
  virtual double weight_bytes() const = 0;
  /// relu(x·up)·down of all tokens.
  virtual void evaluate() = 0;
};

/// ggml's mul_mat_id with weights of its type "f32", "bf16", "f16", "q8_0" or "q4_0", in the layout that
/// it repacks them to where it does.
std::unique_ptr<NarrowPeer> make_ggml_peer(const std::string& type, const NarrowProblem& problem);

}  // namespace bench
