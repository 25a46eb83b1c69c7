/// An expert of one's own, a linear map under a gate: y = (x·V) ⊙ σ(x·W). Its gradients are
/// checked against differences, then a mixture of such experts is trained.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <moe/moe.hpp>
#include <moe/testing/check_gradients.hpp>

#include "../common/clouds.hpp"

template <class Scalar_>
struct GatedLinear {
  using Scalar = Scalar_;
  using In = moe::ConstMatrixView<Scalar>;  // n x D, some of the tokens that the expert gets
  using Out = moe::MatrixView<Scalar>;
  struct Config {
    moe::Index width = 0;  ///< D; the layer fills it in
  };

  GatedLinear(const Config& config, std::uint64_t seed)
      : v(config.width, config.width), w(config.width, config.width) {
    const Scalar bound = 1 / std::sqrt(static_cast<Scalar>(config.width));
    moe::fill_uniform(v.value, bound, moe::derive_seed(seed, 0));
    moe::fill_uniform(w.value, bound, moe::derive_seed(seed, 1));
  }

  /// What forward saves for backward: x·V, then σ(x·W).
  moe::Index tape_width() const { return 2 * v.value.cols(); }
  void forward(In x, Out saved, Out y) const {
    const moe::Index D = x.cols();
    saved.leftCols(D) = x * v.value;
    saved.rightCols(D) = (1 + (-(x * w.value)).array().exp()).inverse();
    y = saved.leftCols(D).cwiseProduct(saved.rightCols(D));
  }
  void evaluate(In x, Out y) const {
    y = (x * v.value).array() / (1 + (-(x * w.value)).array().exp());
  }
  /// Adds to the gradients of V and W, where they are trained, and writes dx.
  void backward(In x, In saved, In dy, Out dx) {
    const moe::Index D = x.cols();
    const moe::Matrix<Scalar> s = saved.rightCols(D);
    const moe::Matrix<Scalar> du = dy.cwiseProduct(s);
    const moe::Matrix<Scalar> dz = du.array() * saved.leftCols(D).array() * (1 - s.array());
    if (v.trained) v.gradient() += x.transpose() * du;
    if (w.trained) w.gradient() += x.transpose() * dz;
    dx = du * v.value.transpose() + dz * w.value.transpose();
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("v", self.v), visit("w", self.w);
  }

  moe::Parameter<Scalar> v, w;
};

int main() {
  moe::MoELayer<moe::Expert<GatedLinear, double>> small(
      {.width = 3, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
  moe::Matrix<double> x(5, 3);
  moe::fill_normal(x, 1.0, 2);
  const moe::GradientCheck check = moe::check_layer_gradients(small, x, {.step = 1});
  std::printf("%s\n", check.text().c_str());

  moe::MoELayer<moe::Expert<GatedLinear>> layer(
      {.width = 8, .gate = {.experts = 8, .top_k = 2}, .seed = 3});
  const examples::Clouds clouds;
  examples::train(layer, clouds, 600);
  const double left = examples::unexplained(layer, clouds);
  std::printf("%.1f %% of the squares of new tokens are left unexplained\n", 100 * left);
  return check.error < 1e-7 && left < 0.1 ? 0 : 1;
}
