#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "moe/experts/expert_change.hpp"
#include "moe/kernels/activations.hpp"
#include "moe/kernels/column_sums.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/kernels/math.hpp"
#include "moe/parallel.hpp"
#include "moe/parameter.hpp"
#include "moe/random.hpp"
#include "moe/routing/linear_scores.hpp"
#include "moe/routing/load_probability.hpp"
#include "moe/routing/pass.hpp"
#include "moe/routing/routing.hpp"
#include "moe/routing/select_largest.hpp"

/// \file
/// Noisy top-k scores [S17 eq. 2-5 and 8-10]: linear scores with learned Gaussian noise, the K largest,
/// a softmax over them, the probability of being among them, and the backward of all of it. The losses
/// of importance and load are computed by the gates.

namespace moe::detail {

/// `gate` names the class in the message.
inline void check_noise_floor(const char* gate, double noise_floor) {
  require(std::isfinite(noise_floor) && noise_floor > 0, gate,
          "::Config.noise_floor = ", noise_floor, ", must be finite and above 0");
}

/// Turns the gradient with respect to G, one number per slot, into that with respect to the chosen
/// h: dh = G ⊙ (g − Σ_i G_i·g_i) for the K slots of each of these tokens.
template <class Scalar>
void softmax_of_chosen_backward(const Routing<Scalar>& routing, Index top_k, Range tokens,
                                IndexedVector<Scalar>& gradient) {
  for (Index t = tokens.first; t < tokens.first + tokens.count; ++t) {
    const Scalar* weight = &routing.weight[t * top_k];
    Scalar* g = &gradient[t * top_k];
    Scalar mean{0};
    for (Index k = 0; k < top_k; ++k) mean += weight[k] * g[k];
    for (Index k = 0; k < top_k; ++k) g[k] = weight[k] * (g[k] - mean);
  }
}
/// The same for all tokens.
template <class Scalar>
void softmax_of_chosen_backward(const Routing<Scalar>& routing, Index top_k,
                                IndexedVector<Scalar>& gradient) {
  parallel_for_blocks(routing.slots() / top_k, 64, element_work(2 * routing.slots()),
                      [&](Index first, Index count) {
                        softmax_of_chosen_backward(routing, top_k, {first, count}, gradient);
                      });
}

/// The weights W_g and W_noise, both zero initially, and the passes of rows of x through them:
///
///     c = x·W_g                       clean scores                     N x E
///     s = softplus(x·W_noise) + s0    scale of the noise               N x E
///     h = c + n ⊙ s                   n standard normal, keyed by (seed, step, token, expert), times
///                                     Pass::noise_factor
///     G = softmax of h over its K largest, 0 elsewhere
///
/// Calls for different rows of a tape may run at once; backward calls only if they are of different
/// objects, since they add to the gradients.
template <class Scalar>
class NoisyTopK {
 public:
  using Tape = NoisyTopKTape<Scalar>;

  struct Config {
    Index width = 0;    ///< D
    Index experts = 0;  ///< E
    Index top_k = 0;    ///< K
    bool noise = true;
    double noise_floor = 0.01;  ///< s0
  };

  NoisyTopK(const Config& config, std::uint64_t seed)
      : config_(config),
        seed_(seed),
        weight_(config.width, config.experts),
        noise_weight_(config.width, config.experts) {}

  /// Makes room for N rows, which are the tokens of the routing.
  void prepare(Index rows, bool has_noise, Tape& tape, Routing<Scalar>& routing) const {
    tape.has_noise = has_noise;
    resize(tape.clean, rows, experts());
    if (has_noise) {
      for (Matrix<Scalar>* matrix : {&tape.raw, &tape.scale, &tape.noise, &tape.noisy}) {
        resize(*matrix, rows, experts());
      }
      if (load_has_gradient(tape)) resize(tape.probability, rows, experts());
    }
    resize(tape.best, rows * candidates());
    routing.experts = experts();
    resize(routing.token_offsets, rows + 1);
    for (Index row = 0; row <= rows; ++row) {
      routing.token_offsets[row] = row * config_.top_k;
    }
    resize(routing.expert, rows * config_.top_k);
    resize(routing.weight, rows * config_.top_k);
  }

