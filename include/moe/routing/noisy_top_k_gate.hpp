#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "moe/kernels/activations.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/routing/gate.hpp"
#include "moe/routing/select_largest.hpp"

/// \file
/// The gate of [S17]: linear scores with learned Gaussian noise, the K largest, a softmax over
/// them.

namespace moe {

/// Noisy top-k gating [S17 eq. 2-5] with the importance and load losses [S17 eq. 6-11].
///
///     c = x·W_g                       clean scores                     T x E
///     s = softplus(x·W_noise) + s0    scale of the noise               T x E
///     h = c + n ⊙ s                   n standard normal, keyed by (seed, step, token, expert)
///     G = softmax of h over its K largest, 0 elsewhere
///
/// Both weight matrices start at zero [S17 App. A], so training starts in balance. With K = 1 the
/// softmax is the constant 1 and the gate learns from the load loss only. With K = E every expert
/// is always chosen and the load carries no gradient. A token with NaN or infinity in x gets K
/// experts like any other, and weights that are NaN; then the losses are NaN too.
template <class Scalar_ = float>
class NoisyTopKGate {
 public:
  using Scalar = Scalar_;

  struct Config {
    Index width = 0;    ///< D; 0 inside a layer's configuration stands for the layer's width
    Index experts = 0;  ///< E
    Index active = 0;   ///< K, experts chosen for a token, 1 <= K <= E
    bool noise = true;  ///< false: scores are clean in training too, and the load has no gradient
    double noise_floor = 0.01;       ///< s0 > 0
    double importance_weight = 0.1;  ///< w_importance >= 0
    double load_weight = 0.1;        ///< w_load >= 0
  };

  struct Tape : GateTape<Scalar> {
    Matrix<Scalar> clean;        ///< c, T x E
    Matrix<Scalar> raw;          ///< x·W_noise, T x E
    Matrix<Scalar> scale;        ///< s, T x E
    Matrix<Scalar> noise;        ///< n, T x E
    Matrix<Scalar> noisy;        ///< h, T x E
    Matrix<Scalar> probability;  ///< P, T x E

    /// The experts with the K-th and (K+1)-th largest h of each token: the thresholds that an
    /// expert outside and inside the top has to pass.
    std::vector<Index> last_inside;
    std::vector<Index> first_outside;

    Matrix<Scalar> dclean;
    Matrix<Scalar> draw;
    Vector<Scalar> dimportance;
    Vector<Scalar> dload;
    std::vector<std::vector<Index>> best;  ///< K + 1 indices a worker
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is the noise's.
  explicit NoisyTopKGate(const Config& config, std::uint64_t seed = 0)
      : config_(checked(config)),
        seed_(seed),
        weight_(config.width, config.experts),
        noise_weight_(config.width, config.experts) {}

  const Config& config() const { return config_; }
  Index experts() const { return config_.experts; }

  /// Training pass over x (T x D). Give every update its own key.step: the same key draws the same
  /// noise. Throws std::invalid_argument when x is not D wide. O(T·D·E).
  const Routing<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape,
                                 const NoiseKey& key = {}) const {
    check_width(x);
    tape.trained = false;
    detail::copy_matrix(x, tape.x);
    compute_scores(x, tape, config_.noise);
    if (config_.noise) {
      add_noise(tape, key);
      choose(tape.noisy, tape);
      compute_load(tape);
    } else {
      choose(tape.clean, tape);
      detail::count_load(tape.routing, tape.balance);
    }
    compute_losses(tape);
    tape.trained = true;
    return tape.routing;
  }

