#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "moe/layer/moe_layer.hpp"
#include "naive_activation.hpp"
#include "support.hpp"

/// \file
/// The layer of feed-forward experts behind a noisy top-k gate, a scalar at a time from the
/// formulas of [S17]. It shares nothing with the library but the parameters' names and values, the
/// configuration and the random numbers.

namespace moe::test {

/// Parameters, or their gradients, in double by name.
using Named = std::map<std::string, Matrix<double>>;

template <class Module>
Named values_of(const Module& module) {
  Named named;
  visit_each(module, [&](const std::string& name, const auto& parameter) {
    named[name] = parameter.value.template cast<double>();
  });
  return named;
}
template <class Module>
Named gradients_of(Module& module) {
  Named named;
  visit_each(module, [&](const std::string& name, auto& parameter) {
    named[name] = parameter.gradient().template cast<double>();
  });
  return named;
}

/// Every parameter normal with the given deviation, so that no gradient is zero by chance.
template <class Module>
void randomize(Module& module, std::uint64_t seed, double deviation = 1.0) {
  visit_each(module, [&](const std::string&, auto& parameter) {
    using Scalar = typename std::decay_t<decltype(parameter.value)>::Scalar;
    fill_normal(parameter.value, static_cast<Scalar>(deviation), derive_seed(seed++, 0xA11));
  });
}

/// The smallest gap between neighbours, relative to the row's largest entry, that decides anything:
/// which K experts are chosen and who holds the thresholds of the load, the K-th and (K+1)-th.
template <class Scalar>
double choice_margin(const Matrix<Scalar>& h, Index top_k) {
  double margin = std::numeric_limits<double>::infinity();
  for (Index t = 0; t < h.rows(); ++t) {
    std::vector<double> sorted;
    for (Index i = 0; i < h.cols(); ++i) sorted.push_back(static_cast<double>(h(t, i)));
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const double scale = std::max(std::abs(sorted.front()), std::abs(sorted.back()));
    for (Index k = std::max<Index>(0, top_k - 2); k < std::min(top_k + 1, h.cols() - 1); ++k) {
      const double gap = sorted[detail::to_size(k)] - sorted[detail::to_size(k) + 1];
      margin = std::min(margin, gap / scale);
    }
  }
  return margin;
}

class NaiveLayer {
 public:
  struct Result {
    Matrix<double> x, clean, raw, scale, noise, h;
    std::vector<std::vector<Index>> choice;  ///< T, ascending
    Matrix<double> weight;                   ///< G, T x E
    Matrix<double> probability;              ///< T x E, when there is noise
    Matrix<double> sum, y;
    Vector<double> importance, load;
    double loss = 0;
  };

  template <class Layer>
  explicit NaiveLayer(const Layer& layer)
      : parameters_(values_of(layer)),
        width_(layer.config().width),
        experts_(layer.config().gate.experts),
        active_(layer.config().gate.top_k),
        noise_(layer.config().gate.noise),
        noise_floor_(layer.config().gate.noise_floor),
        importance_weight_(layer.config().gate.importance_weight),
        load_weight_(layer.config().gate.load_weight),
        hidden_(layer.config().expert.hidden),
        activation_(layer.config().expert.activation),
        gated_(layer.config().expert.gated),
        output_(layer.config().output),
        noise_seed_(derive_seed(layer.config().seed, 0)) {
    for (Index e = 0; e < experts_; ++e) weights_.push_back(weights_of(e));
  }

  Result forward(const Matrix<double>& x, const Pass& pass) const {
    return run(x, pass.key(), noise_);
  }
  Result evaluate(const Matrix<double>& x) const { return run(x, {.step = 0}, false); }

