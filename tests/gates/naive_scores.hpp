#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "../naive_activation.hpp"
#include "gates.hpp"
#include "moe/random.hpp"

/// \file
/// Noisy scores a number at a time from the formulas of [S17], for gates that are made of them. They
/// share with the library the names and values of the parameters and the random numbers.

namespace moe::test {

/// The scores of one token, and what follows from them.
struct NaiveScores {
  std::vector<double> clean, scale, h;

  /// Of row t of x.
  NaiveScores(const Matrix<double>& weight, const Matrix<double>& noise_weight, std::uint64_t seed,
              bool noise, double noise_floor, const Matrix<double>& x, Index t, const Pass& key) {
    for (Index i = 0; i < weight.cols(); ++i) {
      double c = 0;
      double raw = 0;
      for (Index d = 0; d < x.cols(); ++d) {
        c += x(t, d) * weight(d, i);
        raw += x(t, d) * noise_weight(d, i);
      }
      const auto words = philox(
          {static_cast<std::uint32_t>(i / 4), key.first_token + static_cast<std::uint32_t>(t),
           static_cast<std::uint32_t>(key.step), static_cast<std::uint32_t>(key.step >> 32)},
          seed);
      const auto n = static_cast<double>(standard_normal(words[detail::to_size(i % 4)]));
      clean.push_back(c);
      scale.push_back(std::log1p(std::exp(raw)) + noise_floor);
      h.push_back(noise ? c + n * scale.back() : c);
    }
  }

  Index size() const { return static_cast<Index>(h.size()); }

  /// The k-th largest h without i.
  double threshold(Index k, Index i) const {
    std::vector<double> others = h;
    others.erase(others.begin() + i);
    std::sort(others.begin(), others.end(), std::greater<>());
    return others[detail::to_size(k - 1)];
  }
  std::vector<double> softmax(Index k) const {
    std::vector<double> g(h.size(), 0.0);
    double total = 0;
    for (Index i = 0; i < size(); ++i) {
      if (k == size() || h[detail::to_size(i)] > threshold(k, i)) {
        g[detail::to_size(i)] = std::exp(h[detail::to_size(i)]);
        total += g[detail::to_size(i)];
      }
    }
    for (double& value : g) value /= total;
    return g;
  }
  double probability(Index k, Index i) const {
    if (k == size()) return 1;
    return naive_cdf((clean[detail::to_size(i)] - threshold(k, i)) / scale[detail::to_size(i)]);
  }
};

inline double naive_cv_squared(const Vector<double>& v) {
  if (v.size() < 2) return 0.0;
  const double mean = v.sum() / static_cast<double>(v.size());
  double variance = 0;
  for (Index i = 0; i < v.size(); ++i) variance += (v[i] - mean) * (v[i] - mean);
  return mean == 0 ? 0 : variance / static_cast<double>(v.size()) / (mean * mean);
}

}  // namespace moe::test