  /// Fills rows first, first + 1, ... of the tape, and their slots of the routing, from x. The noise of
  /// row first + i is keyed by token[i], or by the row if `token` is null.
  void forward(const GatheredRows<Scalar>& x, const Index* token, const NoiseSource& noise,
               Index first, Tape& tape, Routing<Scalar>& routing) const {
    for_each_batch(x.count(), [&](Index begin, Index count) {
      const Index* keys = token != nullptr ? token + begin : nullptr;
      forward_batch(x.slice(begin, count), keys, noise, {first + begin, count}, tape, routing);
    });
  }

  /// load (E) = Σ P over `count` rows of a pass with noise [S17 eq. 10]. With K = E, where P = 1, it
  /// is the count of the rows and has no gradient.
  void compute_load(Index first, Index count, const Tape& tape, Scalar* load) const {
    MOE_ASSERT(tape.has_noise);
    if (!load_has_gradient(tape)) {
      std::fill_n(load, experts(), static_cast<Scalar>(count));
      return;
    }
    std::fill_n(load, experts(), Scalar{0});
    add_many_scaled_rows(GatheredRows<Scalar>(tape.probability).slice(first, count), {}, load);
  }

  /// Makes room for backward, of all rows.
  void prepare_backward(Tape& tape) const {
    resize(tape.dclean, tape.clean.rows(), experts());
    if (tape.has_noise) resize(tape.draw, tape.clean.rows(), experts());
  }

  /// Takes dscore (S of the whole routing), the gradient with respect to the chosen h, and dload (E), the
  /// gradient with respect to the load of these rows. Adds to the gradients of the weights and to dx
  /// (rows x D). At fixed noise and choice this is the exact derivative; that of the load includes its
  /// thresholds.
  void backward(const GatheredRows<Scalar>& x, Index first, const Scalar* dscore,
                const Scalar* dload, Tape& tape, const Routing<Scalar>& routing,
                const ScatteredRows<Scalar>& dx) {
    for_each_batch(x.count(), [&](Index begin, Index count) {
      backward_batch(x.slice(begin, count), {first + begin, count}, dscore, dload, tape, routing,
                     dx.slice(begin, count));
    });
    // The parameters count as used, though their gradient is zero.
    if (!tape.has_noise) accumulate(noise_weight_);
  }

  /// Whether dload has any effect.
  bool load_has_gradient(const Tape& tape) const {
    return tape.has_noise && config_.top_k < experts();
  }

  /// The E scores h of a row.
  const Scalar* scores(const Tape& tape, Index row) const {
    return row_data(tape.has_noise ? tape.noisy : tape.clean, row);
  }
  /// The experts with the min(K + 1, E) largest h of a row, the largest first.
  const Index* largest(const Tape& tape, Index row) const {
    return tape.best.data() + row * candidates();
  }