  /// Adds to `gradients`, which has the parameters' names, and returns the gradient of x. The
  /// threshold's share of the load can be left out, to see how much it is.
  Matrix<double> backward(const Result& pass, const Matrix<double>& dy, Named& gradients,
                          bool threshold_carries_gradient = true) const {
    const Index T = pass.x.rows();
    const Matrix<double>& gate = parameters_.at("gate.weight");
    const Matrix<double>& noise = parameters_.at("gate.noise_weight");
    Matrix<double>& dgate = gradients["gate.weight"];
    Matrix<double>& dnoise = gradients["gate.noise_weight"];
    Matrix<double> dx = Matrix<double>::Zero(T, width_);
    Matrix<double> dclean = Matrix<double>::Zero(T, experts_);
    Matrix<double> dscale = Matrix<double>::Zero(T, experts_);
    const Vector<double> dimportance = importance_weight_ * cv_squared_gradient(pass.importance);
    const Vector<double> dload = load_weight_ * cv_squared_gradient(pass.load);

    for (Index t = 0; t < T; ++t) {
      std::vector<double> dsum(detail::to_size(width_));
      for (Index d = 0; d < width_; ++d) {
        dsum[detail::to_size(d)] = dy(t, d) * naive_derivative(output_, pass.sum(t, d));
      }
      // y and importance, through G.
      std::vector<double> dG(detail::to_size(experts_), 0);
      double mean = 0;
      for (const Index e : pass.choice[detail::to_size(t)]) {
        const std::vector<double> out = expert(e, pass.x, t);
        double dot = 0;
        for (Index d = 0; d < width_; ++d) {
          dot += dsum[detail::to_size(d)] * out[detail::to_size(d)];
        }
        dG[detail::to_size(e)] = dot + dimportance[e];
        mean += pass.weight(t, e) * dG[detail::to_size(e)];
        expert_backward(e, pass.x, t, dsum, pass.weight(t, e), dx, gradients);
      }
      for (const Index e : pass.choice[detail::to_size(t)]) {
        const double dh = pass.weight(t, e) * (dG[detail::to_size(e)] - mean);
        dclean(t, e) += dh;
        if (noise_) dscale(t, e) += pass.noise(t, e) * dh;
      }
      // Load.
      if (noise_ && active_ < experts_) {
        for (Index i = 0; i < experts_; ++i) {
          const Index j = threshold_holder(pass.h, t, i);
          const double s = pass.scale(t, i);
          const double z = (pass.clean(t, i) - pass.h(t, j)) / s;
          const double dz = dload[i] * naive_density(z);
          dclean(t, i) += dz / s;
          dscale(t, i) -= dz * z / s;
          if (threshold_carries_gradient) {
            dclean(t, j) -= dz / s;
            dscale(t, j) -= dz / s * pass.noise(t, j);
          }
        }
      }
      // c = x·W_g, s = softplus(x·W_noise) + s0.
      for (Index i = 0; i < experts_; ++i) {
        const double draw = noise_ ? dscale(t, i) / (1 + std::exp(-pass.raw(t, i))) : 0;
        for (Index d = 0; d < width_; ++d) {
          dgate(d, i) += pass.x(t, d) * dclean(t, i);
          dnoise(d, i) += pass.x(t, d) * draw;
          dx(t, d) += gate(d, i) * dclean(t, i) + noise(d, i) * draw;
        }
      }
    }
    return dx;
  }

  Named zero_gradients() const {
    Named zeros = parameters_;
    for (auto& [name, matrix] : zeros) matrix.setZero();
    return zeros;
  }

  static double cv_squared(const Vector<double>& v) {
    if (v.size() < 2) return 0;
    double mean = 0;
    double variance = 0;
    for (Index i = 0; i < v.size(); ++i) mean += v[i] / static_cast<double>(v.size());
    for (Index i = 0; i < v.size(); ++i) {
      variance += (v[i] - mean) * (v[i] - mean) / static_cast<double>(v.size());
    }
    return mean == 0 ? 0 : variance / (mean * mean);
  }

  /// The quotient rule on variance / (mean² + ε).
  static Vector<double> cv_squared_gradient(const Vector<double>& v) {
    Vector<double> gradient = Vector<double>::Zero(v.size());
    if (v.size() < 2) return gradient;
    const auto n = static_cast<double>(v.size());
    double mean = 0;
    double variance = 0;
    for (Index i = 0; i < v.size(); ++i) mean += v[i] / n;
    for (Index i = 0; i < v.size(); ++i) variance += (v[i] - mean) * (v[i] - mean) / n;
    const double below = mean == 0 ? 1 : mean * mean;
    for (Index i = 0; i < v.size(); ++i) {
      const double dvariance = 2 * (v[i] - mean) / n;
      const double dbelow = 2 * mean / n;
      gradient[i] = (dvariance * below - variance * dbelow) / (below * below);
    }
    return gradient;
  }

