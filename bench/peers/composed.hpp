#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "peer.hpp"

namespace bench {

/// c += bias, and then ReLU where there is `relu`; a row of a product whose library adds no bias.
inline void add_bias(const float* __restrict bias, bool relu, std::ptrdiff_t columns,
                     float* __restrict c) {
  if (relu) {
    for (std::ptrdiff_t j = 0; j < columns; ++j) c[j] = std::max(0.0f, c[j] + bias[j]);
  } else {
    for (std::ptrdiff_t j = 0; j < columns; ++j) c[j] += bias[j];
  }
}

/// The layer composed of a library's matrix products: gather the rows of an expert, multiply twice,
/// scatter; and backward. `Products` has the six products that this takes, of n rows each:
///
///     up(n, x, expert, a)           a = relu(x·up + up_bias)
///     down(n, a, expert, y)         y = a·down + down_bias
///     down_input(n, dy, expert, da)         da = dy·downᵀ
///     up_input(n, dpre, expert, dx)         dx = dpre·upᵀ
///     down_weight(n, a, dy, gradient)       gradient = aᵀ·dy
///     up_weight(n, x, dpre, gradient)       gradient = xᵀ·dpre
template <class Products>
class ComposedPeer : public Peer {
  using Index = std::ptrdiff_t;

 public:
  explicit ComposedPeer(const Problem& problem)
      : p_(problem), products_(problem.width, problem.hidden) {
    Index most = 0;
    for (std::size_t e = 0; e < p_.experts.size(); ++e) most = std::max(most, count(e));
    x_.resize(size(p_.slots() * p_.width));
    a_.resize(size(p_.slots() * p_.hidden));
    rows_.resize(size(p_.slots() * p_.width));
    dy_.resize(size(most * p_.width));
    dpre_.resize(size(most * p_.hidden));
    y_.resize(size(p_.tokens * p_.width));
    dx_.resize(size(p_.tokens * p_.width));
    row_dweight_.resize(size(p_.slots()));
    const Index parameters = 2 * p_.width * p_.hidden + p_.width + p_.hidden;
    gradients_.resize(size(parameters) * p_.experts.size());
  }

  std::string name() const override { return Products::name; }
  Products& products() { return products_; }

  void forward() override {
    std::fill(y_.begin(), y_.end(), 0.0f);
    for (std::size_t e = 0; e < p_.experts.size(); ++e) {
      const Index n = count(e);
      if (n == 0) continue;
      const Index first = p_.offsets[e];
      float* x = x_.data() + first * p_.width;
      float* a = a_.data() + first * p_.hidden;
      float* rows = rows_.data() + first * p_.width;
      for (Index i = 0; i < n; ++i) {
        std::copy_n(p_.x + p_.sorted_token[size(first + i)] * p_.width, p_.width, x + i * p_.width);
      }
      products_.up(n, x, p_.experts[e], a);
      products_.down(n, a, p_.experts[e], rows);
      for (Index i = 0; i < n; ++i) {
        add_scaled(p_.row_weight[size(first + i)], rows + i * p_.width,
                   y_.data() + p_.sorted_token[size(first + i)] * p_.width, p_.width);
      }
    }
  }

  void step() override {
    forward();
    std::fill(dx_.begin(), dx_.end(), 0.0f);
    for (std::size_t e = 0; e < p_.experts.size(); ++e) {
      const ExpertArrays<float*> g = gradient_of(e);
      std::fill_n(g.up_bias, p_.hidden, 0.0f);
      std::fill_n(g.down_bias, p_.width, 0.0f);
      const Index n = count(e);
      if (n == 0) {
        std::fill_n(g.up, p_.width * p_.hidden, 0.0f);
        std::fill_n(g.down, p_.width * p_.hidden, 0.0f);
        continue;
      }
      const Index first = p_.offsets[e];
      const float* x = x_.data() + first * p_.width;
      const float* a = a_.data() + first * p_.hidden;
      float* rows = rows_.data() + first * p_.width;
      for (Index i = 0; i < n; ++i) {
        const float* dy = p_.dy + p_.sorted_token[size(first + i)] * p_.width;
        row_dweight_[size(first + i)] = dot(dy, rows + i * p_.width, p_.width);
        scale(p_.row_weight[size(first + i)], dy, dy_.data() + i * p_.width, p_.width);
        add_scaled(1.0f, dy_.data() + i * p_.width, g.down_bias, p_.width);
      }
      products_.down_weight(n, a, dy_.data(), g.down);
      products_.down_input(n, dy_.data(), p_.experts[e], dpre_.data());
      for (Index i = 0; i < n; ++i) {
        relu_backward(a + i * p_.hidden, dpre_.data() + i * p_.hidden, g.up_bias, p_.hidden);
      }
      products_.up_weight(n, x, dpre_.data(), g.up);
      products_.up_input(n, dpre_.data(), p_.experts[e], rows);  // y's rows are done with
      for (Index i = 0; i < n; ++i) {
        add_scaled(1.0f, rows + i * p_.width,
                   dx_.data() + p_.sorted_token[size(first + i)] * p_.width, p_.width);
      }
    }
  }

  const float* y() override { return y_.data(); }
  const float* dx() override { return dx_.data(); }
  const float* row_dweight() override { return row_dweight_.data(); }
  ExpertArrays<const float*> gradient(std::size_t e) override {
    const ExpertArrays<float*> g = gradient_of(e);
    return {g.up, g.up_bias, g.down, g.down_bias};
  }

 private:
  static std::size_t size(Index i) { return static_cast<std::size_t>(i); }
  Index count(std::size_t e) const { return p_.offsets[e + 1] - p_.offsets[e]; }

  ExpertArrays<float*> gradient_of(std::size_t e) {
    const Index weights = p_.width * p_.hidden;
    float* up = gradients_.data() + static_cast<Index>(e) * (2 * weights + p_.width + p_.hidden);
    return {up, up + 2 * weights, up + weights, up + 2 * weights + p_.hidden};
  }

  // Plain enough for the compiler to make vectors of.

  static void add_scaled(float w, const float* __restrict from, float* __restrict to, Index n) {
    for (Index j = 0; j < n; ++j) to[j] += w * from[j];
  }
  static void scale(float w, const float* __restrict from, float* __restrict to, Index n) {
    for (Index j = 0; j < n; ++j) to[j] = w * from[j];
  }
  static void relu_backward(const float* __restrict a, float* __restrict d, float* __restrict sum,
                            Index n) {
    for (Index j = 0; j < n; ++j) {
      d[j] = a[j] > 0 ? d[j] : 0.0f;
      sum[j] += d[j];
    }
  }
  static float dot(const float* a, const float* b, Index n) {
    float sum[32] = {};
    Index j = 0;
    for (; j + 32 <= n; j += 32) {
      for (Index i = 0; i < 32; ++i) sum[i] += a[j + i] * b[j + i];
    }
    for (; j < n; ++j) sum[0] += a[j] * b[j];
    float total = 0;
    for (const float s : sum) total += s;
    return total;
  }

  const Problem& p_;
  Products products_;
  std::vector<float> x_;       ///< S x D, gathered
  std::vector<float> a_;       ///< S x H
  std::vector<float> rows_;    ///< S x D, outputs of the experts, then their dx
  std::vector<float> dy_;      ///< n x D, weighted
  std::vector<float> dpre_;    ///< n x H
  std::vector<float> y_, dx_;  ///< T x D
  std::vector<float> row_dweight_;
  std::vector<float> gradients_;
};

}  // namespace bench
