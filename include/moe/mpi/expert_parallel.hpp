#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/config_fields.hpp"
#include "moe/layer/expert_pass.hpp"
#include "moe/layer/layer_checks.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/layer/output_activation.hpp"
#include "moe/mpi/communicator.hpp"
#include "moe/mpi/gradients.hpp"
#include "moe/mpi/placement.hpp"
#include "moe/mpi/row_exchange.hpp"

/// \file
/// The mixture-of-experts layer over several machines [S17 sec. 3.1]: every rank has tokens of its
/// own and a copy of the gate, every expert lives on one rank, and the tokens of all ranks that
/// chose an expert meet there.

namespace moe::mpi {

/// What a layer is made of.
template <class Layer>
struct PartsOf;
template <class Expert_, class Gate_>
struct PartsOf<MoELayer<Expert_, Gate_>> {
  using Expert = Expert_;
  using Gate = Gate_;
};

/// Some of a layer's experts, which keep the names that they have in the whole layer.
template <class Expert>
struct Shard {
  Index first = 0;
  std::vector<Expert> experts;

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    for (std::size_t i = 0; i < self.experts.size(); ++i) {
      visit(std::to_string(self.first + static_cast<Index>(i)), self.experts[i]);
    }
  }
};

/// A layer whose experts are spread over the ranks of a communicator, see Placement.
///
///     using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
///     moe::mpi::Communicator communicator;
///     moe::mpi::ExpertParallel<Layer> layer({.width = 128,
///                                            .expert = {.hidden = 256},
///                                            .gate = {.experts = 64, .active = 4},
///                                            .seed = 1}, communicator);
///     decltype(layer)::Tape tape;
///     const auto& y = layer.forward(x, tape, {.step = step});   // x: this rank's tokens
///
/// It has the verbs of the layer, and computes what the layer would compute on the tokens of all
/// ranks one behind the other, first those of rank 0: the same y and dx for them, and the same
/// gradients, up to the order of sums. In every run on as many ranks they have the same bits. The
/// noise of a token depends on its place in that batch, and tape.balance() speaks of all of it. dy is
/// the gradient of a loss of the whole batch, so where that is a mean, divide by the number of
/// tokens of all ranks, tape.batch_tokens.
///
/// It is moved, not copied, and what it was moved from is of no use.
///
/// All verbs and the constructor are collective, also on a rank that has no tokens: all ranks make
/// the same call with the same key.step. What goes wrong on one is thrown on all, as an Error.
///
/// An expert's gradients are those of all ranks' tokens, on the rank that holds it; they are never
/// divided by the number of ranks. Gradients of the gate are summed over the ranks in backward(),
/// and have the same bits everywhere. So do those of other modules after sum_gradients(); clip with
/// mpi::clip_gradients().
///
/// A slot that leaves its rank costs D numbers each way, forward and backward, and one more for its
/// weight. Rows are packed where they leave, and computed with as they arrive: they are not sorted
/// by expert first. While they travel a rank computes its own share.
template <class Layer>
class ExpertParallel {
 public:
  using Scalar = typename Layer::Scalar;
  using Config = typename Layer::Config;
  using Expert = typename PartsOf<Layer>::Expert;
  using Gate = typename PartsOf<Layer>::Gate;

  /// What a pass leaves behind, see MoELayer::Tape.
  struct Tape {
    typename Gate::Tape gate;  ///< whatever the gate keeps; its routing and balance
    Matrix<Scalar> x;          ///< T x D, a copy
    Matrix<Scalar> y;          ///< T x D, the result
    Matrix<Scalar> dx;         ///< T x D, the gradient with respect to x
    bool trained = false;      ///< whether the last pass was a forward() that ended well

    /// The slots of this rank's tokens in the last pass.
    const Routing<Scalar>& routing() const { return gate.routing; }
    /// The losses and the figures to watch of the last pass, of all ranks' tokens.
    const Balance<Scalar>& balance() const { return gate.balance; }

