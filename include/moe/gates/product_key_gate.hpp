#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "moe/gates/gate.hpp"
#include "moe/routing/noisy_top_k.hpp"

/// \file
/// A gate for very many experts. Each expert is a pair of a row key and a column key, so the scores
/// of few keys give those of many experts.
///
/// [L19] G. Lample, A. Sablayrolles, M. Ranzato, L. Denoyer, H. Jégou, "Large Memory Layers with
/// Product Keys", NeurIPS 2019 (arXiv 1907.05242).
/// [H24] X. O. He, "Mixture of A Million Experts", 2024 (arXiv 2407.04153).
/// [S17] is cited in balance_loss.hpp.

namespace moe {

/// Product keys [L19; H24] with the noise and the losses of noisy top-k gating [S17]. Expert (i, j) is
/// number i·b + j of E = a·b:
///
///     u = x·W_r + n_r ⊙ (softplus(x·V_r) + s0)   noisy scores of the row keys       T x a
///     v = x·W_c + n_c ⊙ (softplus(x·V_c) + s0)   noisy scores of the column keys    T x b
///     h_ij = u_i + v_j                           scores of the experts, T x E, never computed whole
///                                                (n_r and n_c standard normal, times Pass::noise_factor)
///     G = softmax of h over its K largest, 0 elsewhere
///     loss = w_importance·CV²(Importance) + w_load·[(1 + CV²(Loadrow))·(1 + CV²(Loadcolumn)) − 1]
///
/// In [L19] and [H24] a network makes a query of x, in several heads, and each kind of keys is
/// multiplied with one half of it; here both kinds are multiplied with x itself, and there is one head.
///
/// The K largest h are found exactly, among the pairs of the Kr = min(K, a) largest u and the
/// Kc = min(K, b) largest v. At least p·q − 1 other pairs score as high as the pair of the p-th largest
/// u and the q-th largest v, so the pairs with p·q <= K are enough. Ties go to the larger u, then
/// to the larger v, and of equal keys to the lower one.
///
/// Loadrow is the load of the row keys [S17 eq. 8-10]: the sum over tokens of the probability that a
/// key is among the Kr largest when its own noise is drawn again; Loadcolumn likewise. So the load
/// loss balances the keys among which pairs are chosen. The bracket is CV² of Loadrow_i·Loadcolumn_j
/// over all pairs. If K >= a, all row keys are candidates and their load has no gradient; columns
/// likewise. Importance [S17 eq. 6] is that of the experts. It also shows what the loads do not: keys
/// that are often candidates and never chosen, and few pairs chosen from balanced rows and columns.
/// tape.balance.load is always the count of the slots. Without noise, and in evaluation, its CV² is
/// the load loss, a constant.
///
/// All experts of a column share the weight vector of its key, all experts of a row likewise: 2·(a
/// + b)·D weights, those of the noise included, for a·b experts. Scores cost O(T·D·(a + b)), the
/// choice O(T·(a + b + K·log²K)). Importance, load and tokens by expert cost O(E) per pass: in
/// time, in memory of the tape, and in messages between processes that share a batch. All weights
/// are zero initially, as in NoisyTopKGate. A token's noise depends on no other token. With K = 1
/// the slots' weights are the constant 1, and the gate's only gradient is that of the load loss.
///
/// A token with NaN or infinity in x gets K experts like any other, but its weights and all losses
/// whose weight is not 0, except a load loss without gradient, are NaN.
///
/// It has the functions forward(), evaluate() and backward() of the concept Gate.
template <class Scalar_ = float>
class ProductKeyGate : public detail::GateBase<ProductKeyGate<Scalar_>, Scalar_> {
  using Base = detail::GateBase<ProductKeyGate<Scalar_>, Scalar_>;
  friend Base;

 public:
  using Scalar = typename Base::Scalar;                  ///< float or double
  static constexpr const char* name = "ProductKeyGate";  ///< in messages and files