 private:
  Result run(const Matrix<double>& x, const NoiseKey& key, bool noise) const {
    const Index T = x.rows();
    Result pass;
    pass.x = x;
    pass.clean = product(x, parameters_.at("gate.weight"));
    pass.raw = product(x, parameters_.at("gate.noise_weight"));
    pass.scale = Matrix<double>::Zero(T, experts_);
    pass.noise = Matrix<double>::Zero(T, experts_);
    pass.probability = Matrix<double>::Zero(T, experts_);
    pass.weight = Matrix<double>::Zero(T, experts_);
    pass.sum = Matrix<double>::Zero(T, width_);
    pass.y = Matrix<double>::Zero(T, width_);
    pass.importance = Vector<double>::Zero(experts_);
    pass.load = Vector<double>::Zero(experts_);
    pass.h = pass.clean;
    for (Index t = 0; t < T; ++t) {
      if (noise) {
        for (Index i = 0; i < experts_; ++i) {
          pass.scale(t, i) = std::log(1 + std::exp(pass.raw(t, i))) + noise_floor_;
          if (pass.raw(t, i) > 30) pass.scale(t, i) = pass.raw(t, i) + noise_floor_;
          pass.noise(t, i) = normal(key, t, i);
          pass.h(t, i) += pass.noise(t, i) * pass.scale(t, i);
        }
      }
      std::vector<Index> order = descending(pass.h, t);
      order.resize(detail::to_size(active_));
      std::sort(order.begin(), order.end());
      double total = 0;
      for (const Index e : order) total += std::exp(pass.h(t, e) - pass.h.row(t).maxCoeff());
      for (const Index e : order) {
        pass.weight(t, e) = std::exp(pass.h(t, e) - pass.h.row(t).maxCoeff()) / total;
        pass.importance[e] += pass.weight(t, e);
        const std::vector<double> out = expert(e, x, t);
        for (Index d = 0; d < width_; ++d) {
          pass.sum(t, d) += pass.weight(t, e) * out[detail::to_size(d)];
        }
      }
      pass.choice.push_back(order);
      for (Index d = 0; d < width_; ++d) pass.y(t, d) = naive_activation(output_, pass.sum(t, d));
      for (Index i = 0; i < experts_; ++i) {
        double p = std::count(order.begin(), order.end(), i) > 0 ? 1 : 0;
        if (noise && active_ < experts_) {
          p = naive_cdf((pass.clean(t, i) - pass.h(t, threshold_holder(pass.h, t, i))) /
                        pass.scale(t, i));
        }
        pass.probability(t, i) = p;
        pass.load[i] += p;
      }
    }
    pass.loss =
        importance_weight_ * cv_squared(pass.importance) + load_weight_ * cv_squared(pass.load);
    return pass;
  }

  double normal(const NoiseKey& key, Index t, Index i) const {
    const auto words =
        philox({static_cast<std::uint32_t>(i / 4), key.first_token + static_cast<std::uint32_t>(t),
                static_cast<std::uint32_t>(key.step), static_cast<std::uint32_t>(key.step >> 32)},
               noise_seed_);
    return static_cast<double>(standard_normal(words[detail::to_size(i % 4)]));
  }

  static Matrix<double> product(const Matrix<double>& a, const Matrix<double>& b) {
    Matrix<double> c = Matrix<double>::Zero(a.rows(), b.cols());
    for (Index i = 0; i < a.rows(); ++i) {
      for (Index j = 0; j < b.cols(); ++j) {
        for (Index k = 0; k < a.cols(); ++k) c(i, j) += a(i, k) * b(k, j);
      }
    }
    return c;
  }