    std::vector<Index> rank_tokens;  ///< R, tokens of each rank
    Index batch_tokens = 0;          ///< of all ranks
    Index first_token = 0;           ///< this rank's first one among them
    std::uint64_t step = 0;          ///< of the key
    std::int64_t pass = 0;           ///< numbers the passes of a communicator
    Matrix<Scalar> combined;         ///< T x D, y before the output activation, if there is one
    Matrix<Scalar> dcombined;        ///< T x D
    std::vector<Scalar> dweight;     ///< S, the gradients of the weights by slot

    /// Slots that this rank's experts work on.
    struct Share {
      Routing<Scalar> routing;
      moe::detail::ExpertTape<Expert> experts;
      std::vector<Scalar> dweight;  ///< a slot
    };
    Share own;                    ///< of this rank's tokens
    std::vector<Index> own_slot;  ///< which of its slots those are
    Share others;                 ///< of the tokens of the other ranks, a row a slot, N of them

    // A rank's slots that leave it, L of them, are numbered in the order of their experts, those
    // that come to it by rank, and by expert and token in each.
    std::vector<Index> sent;               ///< R + 1, which of the L go to which rank
    std::vector<Index> received;           ///< R + 1, which of the N come from which rank
    std::vector<Index> sent_counts;        ///< E, slots of this rank for each expert
    std::vector<Index> received_counts;    ///< R x experts of this rank
    std::vector<Index> sent_token;         ///< L
    std::vector<Index> sent_slot;          ///< L
    std::vector<Scalar> sent_weight;       ///< L
    Matrix<Scalar> received_x;             ///< N x D
    Matrix<Scalar> received_dy;            ///< N x D
    Matrix<Scalar> answer;                 ///< N x D, y or dx of what came
    Matrix<Scalar> returned;               ///< L x D, what leaves, then its y or dx
    std::vector<Scalar> returned_dweight;  ///< L
    GradientSum gate_gradients;
  };

  /// Throws Error on all ranks when a configuration is out of range or differs among them.
  ExpertParallel(const Config& config, const Communicator& communicator)
      : communicator_(communicator), config_(config) {
    communicator_.attempt("ExpertParallel::ExpertParallel", [&] {
      config_ = Layer::completed(config);
      gate_ = std::make_unique<Gate>(config_.gate, derive_seed(config.seed, 0));
      placement_ = Placement(gate_->experts(), communicator_.size(), experts_together(config_.gate),
                             shared_experts(config_.gate));
    });
    check_configuration();
    communicator_.attempt("ExpertParallel: experts", [&] {
      shard_.first = placement_.first(communicator_.rank());
      const Index count = placement_.count(communicator_.rank());
      for (int r = 0; r < communicator_.size(); ++r) {
        rank_experts_.push_back(placement_.count(r));
        here_for_each_rank_.push_back(count);
      }
      shard_.experts.reserve(moe::detail::to_size(count));
      for (Index e = shard_.first; e < shard_.first + count; ++e) {
        shard_.experts.emplace_back(config_.expert,
                                    derive_seed(config.seed, static_cast<std::uint64_t>(e) + 1));
      }
    });
    number_ = communicator_.next_number();
  }

  const Config& config() const { return config_; }
  const Communicator& communicator() const { return communicator_; }
  const Placement& placement() const { return placement_; }
  const Gate& gate() const { return *gate_; }
  Gate& gate() { return *gate_; }
  /// Those of this rank, placement().first(rank) and on.
  const std::vector<Expert>& experts() const { return shard_.experts; }
  std::vector<Expert>& experts() { return shard_.experts; }