  /// The configuration; the constructor checks it.
  struct Config {
    Index width = 0;        ///< D; 0 inside a layer's configuration stands for the layer's width
    Index row_keys = 0;     ///< a
    Index column_keys = 0;  ///< b
    Index top_k = 0;        ///< K, experts chosen for a token, 1 <= K <= a·b
    bool noise = true;  ///< false: scores are clean in training too, and the load has no gradient
    double noise_floor = 0.01;       ///< s0 > 0, of all keys
    double importance_weight = 0.1;  ///< w_importance >= 0
    double load_weight = 0.1;        ///< w_load >= 0

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("row_keys", self.row_keys);
      visit("column_keys", self.column_keys);
      visit("top_k", self.top_k);
      visit("noise", self.noise);
      visit("noise_floor", self.noise_floor);
      visit("importance_weight", self.importance_weight);
      visit("load_weight", self.load_weight);
    }
  };

  /// The weights of the gate's losses, see Config.
  using LossWeights = BalanceLossWeights;

  /// The scores of one kind of keys, N rows.
  struct Keys : detail::NoisyTopKTape<Scalar> {
    Routing<Scalar> routing;       ///< the Kr or Kc largest of each token
    IndexedVector<Index> place;    ///< S, the slot of `routing` with each slot's key
    Vector<Scalar> load;           ///< Loadrow (a) or Loadcolumn (b)
    Vector<Scalar> dload;          ///< the gradient w.r.t. the load
    IndexedVector<Scalar> dscore;  ///< the gradient w.r.t. the noisy scores in `routing`
  };

  /// What backward needs of the N valid tokens, and scratch.
  struct Tape : GateTape<Scalar> {
    LossWeights loss_weights;      ///< of the pass
    Keys rows;                     ///< of the row keys
    Keys columns;                  ///< of the column keys
    Vector<Scalar> dimportance;    ///< E
    IndexedVector<Scalar> dscore;  ///< S, the gradient w.r.t. G, then w.r.t. the chosen h

    /// Scratch of a worker.
    struct Scratch {
      std::vector<Scalar> score;  ///< of the candidate pairs of a token
      std::vector<Index> best;    ///< the K largest
    };
    IndexedVector<Scratch> scratch;  ///< one per worker
  };

  /// Throws std::invalid_argument for a configuration out of range. The seed is that of the noise.
  ProductKeyGate(const Config& config, std::uint64_t seed)
      : config_(checked(config)),
        rows_(keys_config(config, config.row_keys), derive_seed(seed, 0)),
        columns_(keys_config(config, config.column_keys), derive_seed(seed, 1)),
        pairs_(candidate_pairs(config)) {}

  /// The configuration as it is now.
  const Config& config() const { return config_; }
  Index experts() const { return config_.row_keys * config_.column_keys; }  ///< E = a·b

  /// The number of values of Pass::noise for a row of x: n of each row key, then of each column key; 0
  /// without Config.noise.
  Index noise_columns() const { return config_.noise ? config_.row_keys + config_.column_keys : 0; }

  /// The calls of a SharedBatch that a pass makes, for mpi::RankDispatch.
  detail::SharedCalls shared_calls(bool training, Index, Index) const {
    const Index keys = training && config_.noise ? config_.row_keys + config_.column_keys : 0;
    return detail::shared_calls({}, detail::balance_figures(experts()) + keys);
  }

  /// Changes the weights of the losses from the next pass on. Throws std::invalid_argument for one
  /// out of range.
  void set_loss_weights(const LossWeights& weights) {
    detail::set_balance_weights(name, weights, config_);
  }

  /// Adds, copies and removes row keys, see Gate: fresh ones are zero, as initially. Copies of W_r's
  /// columns get noise of this standard deviation. Returns where the parameters come from. Throws
  /// std::invalid_argument, with nothing changed, unless whole rows of column_keys experts are added,
  /// copied and removed and Config stays in range.
  std::vector<ParameterSource> change_experts(const ExpertSources& sources, std::uint64_t seed,
                                              double noise_stddev) {
    const ExpertSources rows =
        detail::sources_of_groups("ProductKeyGate::change_experts", sources, config_.column_keys);
    Config config = config_;
    config.row_keys = rows.experts();
    checked(config);
    std::vector<Pair> pairs = candidate_pairs(config);
    std::vector<ParameterSource> from{{0, rows.list()}, {1, rows.list()}, {2}, {3}};
    rows_.change_experts(rows, key_choices(config, config.row_keys), seed, noise_stddev);
    pairs_.swap(pairs);
    config_ = config;
    return from;
  }