  /// Routing without noise, and its balance, the load being the count. Leaves nothing that
  /// backward() could use.
  const Routing<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    check_width(x);
    tape.trained = false;
    compute_scores(x, tape, false);
    choose(tape.clean, tape);
    detail::count_load(tape.routing, tape.balance);
    compute_losses(tape);
    return tape.routing;
  }
  Routing<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    return evaluate(x, tape);
  }

  /// Takes dweight, the gradient of the loss by the weight of each slot (S), and adds the balance
  /// losses' share once. Adds to the gradients of W_g and W_noise; returns the gradient of x
  /// (T x D), which is tape.dx. At fixed noise and choice this is the exact derivative, that of the
  /// load through its threshold included. Throws std::invalid_argument when dweight does not
  /// belong to the tape.
  const Matrix<Scalar>& backward(std::span<const Scalar> dweight, Tape& tape) {
    detail::require(tape.trained, "NoisyTopKGate::backward without a forward pass on this tape");
    detail::require(tape.x.cols() == config_.width && tape.clean.cols() == experts() &&
                        tape.routing.slots() == tape.x.rows() * config_.active,
                    "NoisyTopKGate::backward: the tape is another gate's, of width ", tape.x.cols(),
                    " and ", tape.clean.cols(), " experts");
    detail::require(static_cast<Index>(dweight.size()) == tape.routing.slots(), "dweight has ",
                    dweight.size(), " entries for ", tape.routing.slots(), " slots");
    compute_losses_backward(tape);
    tape.dclean.resize(tape.clean.rows(), experts());
    tape.draw.resize(tape.clean.rows(), experts());
    parallel_for_blocks(tape.clean.rows(), block, [&](Index first, Index count) {
      for (Index t = first; t < first + count; ++t) {
        if (load_has_gradient()) {
          compute_load_backward(tape, t);
        } else {
          std::fill_n(detail::row_data(tape.dclean, t), experts(), Scalar{0});
          std::fill_n(detail::row_data(tape.draw, t), experts(), Scalar{0});
        }
        choose_backward(dweight, tape, t);
        if (config_.noise) scale_backward(tape, t);
      }
    });
    compute_scores_backward(tape);
    return tape.dx;
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight_);
    visit("noise_weight", self.noise_weight_);
  }

 private:
  static constexpr Index block = 64;  ///< tokens in a task

  static const Config& checked(const Config& config) {
    using detail::require;
    require(config.width >= 1, "NoisyTopKGate::Config.width = ", config.width,
            ", must be at least 1");
    require(config.experts >= 1, "NoisyTopKGate::Config.experts = ", config.experts,
            ", must be at least 1");
    require(config.active >= 1 && config.active <= config.experts,
            "NoisyTopKGate::Config.active = ", config.active,
            ", must be from 1 to experts = ", config.experts);
    require(std::isfinite(config.noise_floor) && config.noise_floor > 0,
            "NoisyTopKGate::Config.noise_floor = ", config.noise_floor,
            ", must be finite and above 0");
    require(std::isfinite(config.importance_weight) && config.importance_weight >= 0,
            "NoisyTopKGate::Config.importance_weight = ", config.importance_weight,
            ", must be finite and at least 0");
    require(std::isfinite(config.load_weight) && config.load_weight >= 0,
            "NoisyTopKGate::Config.load_weight = ", config.load_weight,
            ", must be finite and at least 0");
    return config;
  }

  void check_width(const MatrixRef<Scalar>& x) const {
    detail::require(x.cols() == config_.width, "NoisyTopKGate: x has ", x.cols(),
                    " columns, Config.width = ", config_.width);
  }

  bool load_has_gradient() const { return config_.noise && config_.active < config_.experts; }

  // c = x·W_g and x·W_noise.

  void compute_scores(const MatrixRef<Scalar>& x, Tape& tape, bool with_noise) const {
    const GatheredRows<Scalar> rows(x);
    tape.clean.resize(x.rows(), experts());
    detail::product_nn(rows, view(weight_.value), view(tape.clean));
    if (with_noise) {
      tape.raw.resize(x.rows(), experts());
      detail::product_nn(rows, view(noise_weight_.value), view(tape.raw));
    }
  }

  void compute_scores_backward(Tape& tape) {
    using detail::Start;
    const GatheredRows<Scalar> x(tape.x);
    const GatheredRows<Scalar> dclean(tape.dclean);
    tape.dx.resize(tape.x.rows(), tape.x.cols());
    detail::product_nt(dclean, view(std::as_const(weight_.value)), view(tape.dx));
    detail::product_tn(x, dclean, view(weight_.gradient));
    if (config_.noise) {
      const GatheredRows<Scalar> draw(tape.draw);
      detail::product_nt(draw, view(std::as_const(noise_weight_.value)), view(tape.dx),
                         Start::accumulate);
      detail::product_tn(x, draw, view(noise_weight_.gradient));
    }
  }

  // h = c + n ⊙ s with s = softplus(x·W_noise) + s0 [S17 eq. 4].

  void add_noise(Tape& tape, const NoiseKey& key) const {
    const Index tokens = tape.clean.rows();
    tape.scale.resize(tokens, experts());
    tape.noise.resize(tokens, experts());
    tape.noisy.resize(tokens, experts());
    const auto floor = detail::broadcast(static_cast<Scalar>(config_.noise_floor));
    parallel_for_blocks(tokens, block, [&](Index first, Index count) {
      using P = detail::Packet<Scalar>;
      for (Index t = first; t < first + count; ++t) {
        Scalar* noise = detail::row_data(tape.noise, t);
        detail::fill_noise_row(seed_, key, t, experts(), noise);
        detail::map(
            experts(), detail::row_data(tape.scale, t),
            [&](const P& raw) {
              return Eigen::internal::padd(detail::softplus<Scalar>(raw), floor);
            },
            detail::row_data(tape.raw, t));
        detail::map(
            experts(), detail::row_data(tape.noisy, t),
            [](const P& clean, const P& n, const P& scale) {
              return Eigen::internal::pmadd(n, scale, clean);
            },
            detail::row_data(tape.clean, t), noise, detail::row_data(tape.scale, t));
      }
    });
  }

  /// Turns tape.draw from ∂L/∂s into ∂L/∂(x·W_noise) for token t.
  void scale_backward(Tape& tape, Index t) const {
    using P = detail::Packet<Scalar>;
    detail::map(
        experts(), detail::row_data(tape.draw, t),
        [](const P& ds, const P& raw) {
          return Eigen::internal::pmul(ds, detail::sigmoid<Scalar>(raw));
        },
        detail::row_data(tape.draw, t), detail::row_data(tape.raw, t));
  }

  // The K largest and the softmax over them [S17 eq. 3 and 5].

  void choose(const Matrix<Scalar>& scores, Tape& tape) const {
    const Index tokens = scores.rows();
    const Index active = config_.active;
    Routing<Scalar>& routing = tape.routing;
    routing.experts = experts();
    detail::resize(routing.token_offsets, tokens + 1);
    for (Index t = 0; t <= tokens; ++t) routing.token_offsets[detail::to_size(t)] = t * active;
    detail::resize(routing.expert, tokens * active);
    detail::resize(routing.weight, tokens * active);
    detail::resize(tape.last_inside, tokens);
    detail::resize(tape.first_outside, tokens);
    const Index candidates = std::min(active + 1, experts());
    if (static_cast<Index>(tape.best.size()) < worker_count()) {
      detail::resize(tape.best, worker_count());
    }
    for (auto& best : tape.best) detail::resize(best, candidates);

    parallel_for((tokens + block - 1) / block, [&](Index task, Index worker) {
      Index* best = tape.best[detail::to_size(worker)].data();
      for (Index t = task * block; t < std::min(tokens, (task + 1) * block); ++t) {
        const Scalar* h = detail::row_data(scores, t);
        detail::select_largest(h, experts(), candidates, best);
        tape.last_inside[detail::to_size(t)] = best[active - 1];
        tape.first_outside[detail::to_size(t)] = best[candidates - 1];

        Index* chosen = &routing.expert[detail::to_size(t * active)];
        Scalar* weight = &routing.weight[detail::to_size(t * active)];
        const Scalar largest = h[best[0]];
        std::sort(best, best + active);
        Scalar total{0};
        for (Index k = 0; k < active; ++k) {
          chosen[k] = best[k];
          weight[k] = std::exp(h[best[k]] - largest);
          total += weight[k];
        }
        for (Index k = 0; k < active; ++k) weight[k] /= total;
      }
    });
  }

  /// dh = G ⊙ (g − Σ_i G_i·g_i) on the chosen, g being combine's share and importance's; then
  /// dc = dh and ds = n ⊙ dh.
  void choose_backward(std::span<const Scalar> dweight, Tape& tape, Index t) const {
    const Routing<Scalar>& routing = tape.routing;
    const Index first = t * config_.active;
    const auto g = [&](Index k) {
      const std::size_t slot = detail::to_size(first + k);
      return dweight[slot] + tape.dimportance[routing.expert[slot]];
    };
    Scalar mean{0};
    for (Index k = 0; k < config_.active; ++k) {
      mean += routing.weight[detail::to_size(first + k)] * g(k);
    }
    for (Index k = 0; k < config_.active; ++k) {
      const std::size_t slot = detail::to_size(first + k);
      const Index i = routing.expert[slot];
      const Scalar dh = routing.weight[slot] * (g(k) - mean);
      tape.dclean(t, i) += dh;
      if (config_.noise) tape.draw(t, i) += tape.noise(t, i) * dh;
    }
  }

  // Load [S17 eq. 8-10]: P(x, i) = Φ(z) with z = (c_i − kth_excluding(h, K, i)) / s_i is the
  // probability that i is among the top when its own noise is drawn again. The threshold is the
  // K-th largest h for an expert outside the top, the (K+1)-th for one inside; a whole row is
  // computed as if outside, and then the K chosen ones again.

  void compute_load(Tape& tape) const {
    if (!load_has_gradient()) {
      detail::count_load(tape.routing, tape.balance);  // K = E: P = 1 for every expert
      return;
    }
    const Index tokens = tape.clean.rows();
    tape.probability.resize(tokens, experts());
    parallel_for_blocks(tokens, block, [&](Index first, Index count) {
      using P = detail::Packet<Scalar>;
      for (Index t = first; t < first + count; ++t) {
        const P threshold = detail::broadcast(tape.noisy(t, tape.last_inside[detail::to_size(t)]));
        detail::map(
            experts(), detail::row_data(tape.probability, t),
            [&](const P& clean, const P& scale) {
              using namespace Eigen::internal;
              return detail::normal_cdf<Scalar>(pdiv(psub(clean, threshold), scale));
            },
            detail::row_data(tape.clean, t), detail::row_data(tape.scale, t));
        for_each_chosen(tape, t, [&](Index i) {
          const P z = detail::broadcast(z_inside(tape, t, i));
          tape.probability(t, i) = Eigen::internal::pfirst(detail::normal_cdf<Scalar>(z));
        });
      }
    });
    detail::resize_to_zero(tape.balance.load, experts());
    for (Index t = 0; t < tokens; ++t) {
      detail::add_scaled(experts(), Scalar{1}, detail::row_data(tape.probability, t),
                         tape.balance.load.data());
    }
  }

  /// With l = ∂L/∂Load, j the expert whose h is the threshold and φ the normal density:
  /// ∂P/∂c_i = φ(z)/s_i, ∂P/∂s_i = −φ(z)·z/s_i, ∂P/∂h_j = −φ(z)/s_i, and h_j = c_j + n_j·s_j passes
  /// on to c_j and s_j. Overwrites the rows of token t.
  void compute_load_backward(Tape& tape, Index t) const {
    using P = detail::Packet<Scalar>;
    using namespace Eigen::internal;
    const Index inside = tape.last_inside[detail::to_size(t)];
    const Index outside = tape.first_outside[detail::to_size(t)];
    Scalar* dclean = detail::row_data(tape.dclean, t);
    Scalar* draw = detail::row_data(tape.draw, t);
    const Scalar* clean = detail::row_data(tape.clean, t);
    const Scalar* scale = detail::row_data(tape.scale, t);

    const P threshold = detail::broadcast(tape.noisy(t, inside));
    detail::map(
        experts(), dclean,
        [&](const P& c, const P& s, const P& l) {
          const P z = pdiv(psub(c, threshold), s);
          return pdiv(pmul(l, detail::normal_density<Scalar>(z)), s);
        },
        clean, scale, tape.dload.data());
    for_each_chosen(tape, t, [&](Index i) { dclean[i] = Scalar{0}; });
    detail::map(
        experts(), draw,
        [&](const P& d, const P& c, const P& s) { return pmul(d, pdiv(psub(threshold, c), s)); },
        dclean, clean, scale);
    const Scalar from_outside = detail::sum(experts(), dclean);

    Scalar from_inside{0};
    for_each_chosen(tape, t, [&](Index i) {
      const Scalar z = z_inside(tape, t, i);
      const Scalar density = pfirst(detail::normal_density<Scalar>(detail::broadcast(z)));
      dclean[i] = tape.dload[i] * density / scale[i];
      draw[i] = -dclean[i] * z;
      from_inside += dclean[i];
    });
    dclean[inside] -= from_outside;
    draw[inside] -= from_outside * tape.noise(t, inside);
    dclean[outside] -= from_inside;
    draw[outside] -= from_inside * tape.noise(t, outside);
  }

  template <class F>
  void for_each_chosen(const Tape& tape, Index t, F&& f) const {
    for (Index k = 0; k < config_.active; ++k) {
      f(tape.routing.expert[detail::to_size(t * config_.active + k)]);
    }
  }

  /// z of an expert inside the top.
  static Scalar z_inside(const Tape& tape, Index t, Index i) {
    const Index j = tape.first_outside[detail::to_size(t)];
    return (tape.clean(t, i) - tape.noisy(t, j)) / tape.scale(t, i);
  }

  // Importance [S17 eq. 6] and the two losses [S17 eq. 7 and 11].

  void compute_losses(Tape& tape) const {
    Balance<Scalar>& balance = tape.balance;
    detail::measure_importance(tape.routing, balance);
    balance.loss = static_cast<Scalar>(config_.importance_weight) * cv_squared(balance.importance) +
                   static_cast<Scalar>(config_.load_weight) * cv_squared(balance.load);
  }

  void compute_losses_backward(Tape& tape) const {
    cv_squared_backward(tape.balance.importance, static_cast<Scalar>(config_.importance_weight),
                        tape.dimportance);
    cv_squared_backward(tape.balance.load, static_cast<Scalar>(config_.load_weight), tape.dload);
  }

  Config config_;
  std::uint64_t seed_;
  Parameter<Scalar> weight_;        ///< W_g, D x E
  Parameter<Scalar> noise_weight_;  ///< W_noise, D x E
};

}  // namespace moe