  /// Adds, copies and removes columns, as `sources` lists them; `top_k` is the new K. Fresh columns are
  /// zero, as initially. Copies of W_g's columns get noise.
  void change_experts(const ExpertSources& sources, Index top_k, std::uint64_t seed,
                      double noise_stddev) {
    change_columns(sources, weight_, {}, noise_stddev, seed);
    change_columns(sources, noise_weight_);
    config_.experts = sources.experts();
    config_.top_k = top_k;
  }
  /// Copies the weights of another NoisyTopK of the same shape. The seed of the noise does not
  /// change, since it belongs to the gate's place among the secondary gates.
  void take_weights(const NoisyTopK& other) {
    weight_ = other.weight_;
    noise_weight_ = other.noise_weight_;
  }
  /// Adds noise to W_g.
  void add_noise(double stddev, std::uint64_t seed) { add_normal(weight_.value, stddev, seed); }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight_);
    visit("noise_weight", self.noise_weight_);
  }

 private:
  Index experts() const { return config_.experts; }
  /// Rows of a task, so that their part of the tape stays in L1 and L2.
  Index block_rows() const { return std::clamp<Index>(4096 / experts(), 1, 64); }
  /// Noise and probabilities evaluate several functions for each score.
  Work work_of(Range rows, const Tape& tape) const {
    return tape.has_noise ? function_work(3 * scores_of(rows)) : element_work(scores_of(rows));
  }
  /// The number of scores of some rows, which are contiguous.
  Index scores_of(Range rows) const { return rows.count * experts(); }
  template <class F>
  static void for_each_row(Range rows, F&& f) {
    for (Index row = rows.first; row < rows.first + rows.count; ++row) f(row);
  }
  Index candidates() const { return std::min(config_.top_k + 1, experts()); }
  LoadProbability<Scalar> load_probability() const { return {experts(), config_.top_k}; }

  /// Calls f(first, count) for some rows at a time, at least once even without rows. f computes all steps of
  /// these rows, so that each step finds the results of the one before in the cache.
  static void for_each_batch(Index rows, FunctionRef<void(Index, Index)> f) {
    const Index most = worker_count() * task_rows;
    Index first = 0;
    do {
      f(first, std::min(most, rows - first));
      first += most;
    } while (first < rows);
  }

  void forward_batch(const GatheredRows<Scalar>& x, const Index* token, const NoiseSource& noise,
                     Range batch, Tape& tape, Routing<Scalar>& routing) const {
    compute_scores(x, batch, tape);
    parallel_for_blocks(batch.count, block_rows(), work_of(batch, tape),
                        [&](Index begin, Index count) {
                          const Range rows{batch.first + begin, count};
                          const auto token_of = [&](Index i) {
                            return token != nullptr ? token[begin + i] : rows.first + i;
                          };
                          if (tape.has_noise) add_noise(noise, token_of, rows, tape);
                          for_each_row(rows, [&](Index row) { choose(row, tape, routing); });
                          if (load_has_gradient(tape))
                            load_probability().forward(rows, routing, tape);
                        });
  }
  void backward_batch(const GatheredRows<Scalar>& x, Range batch, const Scalar* dscore,
                      const Scalar* dload, Tape& tape, const Routing<Scalar>& routing,
                      const ScatteredRows<Scalar>& dx) {
    parallel_for_blocks(
        batch.count, block_rows(), work_of(batch, tape), [&](Index begin, Index count) {
          const Range rows{batch.first + begin, count};
          if (load_has_gradient(tape)) {
            load_probability().backward(rows, dload, routing, tape);
          } else {
            std::fill_n(row_data(tape.dclean, rows.first), scores_of(rows), Scalar{0});
            if (tape.has_noise) {
              std::fill_n(row_data(tape.draw, rows.first), scores_of(rows), Scalar{0});
            }
          }
          for_each_row(rows, [&](Index row) { add_score_gradients(row, dscore, routing, tape); });
          if (tape.has_noise) scale_backward(rows, tape);
        });
    compute_scores_backward(x, batch, tape, dx);
  }

  // c = x·W_g and x·W_noise.

  void compute_scores(const GatheredRows<Scalar>& x, Range rows, Tape& tape) const {
    gemm(GemmNN<Scalar>{
        .a = x, .b = weight_.value, .c = rows_of(tape.clean, rows.first, rows.count)});
    if (tape.has_noise) {
      gemm(GemmNN<Scalar>{
          .a = x, .b = noise_weight_.value, .c = rows_of(tape.raw, rows.first, rows.count)});
    }
  }

  void compute_scores_backward(const GatheredRows<Scalar>& x, Range rows, Tape& tape,
                               const ScatteredRows<Scalar>& dx) {
    linear_scores_backward(x, rows_of(tape.dclean, rows.first, rows.count), weight_, dx);
    if (tape.has_noise) {
      linear_scores_backward(x, rows_of(tape.draw, rows.first, rows.count), noise_weight_, dx);
    }
  }

  // h = c + n ⊙ s with s = softplus(x·W_noise) + s0 [S17 eq. 4].

  void add_noise(const NoiseSource& source, FunctionRef<Index(Index)> token_of, Range rows,
                 Tape& tape) const {
    using P = Packet<Scalar>;
    const P floor = broadcast(static_cast<Scalar>(config_.noise_floor));
    const Scalar* clean = row_data(tape.clean, rows.first);
    const Scalar* raw = row_data(tape.raw, rows.first);
    Scalar* noise = row_data(tape.noise, rows.first);
    Scalar* scale = row_data(tape.scale, rows.first);
    Scalar* noisy = row_data(tape.noisy, rows.first);
    if (source.factor == 0) {
      std::fill_n(noise, scores_of(rows), Scalar{0});
    } else if (source.given == nullptr) {
      fill_noise(seed_, source.key, rows.count, experts(), token_of, noise);
    } else {
      for (Index row = 0; row < rows.count; ++row) {
        const double* given = source.given + token_of(row) * source.stride;
        for (Index i = 0; i < experts(); ++i) {
          noise[row * experts() + i] = static_cast<Scalar>(given[i]);
        }
      }
    }
    if (source.factor != 1) {
      const P factor = broadcast(static_cast<Scalar>(source.factor));
      map(
          scores_of(rows), noise, [&](const P& n) { return Eigen::internal::pmul(n, factor); },
          noise);
    }
    for_each_packet<Scalar>(scores_of(rows), [&](const PacketSpan& at) {
      const P s = Eigen::internal::padd(softplus<Scalar>(at.load(raw)), floor);
      at.store(scale, s);
      at.store(noisy, Eigen::internal::pmadd(at.load(noise), s, at.load(clean)));
    });
  }

  /// Turns rows of tape.draw from ∂L/∂s into ∂L/∂(x·W_noise).
  void scale_backward(Range rows, Tape& tape) const {
    using P = Packet<Scalar>;
    map(
        scores_of(rows), row_data(tape.draw, rows.first),
        [](const P& ds, const P& raw) { return Eigen::internal::pmul(ds, sigmoid<Scalar>(raw)); },
        row_data(tape.draw, rows.first), row_data(tape.raw, rows.first));
  }

  // The K largest and the softmax over them [S17 eq. 3 and 5].

  void choose(Index row, Tape& tape, Routing<Scalar>& routing) const {
    const Index top_k = config_.top_k;
    const Scalar* h = scores(tape, row);
    Index* best = tape.best.data() + row * candidates();
    select_largest(h, experts(), candidates(), best);

    Index* chosen = &routing.expert[row * top_k];
    Scalar* weight = &routing.weight[row * top_k];
    std::copy_n(best, top_k, chosen);
    sort_indices(chosen, top_k);
    Scalar total{0};
    for (Index k = 0; k < top_k; ++k) {
      weight[k] = std::exp(h[chosen[k]] - h[best[0]]);
      total += weight[k];
    }
    for (Index k = 0; k < top_k; ++k) weight[k] /= total;
  }

  /// With dh the gradient with respect to the chosen h: dc += dh and ds += n ⊙ dh.
  void add_score_gradients(Index row, const Scalar* dscore, const Routing<Scalar>& routing,
                           Tape& tape) const {
    for (Index slot = row * config_.top_k; slot < (row + 1) * config_.top_k; ++slot) {
      const Index i = routing.expert[slot];
      tape.dclean(row, i) += dscore[slot];
      if (tape.has_noise) tape.draw(row, i) += tape.noise(row, i) * dscore[slot];
    }
  }

  Config config_;
  std::uint64_t seed_;
  Parameter<Scalar> weight_;        ///< W_g, D x E
  Parameter<Scalar> noise_weight_;  ///< W_noise, D x E
};

}  // namespace moe::detail