  /// Throws std::invalid_argument unless the last pass on the tape was a forward() of a gate like this
  /// one, and the parameters have their original shapes.
  void check_tape(const Tape& tape) const {
    detail::require(tape.trained, "ProductKeyGate::backward without a forward pass on this tape");
    detail::require(tape.rows.clean.cols() == config_.row_keys &&
                        tape.columns.clean.cols() == config_.column_keys &&
                        tape.routing.slots() == tape.tokens.count * config_.top_k,
                    "ProductKeyGate::backward: the tape is another gate's, of ",
                    tape.rows.clean.cols(), " x ", tape.columns.clean.cols(), " keys and ",
                    tape.routing.slots(), " slots of ", tape.routing.tokens(), " tokens");
    detail::check_shapes(*this, "ProductKeyGate");
  }

  /// "rows.weight", "rows.noise_weight", "columns.weight", "columns.noise_weight".
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("rows", self.rows_);
    visit("columns", self.columns_);
  }

 private:
  using TopK = detail::NoisyTopK<Scalar>;

  /// The ranks of a row key and of a column key among the largest of a token.
  struct Pair {
    Index row;
    Index column;
  };

  static const Config& checked(const Config& config) {
    detail::check_at_least_one(name, "width", config.width);
    detail::check_at_least_one(name, "row_keys", config.row_keys);
    detail::check_at_least_one(name, "column_keys", config.column_keys);
    detail::check_product(name, "row_keys", config.row_keys, "column_keys", config.column_keys);
    detail::check_choice(name, "top_k", config.top_k, "row_keys * column_keys",
                         config.row_keys * config.column_keys);
    detail::check_noise_floor(name, config.noise_floor);
    detail::check_balance_weights(name, config);
    return config;
  }

  /// Kr or Kc: how many keys of a kind are candidates.
  static Index key_choices(const Config& config, Index keys) {
    return std::min(config.top_k, keys);
  }
  static typename TopK::Config keys_config(const Config& config, Index keys) {
    return {config.width, keys, key_choices(config, keys), config.noise, config.noise_floor};
  }
  Index row_choices() const { return key_choices(config_, config_.row_keys); }
  Index column_choices() const { return key_choices(config_, config_.column_keys); }

  /// The pairs of ranks with p·q <= K, sorted by p, then by q, so that of pairs with equal scores the first
  /// is chosen.
  static std::vector<Pair> candidate_pairs(const Config& config) {
    std::vector<Pair> pairs;
    for (Index p = 0; p < key_choices(config, config.row_keys); ++p) {
      const Index columns = key_choices(config, config.column_keys);
      for (Index q = 0; q < columns && (p + 1) * (q + 1) <= config.top_k; ++q) {
        pairs.push_back({p, q});
      }
    }
    return pairs;
  }

  void route(const MatrixRef<Scalar>& x, const Pass& pass, Tape& tape) const {
    route(x, config_.noise, detail::noise_source(pass, noise_columns()), pass.batch, tape);
  }
  void route(const MatrixRef<Scalar>& x, const EvaluationPass& pass, Tape& tape) const {
    route(x, false, {.key = {.step = 0}}, pass.batch, tape);
  }
  void route(const MatrixRef<Scalar>& x, bool has_noise, const detail::NoiseSource& noise,
             const SharedBatch* batch, Tape& tape) const {
    const auto score = [&](const TopK& top_k, const detail::NoiseSource& own, Keys& keys) {
      top_k.prepare(tape.tokens.count, has_noise, keys, keys.routing);
      top_k.forward(tape.tokens.rows_of(x), tape.tokens.row_list(), own, 0, keys, keys.routing);
    };
    detail::NoiseSource of_columns = noise;
    if (noise.given != nullptr) of_columns.given += config_.row_keys;
    score(rows_, noise, tape.rows);
    score(columns_, of_columns, tape.columns);
    choose(tape);
    detail::BatchSum sum(batch);
    if (has_noise) measure_key_loads(sum, tape);
    detail::measure_balance(tape.routing, tape.routing.expert, sum, tape.balance);
    tape.loss_weights = detail::balance_weights_of(config_);
    // With noise the load loss is that of the keys.
    const LossWeights of_experts{tape.loss_weights.importance,
                                 has_noise ? 0 : tape.loss_weights.load};
    detail::measure_balance_loss(of_experts, tape.loss_scale, tape.balance);
    if (has_noise) add_key_load_loss(tape);
    detail::insert_padding(tape.tokens, tape.routing);
  }

  /// The gradient of the loads includes the part that goes through their thresholds.
  void route_backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                      Matrix<Scalar>& dx) {
    detail::require_apart(name, "dweight", dweight, {tape.dscore});
    cv_squared_backward(tape.balance.importance,
                        static_cast<Scalar>(tape.loss_weights.importance * tape.loss_scale),
                        tape.dimportance);
    load_loss_backward(tape);
    pairs_backward(dweight, tape);
    const auto score_backward = [&](TopK& top_k, Keys& keys) {
      top_k.prepare_backward(keys);
      top_k.backward(tape.tokens.rows_of(x), 0, keys.dscore.data(), keys.dload.data(), keys,
                     keys.routing, tape.tokens.rows_of(dx));
    };
    score_backward(rows_, tape.rows);
    score_backward(columns_, tape.columns);
  }

  // The K largest pairs of keys, and the softmax over them.

  void choose(Tape& tape) const {
    const Index tokens = tape.tokens.count;
    const Index slots = tokens * config_.top_k;
    Routing<Scalar>& routing = tape.routing;
    routing.experts = experts();
    detail::resize(routing.token_offsets, tokens + 1);
    for (Index t = 0; t <= tokens; ++t) routing.token_offsets[t] = t * config_.top_k;
    detail::resize(routing.expert, slots);
    detail::resize(routing.weight, slots);
    detail::resize(tape.rows.place, slots);
    detail::resize(tape.columns.place, slots);
    if (static_cast<Index>(tape.scratch.size()) < worker_count()) {
      detail::resize(tape.scratch, worker_count());
    }
    for (auto& scratch : tape.scratch) {
      detail::resize(scratch.score, static_cast<Index>(pairs_.size()));
      detail::resize(scratch.best, config_.top_k);
    }
    constexpr Index block = 64;
    parallel_for((tokens + block - 1) / block,
                 function_work(tokens * static_cast<Index>(pairs_.size())),
                 [&](Index task, Index worker) {
                   for (Index t = task * block; t < std::min(tokens, (task + 1) * block); ++t) {
                     choose(t, tape.scratch[worker], tape);
                   }
                 });
  }

  void choose(Index t, typename Tape::Scratch& scratch, Tape& tape) const {
    const Scalar* u = rows_.scores(tape.rows, t);
    const Scalar* v = columns_.scores(tape.columns, t);
    const Index* best_rows = rows_.largest(tape.rows, t);
    const Index* best_columns = columns_.largest(tape.columns, t);
    for (std::size_t m = 0; m < pairs_.size(); ++m) {
      scratch.score[m] = u[best_rows[pairs_[m].row]] + v[best_columns[pairs_[m].column]];
    }
    select_largest(scratch.score.data(), static_cast<Index>(pairs_.size()), config_.top_k,
                   scratch.best.data());
    const Index first = t * config_.top_k;
    Index* expert = &tape.routing.expert[first];
    for (Index k = 0; k < config_.top_k; ++k) {
      const Pair& pair = pairs_[detail::to_size(scratch.best[detail::to_size(k)])];
      expert[k] = best_rows[pair.row] * config_.column_keys + best_columns[pair.column];
    }
    detail::sort_indices(expert, config_.top_k);

    const Scalar largest = scratch.score[detail::to_size(scratch.best[0])];
    Scalar* weight = &tape.routing.weight[first];
    Scalar total{0};
    for (Index k = 0; k < config_.top_k; ++k) {
      const Index row = expert[k] / config_.column_keys;
      const Index column = expert[k] % config_.column_keys;
      weight[k] = std::exp(u[row] + v[column] - largest);
      total += weight[k];
      tape.rows.place[first + k] =
          slot_of(row, t * row_choices(), row_choices(), tape.rows.routing);
      tape.columns.place[first + k] =
          slot_of(column, t * column_choices(), column_choices(), tape.columns.routing);
    }
    for (Index k = 0; k < config_.top_k; ++k) weight[k] /= total;
  }

  /// The place of a key among the `count` slots of a token, which begin with slot `first` and ascend.
  static Index slot_of(Index key, Index first, Index count, const Routing<Scalar>& routing) {
    const auto begin = routing.expert.begin() + first;
    return first + (std::lower_bound(begin, begin + count, key) - begin);
  }

  /// du_i = Σ_j dh_ij and dv_j = Σ_i dh_ij over the chosen pairs.
  void pairs_backward(std::span<const Scalar> dweight, Tape& tape) const {
    const Index slots = tape.routing.slots();
    detail::resize(tape.dscore, slots);
    for (Keys* keys : {&tape.rows, &tape.columns}) {
      detail::resize(keys->dscore, keys->routing.slots());
    }
    parallel_for_blocks(
        tape.tokens.count, 64, element_work(4 * slots), [&](Index first, Index count) {
          const Index begin = first * config_.top_k;
          const Index end = (first + count) * config_.top_k;
          for (Index slot = begin; slot < end; ++slot) {
            tape.dscore[slot] =
                dweight[detail::to_size(slot)] + tape.dimportance[tape.routing.expert[slot]];
          }
          detail::softmax_of_chosen_backward(tape.routing, config_.top_k, {first, count},
                                             tape.dscore);
          const auto add_to_keys = [&](Index choices, Keys& keys) {
            std::fill_n(&keys.dscore[first * choices], count * choices, Scalar{0});
            for (Index slot = begin; slot < end; ++slot) {
              keys.dscore[keys.place[slot]] += tape.dscore[slot];
            }
          };
          add_to_keys(row_choices(), tape.rows);
          add_to_keys(column_choices(), tape.columns);
        });
  }

  /// Loadrow and Loadcolumn, which are added to `sum`.
  void measure_key_loads(detail::BatchSum& sum, Tape& tape) const {
    const auto measure = [&](const TopK& top_k, Index count, Keys& keys) {
      detail::resize(keys.load, count);
      top_k.compute_load(0, tape.tokens.count, keys, keys.load.data());
      sum.add(keys.load.data(), count);
    };
    measure(rows_, config_.row_keys, tape.rows);
    measure(columns_, config_.column_keys, tape.columns);
  }

  static Scalar load_weight(const Tape& tape) {
    return static_cast<Scalar>(tape.loss_weights.load * tape.loss_scale);
  }

  /// w_load·[(1 + CV²(Loadrow))·(1 + CV²(Loadcolumn)) − 1].
  void add_key_load_loss(Tape& tape) const {
    GateLosses<Scalar>& losses = tape.balance.losses;
    if (load_weight(tape) > 0) {
      const Scalar row = cv_squared(tape.rows.load);
      const Scalar column = cv_squared(tape.columns.load);
      losses.load = load_weight(tape) * (row + column + row * column);
    }
    tape.balance.loss = losses.sum();
  }
  void load_loss_backward(Tape& tape) const {
    // 0 times a NaN load would be NaN.
    if (!tape.rows.has_noise || load_weight(tape) == 0) {
      detail::resize_to_zero(tape.rows.dload, config_.row_keys);
      detail::resize_to_zero(tape.columns.dload, config_.column_keys);
      return;
    }
    const auto backward = [&](const Vector<Scalar>& other, Keys& keys) {
      cv_squared_backward(keys.load, load_weight(tape) * (1 + cv_squared(other)), keys.dload);
    };
    backward(tape.columns.load, tape.rows);
    backward(tape.rows.load, tape.columns);
  }

  Config config_;
  TopK rows_;
  TopK columns_;
  std::vector<Pair> pairs_;  ///< see candidate_pairs()
};

}  // namespace moe