  /// Training pass over this rank's tokens, x (T x D), T being any number, 0 too; returns tape.y
  /// (T x D). Throws Error on all ranks.
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape, const NoiseKey& key) const {
    tape.trained = false;
    begin("ExpertParallel::forward", x, key, tape);
    with_batch(tape, [&] {
      NoiseKey own = key;
      own.first_token += static_cast<std::uint32_t>(tape.first_token);
      communicator_.attempt("the gate", [&] {
        moe::detail::copy_matrix(x, tape.x);
        gate_->forward(tape.x, tape.gate, own);
        dispatch(tape.x.rows(), tape);
      });
    });
    run_experts(tape.x, true, tape);
    tape.trained = true;
    return tape.y;
  }

  /// Takes dy, the gradient of the whole batch's loss by y (T x D), after forward() on the same
  /// tape. Adds to the gradients of the gate and of this rank's experts; returns that of x, which
  /// is tape.dx. Throws Error on all ranks.
  const Matrix<Scalar>& backward(const MatrixRef<Scalar>& dy, Tape& tape) {
    with_batch(tape, [&] {
      communicator_.attempt("ExpertParallel::backward",
                            {{"the step of the tape", static_cast<std::int64_t>(tape.step)},
                             {"the number of tokens", tape.batch_tokens},
                             {"the pass of the tape", tape.pass}},
                            [&] {
                              prepare_backward(dy, tape);
                              if (!has_gradients_) moe::detail::reserve_gradients(shard_);
                              has_gradients_ = true;
                            });
      run_experts_backward(
          moe::detail::activate_output_backward(config_.output, tape.combined, dy, tape.dcombined),
          tape);
      run_gate_backward(tape);
    });
    return tape.dx;
  }

  /// y (T x D) without noise. Throws Error on all ranks.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    tape.trained = false;
    begin("ExpertParallel::evaluate", x, {.step = 0}, tape);
    with_batch(tape, [&] {
      communicator_.attempt("the gate", [&] {
        gate_->evaluate(x, tape.gate);
        dispatch(x.rows(), tape);
      });
    });
    run_experts(x, false, tape);
    return tape.y;
  }
  Matrix<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    return evaluate(x, tape);
  }

  /// Names are those of the whole layer; of the experts, this rank's only.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    constexpr bool is_const = std::is_const_v<Self>;
    Resident<Residence::summed, std::conditional_t<is_const, const Gate, Gate>> gate{*self.gate_};
    using Experts = Shard<Expert>;
    Resident<Residence::here, std::conditional_t<is_const, const Experts, Experts>> experts{
        self.shard_};
    visit("gate", gate);
    visit("experts", experts);
  }

 private:
  using Share = typename Tape::Share;

  /// GlobalBatch over the ranks.
  class Batch final : public GlobalBatch<Scalar> {
   public:
    Batch(const Communicator& communicator, const Tape& tape)
        : communicator_(communicator), tape_(tape) {}

    Index tokens() const override { return tape_.batch_tokens; }
    Index first_token() const override { return tape_.first_token; }
    void sum(std::span<Scalar> numbers) const override { communicator_.sum(numbers); }
    void sum(std::span<Index> numbers) const override { communicator_.sum(numbers); }
    void gather(std::span<const Scalar> numbers, Index per_token,
                std::span<Scalar> all) const override {
      gather_numbers(numbers, per_token, all);
    }
    void gather(std::span<const Index> numbers, Index per_token,
                std::span<Index> all) const override {
      gather_numbers(numbers, per_token, all);
    }

   private:
    template <class Number>
    void gather_numbers(std::span<const Number> numbers, Index per_token,
                        std::span<Number> all) const {
      std::vector<Index> counts = tape_.rank_tokens;
      for (Index& count : counts) count *= per_token;
      communicator_.gather(numbers, std::span<const Index>(counts), all);
    }

    const Communicator& communicator_;
    const Tape& tape_;
  };

  /// The experts of a hierarchical gate's group are placed together.
  template <class GateConfig>
  static Index experts_together(const GateConfig& gate) {
    if constexpr (requires { gate.group_experts; }) {
      return gate.group_experts;
    } else if constexpr (requires { gate.routed; }) {
      return experts_together(gate.routed);
    } else {
      return 1;
    }
  }
  template <class GateConfig>
  static Index shared_experts(const GateConfig& gate) {
    if constexpr (requires { gate.shared; }) {
      return gate.shared;
    } else {
      return 0;
    }
  }

  /// Throws Error on all ranks where they have different configurations.
  void check_configuration() const {
    std::vector<std::int64_t> fields;
    moe::detail::for_each_field(config_, [&](const ParameterName&, const auto& field) {
      fields.push_back(moe::detail::field_bits(field));
    });
    communicator_.agree("ExpertParallel::ExpertParallel",
                        {{"Config.width", config_.width},
                         {"the number of experts", gate_->experts()},
                         {"Config.seed", static_cast<std::int64_t>(config_.seed)},
                         {"the number of fields of Config", static_cast<Index>(fields.size())}});
    std::vector<std::int64_t> root = fields;
    communicator_.broadcast(std::span<std::int64_t>(root), 0);
    communicator_.attempt("ExpertParallel: Config", [&] {
      auto there = root.begin();
      moe::detail::for_each_field(
          config_, [&]<class Field>(const ParameterName& name, const Field& field) {
            const std::int64_t bits = *there++;
            if (moe::detail::field_bits(field) == bits) return;
            moe::detail::require(false, "ExpertParallel: Config.", name.string(),
                                 " differs: ", moe::detail::field_text(field), " here, ",
                                 moe::detail::field_text(moe::detail::field_of_bits<Field>(bits)),
                                 " on rank 0");
          });
    });
  }

  /// Throws std::invalid_argument where somebody put a gate of another number of experts in the
  /// gate's place, or experts in or out.
  void check_structure() const {
    const Index here = placement_.count(communicator_.rank());
    moe::detail::require(gate_->experts() == placement_.experts() &&
                             static_cast<Index>(shard_.experts.size()) == here,
                         "ExpertParallel: ", shard_.experts.size(), " experts here and ",
                         gate_->experts(), " of the gate, made with ", here, " and ",
                         placement_.experts());
  }

  /// Finds out how many tokens all ranks have.
  void begin(const char* call, const MatrixRef<Scalar>& x, const NoiseKey& key, Tape& tape) const {
    communicator_.attempt(call,
                          {{"key.step", static_cast<std::int64_t>(key.step)},
                           {"key.first_token", static_cast<std::int64_t>(key.first_token)},
                           {"the layer", number_}},
                          [&] {
                            check_structure();
                            moe::detail::check_layer_width<Scalar>(x, "x", config_.width);
                            moe::detail::require_apart(call, "x", x, {tape.y, tape.combined});
                          });
    tape.step = key.step;
    tape.pass = communicator_.next_number();
    tape.rank_tokens = communicator_.gather(x.rows());
    const auto own = tape.rank_tokens.begin() + communicator_.rank();
    tape.first_token = std::accumulate(tape.rank_tokens.begin(), own, Index{0});
    tape.batch_tokens = std::accumulate(own, tape.rank_tokens.end(), tape.first_token);
  }

  /// Calls f() while the gate finds the batch in its tape.
  template <class F>
  void with_batch(Tape& tape, F&& f) const {
    const Batch batch(communicator_, tape);
    struct Reset {
      Tape& tape;
      ~Reset() { tape.gate.batch = nullptr; }
    };
    const Reset reset{tape};
    tape.gate.batch = &batch;
    f();
  }

  bool is_here(Index expert) const {
    return expert >= shard_.first &&
           expert < shard_.first + static_cast<Index>(shard_.experts.size());
  }

  /// Sorts this rank's slots into those that stay and those that leave.
  void dispatch(Index tokens, Tape& tape) const {
    using moe::detail::to_size;
    const Index experts = gate_->experts();
    Routing<Scalar>& routing = tape.gate.routing;
    moe::detail::group_checked(routing, experts, tokens);

    Routing<Scalar>& own = tape.own.routing;
    own.experts = static_cast<Index>(shard_.experts.size());
    own.token_offsets.assign(1, 0);
    own.expert.clear();
    own.weight.clear();
    tape.own_slot.clear();
    for (Index t = 0; t < tokens; ++t) {
      for (Index s = routing.token_offsets[to_size(t)]; s < routing.token_offsets[to_size(t) + 1];
           ++s) {
        if (!is_here(routing.expert[to_size(s)])) continue;
        own.expert.push_back(routing.expert[to_size(s)] - shard_.first);
        own.weight.push_back(routing.weight[to_size(s)]);
        tape.own_slot.push_back(s);
      }
      own.token_offsets.push_back(own.slots());
    }
    group_by_expert(own);

    moe::detail::resize(tape.sent_counts, experts);
    for (Index e = 0; e < experts; ++e) tape.sent_counts[to_size(e)] = routing.slots_of(e);
    tape.sent.assign(1, 0);
    tape.sent_token.clear();
    tape.sent_slot.clear();
    tape.sent_weight.clear();
    for (int r = 0; r < communicator_.size(); ++r) {
      const Index first = routing.expert_offsets[to_size(placement_.first(r))];
      const Index last = routing.expert_offsets[to_size(placement_.first(r + 1))];
      for (Index row = first; row < last && r != communicator_.rank(); ++row) {
        tape.sent_token.push_back(routing.row_token[to_size(row)]);
        tape.sent_slot.push_back(routing.row_slot[to_size(row)]);
        tape.sent_weight.push_back(routing.weight[to_size(tape.sent_slot.back())]);
      }
      tape.sent.push_back(static_cast<Index>(tape.sent_token.size()));
    }
    moe::detail::resize(tape.received_counts,
                        communicator_.size() * static_cast<Index>(shard_.experts.size()));
  }

  /// Tells the other ranks how many slots there are for each of their experts.
  void exchange_counts(Tape& tape) const {
    communicator_.exchange(
        std::span<const Index>(tape.sent_counts), std::span<const Index>(rank_experts_),
        std::span<Index>(tape.received_counts), std::span<const Index>(here_for_each_rank_));
  }

  /// Makes the routing of what comes, a token of one slot for each row.
  void prepare_others(Tape& tape) const {
    using moe::detail::to_size;
    const auto here = static_cast<Index>(shard_.experts.size());
    Routing<Scalar>& routing = tape.others.routing;
    routing.experts = here;
    routing.expert.clear();
    tape.received.assign(1, 0);
    for (int r = 0; r < communicator_.size(); ++r) {
      for (Index e = 0; e < here && r != communicator_.rank(); ++e) {
        routing.expert.insert(routing.expert.end(),
                              to_size(tape.received_counts[to_size(r * here + e)]), e);
      }
      tape.received.push_back(routing.slots());
    }
    moe::detail::resize(routing.weight, routing.slots());
    moe::detail::resize(routing.token_offsets, routing.slots() + 1);
    std::iota(routing.token_offsets.begin(), routing.token_offsets.end(), Index{0});
    group_by_expert(routing);
    moe::detail::resize(tape.received_x, routing.slots(), config_.width);
    moe::detail::resize(tape.returned, tape.sent.back(), config_.width);
  }

  template <class F>
  void for_each_other_rank(F&& f) const {
    // Each begins with its neighbour, so that not all of them send to rank 0 first.
    for (int i = 1; i < communicator_.size(); ++i) {
      f((communicator_.rank() + i) % communicator_.size());
    }
  }

  // Both ways of a pass: rows of tokens go to where their experts are, answers come back.

  /// Rows are packed into what the answers will come to later. An MPI datatype that lists them
  /// would spare that, but was 2 to 6 times slower, since MPI then neither copies from process to
  /// process nor lets a network read the memory.
  void send_tokens(const MatrixRef<Scalar>& matrix, Matrix<Scalar>& received, Tape& tape,
                   RowExchange& exchange) const {
    using moe::detail::to_size;
    Matrix<Scalar>& packed = tape.returned;
    parallel_for_blocks(packed.rows(), 64, element_work(packed.size()),
                        [&](Index first, Index count) {
                          for (Index i = first; i < first + count; ++i) {
                            std::copy_n(moe::detail::row_data(matrix, tape.sent_token[to_size(i)]),
                                        config_.width, moe::detail::row_data(packed, i));
                          }
                        });
    for_each_other_rank([&](int r) {
      exchange.receive(received, tape.received[to_size(r)], came_from(r, tape), r);
      exchange.send(packed, tape.sent[to_size(r)], leave_for(r, tape), r);
    });
  }
  void return_answers(Tape& tape, RowExchange& exchange) const {
    using moe::detail::to_size;
    for_each_other_rank([&](int r) {
      exchange.receive(tape.returned, tape.sent[to_size(r)], leave_for(r, tape), r);
      exchange.send(tape.answer, tape.received[to_size(r)], came_from(r, tape), r);
    });
  }
  static Index leave_for(int rank, const Tape& tape) {
    return tape.sent[moe::detail::to_size(rank) + 1] - tape.sent[moe::detail::to_size(rank)];
  }
  static Index came_from(int rank, const Tape& tape) {
    return tape.received[moe::detail::to_size(rank) + 1] -
           tape.received[moe::detail::to_size(rank)];
  }

  /// to.row(token) += the answers of its slots, in the order of their experts.
  void add_answers(const Tape& tape, Matrix<Scalar>& to) const {
    parallel_for_blocks(
        config_.width, 64, element_work(tape.returned.size()), [&](Index first, Index count) {
          for (Index i = 0; i < tape.returned.rows(); ++i) {
            moe::detail::add_scaled(
                count, Scalar{1}, moe::detail::row_data(tape.returned, i) + first,
                moe::detail::row_data(to, tape.sent_token[moe::detail::to_size(i)]) + first);
          }
        });
  }

  /// y = act(Σ G·experts(x)).
  void run_experts(const MatrixRef<Scalar>& x, bool keeps, Tape& tape) const {
    using moe::detail::to_size;
    const bool plain = config_.output == Activation::identity;
    Matrix<Scalar>& sum = plain ? tape.y : tape.combined;
    exchange_counts(tape);
    std::optional<RowExchange> there;
    std::optional<RowExchange> back;
    communicator_.attempt("the slots", [&] {
      prepare_others(tape);
      moe::detail::resize_to_zero(tape.answer, tape.received.back(), config_.width);
      moe::detail::resize_to_zero(sum, x.rows(), config_.width);
      if (!plain) moe::detail::resize(tape.y, x.rows(), config_.width);
      there.emplace(communicator_);
      back.emplace(communicator_);
    });
    send_tokens(x, tape.received_x, tape, *there);
    for_each_other_rank([&](int r) {
      there->receive(tape.others.routing.weight, tape.received[to_size(r)], came_from(r, tape), r);
      there->send(tape.sent_weight, tape.sent[to_size(r)], leave_for(r, tape), r);
    });
    communicator_.attempt("the experts", [&] {
      run_share(x, keeps, tape.own, sum);
      there->wait();
      run_share(tape.received_x, keeps, tape.others, tape.answer);
    });
    return_answers(tape, *back);
    back->wait();
    add_answers(tape, sum);
    if (!plain) moe::detail::activate_output(config_.output, sum, tape.y);
  }

  void run_share(const MatrixRef<Scalar>& x, bool keeps, Share& share, Matrix<Scalar>& sum) const {
    if (shard_.experts.empty()) return;
    check_share(share);
    moe::detail::ExpertPass<Expert>(shard_.experts, share.routing, share.experts)
        .run(x, keeps, sum);
  }

  void check_share(Share& share) const {
    if (shard_.experts.empty()) return;
    moe::detail::ExpertPass<Expert>(shard_.experts, share.routing, share.experts)
        .check_experts(config_.width);
  }

  /// Throws before anything is changed.
  void prepare_backward(const MatrixRef<Scalar>& dy, Tape& tape) const {
    using moe::detail::require;
    check_structure();
    require(tape.trained, "MoELayer::backward without a forward pass on this tape");
    moe::detail::check_layer_width<Scalar>(dy, "dy", config_.width);
    require(dy.rows() == tape.x.rows(), "MoELayer: dy has ", dy.rows(), " rows, y has ",
            tape.x.rows());
    require(tape.routing().experts == gate_->experts() && tape.x.cols() == config_.width &&
                tape.rank_tokens.size() == moe::detail::to_size(communicator_.size()) &&
                (shard_.experts.empty() ||
                 tape.own.experts.kept_width == shard_.experts.front().tape_width()),
            "MoELayer::backward: the tape is another layer's, of ", tape.routing().experts,
            " experts and width ", tape.x.cols());
    moe::detail::check_gate(*gate_, tape.gate, config_.width);
    check_share(tape.own);
    check_share(tape.others);
    moe::detail::require_apart("ExpertParallel::backward", "dy", dy,
                               {tape.dx, tape.dcombined, tape.returned});
    moe::detail::resize(tape.received_dy, tape.received.back(), config_.width);
    moe::detail::resize(tape.returned, tape.sent.back(), config_.width);
    moe::detail::resize_to_zero(tape.answer, tape.received.back(), config_.width);
    moe::detail::resize_to_zero(tape.dx, dy.rows(), config_.width);
    moe::detail::resize(tape.dweight, tape.routing().slots());
    moe::detail::resize(tape.returned_dweight, tape.sent.back());
  }

  /// Fills tape.dweight, adds the experts' share to tape.dx and to their gradients.
  void run_experts_backward(const MatrixRef<Scalar>& dy, Tape& tape) {
    using moe::detail::to_size;
    std::optional<RowExchange> there;
    std::optional<RowExchange> back;
    communicator_.attempt("the way back", [&] {
      there.emplace(communicator_);
      back.emplace(communicator_);
    });
    send_tokens(dy, tape.received_dy, tape, *there);
    communicator_.attempt("the experts' gradients", [&] {
      run_share_backward(tape.x, dy, tape.own, tape.dx);
      there->wait();
      run_share_backward(tape.received_x, tape.received_dy, tape.others, tape.answer);
    });
    return_answers(tape, *back);
    for_each_other_rank([&](int r) {
      back->receive(tape.returned_dweight, tape.sent[to_size(r)], leave_for(r, tape), r);
      back->send(tape.others.dweight, tape.received[to_size(r)], came_from(r, tape), r);
    });
    back->wait();
    add_answers(tape, tape.dx);
    for (std::size_t i = 0; i < tape.own_slot.size(); ++i) {
      tape.dweight[to_size(tape.own_slot[i])] = tape.own.dweight[i];
    }
    for (std::size_t i = 0; i < tape.sent_slot.size(); ++i) {
      tape.dweight[to_size(tape.sent_slot[i])] = tape.returned_dweight[i];
    }
  }

  void run_share_backward(const MatrixRef<Scalar>& x, const MatrixRef<Scalar>& dy, Share& share,
                          Matrix<Scalar>& dx) {
    if (shard_.experts.empty()) return;
    moe::detail::ExpertPass<Expert>(shard_.experts, share.routing, share.experts)
        .run_backward(shard_.experts, x, dy, share.dweight, dx);
  }

  /// Adds the gate's share to tape.dx, and the gradients of all ranks' tokens to the gate's.
  void run_gate_backward(Tape& tape) {
    bool aside = false;
    try {
      communicator_.attempt("the gate's gradients", [&] {
        tape.gate_gradients.set_aside(*gate_);
        aside = true;
        gate_->backward(tape.x, std::span<const Scalar>(tape.dweight), tape.gate, tape.dx);
        moe::detail::check_left_by_gate(tape.dx, tape.x.rows(), config_.width);
      });
      tape.gate_gradients.sum(*gate_, communicator_);
    } catch (...) {
      // On the ranks that did not fail too, whose gradients were set aside as well.
      if (aside) tape.gate_gradients.restore(*gate_);
      throw;
    }
    tape.gate_gradients.add_back(*gate_);
  }

  Communicator communicator_;
  Config config_;
  std::unique_ptr<Gate> gate_;
  Placement placement_{1, 1};
  std::int64_t number_ = 0;                ///< among what the communicator numbers
  std::vector<Index> rank_experts_;        ///< R, experts of each rank
  std::vector<Index> here_for_each_rank_;  ///< R times those of this one
  Shard<Expert> shard_;
  bool has_gradients_ = false;  ///< a first backward pass has made room for them
};

}  // namespace moe::mpi