  /// Experts by descending h; equal ones keep their order.
  std::vector<Index> descending(const Matrix<double>& h, Index t) const {
    std::vector<Index> order;
    for (Index i = 0; i < experts_; ++i) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](Index a, Index b) { return h(t, a) > h(t, b); });
    return order;
  }

  /// The expert with the K-th largest h when expert i is taken away.
  Index threshold_holder(const Matrix<double>& h, Index t, Index i) const {
    std::vector<Index> order = descending(h, t);
    order.erase(std::find(order.begin(), order.end(), i));
    return order[detail::to_size(active_) - 1];
  }

  static std::string expert_name(Index e, const char* name) {
    return "experts." + std::to_string(e) + "." + name;
  }

  /// W_1, b_1, W_3, W_2 and b_2 of an expert; without a W_3, or without biases, they are empty.
  struct Weights {
    Matrix<double> first, first_bias, linear, second, second_bias;
  };
  Weights weights_of(Index e) const {
    const auto value = [&](const char* name) { return parameters_.at(expert_name(e, name)); };
    if (gated_) return {value("gate.weight"), {}, value("up.weight"), value("down.weight"), {}};
    return {value("up.weight"), value("up.bias"), {}, value("down.weight"), value("down.bias")};
  }

  /// The input of hidden unit j's activation, and the factor beside it in the gated form.
  double pre(const Weights& w, const Matrix<double>& x, Index t, Index j) const {
    double sum = gated_ ? 0 : w.first_bias(0, j);
    for (Index d = 0; d < width_; ++d) sum += x(t, d) * w.first(d, j);
    return sum;
  }
  double factor(const Weights& w, const Matrix<double>& x, Index t, Index j) const {
    if (!gated_) return 1;
    double sum = 0;
    for (Index d = 0; d < width_; ++d) sum += x(t, d) * w.linear(d, j);
    return sum;
  }

  std::vector<double> expert(Index e, const Matrix<double>& x, Index t) const {
    const Weights& w = weights_[detail::to_size(e)];
    std::vector<double> y(detail::to_size(width_), 0);
    for (Index d = 0; d < width_ && !gated_; ++d) y[detail::to_size(d)] = w.second_bias(0, d);
    for (Index j = 0; j < hidden_; ++j) {
      const double a = naive_activation(activation_, pre(w, x, t, j)) * factor(w, x, t, j);
      for (Index d = 0; d < width_; ++d) y[detail::to_size(d)] += a * w.second(j, d);
    }
    return y;
  }

  void expert_backward(Index e, const Matrix<double>& x, Index t, const std::vector<double>& dsum,
                       double weight, Matrix<double>& dx, Named& gradients) const {
    const Weights& w = weights_[detail::to_size(e)];
    Matrix<double>& dfirst = gradients[expert_name(e, gated_ ? "gate.weight" : "up.weight")];
    Matrix<double>& dup = gradients[expert_name(e, gated_ ? "up.weight" : "up.bias")];
    Matrix<double>& dsecond = gradients[expert_name(e, "down.weight")];
    for (Index d = 0; d < width_ && !gated_; ++d) {
      gradients[expert_name(e, "down.bias")](0, d) += weight * dsum[detail::to_size(d)];
    }
    for (Index j = 0; j < hidden_; ++j) {
      const double p = pre(w, x, t, j);
      const double l = factor(w, x, t, j);
      const double act = naive_activation(activation_, p);
      double da = 0;
      for (Index d = 0; d < width_; ++d) {
        const double dout = weight * dsum[detail::to_size(d)];
        dsecond(j, d) += dout * act * l;
        da += dout * w.second(j, d);
      }
      const double dpre = da * l * naive_derivative(activation_, p);
      if (!gated_) dup(0, j) += dpre;
      for (Index d = 0; d < width_; ++d) {
        dfirst(d, j) += x(t, d) * dpre;
        dx(t, d) += w.first(d, j) * dpre;
        if (gated_) {
          dup(d, j) += x(t, d) * da * act;
          dx(t, d) += w.linear(d, j) * da * act;
        }
      }
    }
  }

  Named parameters_;
  Index width_, experts_, active_;
  bool noise_;
  double noise_floor_, importance_weight_, load_weight_;
  Index hidden_;
  Activation activation_;
  bool gated_;
  Activation output_;
  std::uint64_t noise_seed_;
  std::vector<Weights> weights_;
};

}  // namespace moe::test
