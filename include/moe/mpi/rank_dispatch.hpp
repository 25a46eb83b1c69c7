#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <exception>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/config_fields.hpp"
#include "moe/layer/changed_experts.hpp"
#include "moe/layer/expert_pass.hpp"
#include "moe/mpi/communicator.hpp"
#include "moe/mpi/gradients.hpp"
#include "moe/mpi/placement.hpp"
#include "moe/mpi/rank_batch.hpp"
#include "moe/mpi/row_exchange.hpp"
#include "moe/routing/dispatch.hpp"
#include "moe/routing/pass.hpp"

/// \file
/// The dispatch policy of a layer whose experts are spread over several machines [S17 sec. 3.1]:
/// every rank has tokens of its own and a copy of the gate, every expert is on one rank, and the
/// tokens of all ranks that chose an expert meet there.

namespace moe::mpi {

/// Some of a layer's experts, with the names that they have in the whole layer; refers to them.
template <class Experts>
struct Shard {
  Index first;
  Experts& experts;

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    for (std::size_t i = 0; i < self.experts.size(); ++i) {
      visit(std::to_string(self.first + static_cast<Index>(i)), self.experts[i]);
    }
  }
};

/// The experts are spread over the ranks of a communicator, see Placement. It has the verbs of
/// LocalDispatch; ExpertParallel says what they mean for a layer. It is moved, not copied.
///
/// A slot that leaves its rank costs D numbers each way, forward and backward, and one more for its
/// weight. Rows are packed where they leave, and computed with as they arrive: they are not sorted
/// by expert first. While they travel a rank computes its own share.
class RankDispatch {
 public:
  RankDispatch(const Communicator& communicator)  // NOLINT(google-explicit-constructor)
      : communicator_(communicator) {}
  RankDispatch(RankDispatch&&) = default;
  RankDispatch& operator=(RankDispatch&&) = default;

  const Communicator& communicator() const { return communicator_; }
  const Placement& placement() const { return placement_; }

  template <class Expert>
  struct Tape {
    using Scalar = typename Expert::Scalar;

    RankBatch batch;           ///< how many rows and tokens each rank has
    std::uint64_t step = 0;    ///< of the pass
    std::int64_t number = 0;   ///< numbers the passes of a communicator

    // A rank's slots that leave it, L of them, are in the order of the dispatch; those that come to
    // it, N of them, are numbered by rank, and by expert and token in each.
    IndexedVector<Index> sent;             ///< R + 1, which of the L go to which rank
    IndexedVector<Index> received;         ///< R + 1, which of the N come from which rank
    IndexedVector<Index> sent_counts;      ///< E, slots of this rank for each expert
    IndexedVector<Index> received_counts;  ///< R x experts of this rank
    Matrix<Scalar> returned;               ///< L x D, what leaves, then its y or dx

    // Of the slots of other ranks' tokens, each a row of its own.
    Routing<Scalar> others;
    Dispatch<Scalar> others_dispatch;
    moe::detail::ExpertTape<Expert> others_experts;
    Matrix<Scalar> received_x;             ///< N x D
    Matrix<Scalar> received_dy;            ///< N x D
    Matrix<Scalar> answer;                 ///< N x D, y or dx of what came
    IndexedVector<Scalar> sorted_dweight;  ///< N, by expert
    IndexedVector<Scalar> dweight;         ///< N

    std::vector<Index> failed_here;   ///< R times whether this rank's experts failed
    std::vector<Index> failed_there;  ///< R, whether those of each rank did
    GradientSum gate_gradients;
  };

  /// Throws Error on all ranks where they have different configurations.
  template <class Config, class Gate>
  void place(const Config& config, const Gate& gate) {
    together("ExpertParallel: the placement", [&] {
      rank_experts_.resize(moe::detail::to_size(communicator_.size()));
      here_for_each_rank_.resize(rank_experts_.size());
      set_placement(placement_for(gate));
    });
    check_configuration(config, gate.experts());
    number_ = communicator_.next_number();
  }
  Range experts_here(Index) const {
    return {placement_.first(communicator_.rank()), placement_.count(communicator_.rank())};
  }

  // For experts that come and go.

  int rank() const { return communicator_.rank(); }
  int ranks() const { return communicator_.size(); }
  Placement placement(Index) const { return placement_; }
  template <class Gate>
  Placement placement_for(const Gate& gate) const {
    return Placement(gate.experts(), communicator_.size(), experts_together(gate),
                     shared_experts(gate));
  }
  void set_placement(const Placement& placement) {
    placement_ = placement;
    for (int r = 0; r < ranks(); ++r) {
      rank_experts_[moe::detail::to_size(Index{r})] = placement_.count(r);
    }
    std::fill(here_for_each_rank_.begin(), here_for_each_rank_.end(), placement_.count(rank()));
  }
  void agree_on_change(const char* verb, std::uint64_t structure,
                       const moe::detail::ChangeDraws& draws) const {
    communicator_.agree(verb, {{"the experts", static_cast<std::int64_t>(structure)},
                               {"seed", static_cast<std::int64_t>(draws.seed)},
                               {"noise_stddev", std::bit_cast<std::int64_t>(draws.noise_stddev)}});
  }
  void exchange(const char* call, bool moves, std::vector<std::vector<char>>& sent,
                std::vector<std::vector<char>>& received) const {
    std::optional<RowExchange> exchange;
    communicator_.attempt(call, {{"whether there is anything to move", moves ? 1 : 0}}, [&] {
      if (moves) exchange.emplace(communicator_);
    });
    if (!moves) return;
    for_each_other_rank([&](int r) {
      const auto of = [r](auto& buffers) -> std::vector<char>& {
        return buffers[moe::detail::to_size(Index{r})];
      };
      exchange->receive(of(received), 0, static_cast<Index>(of(received).size()), r);
      exchange->send(of(sent), 0, static_cast<Index>(of(sent).size()), r);
    });
    exchange->wait();
  }

  template <class F>
  auto together(const char* call, F&& f) const {
    using Result = decltype(f());
    if constexpr (std::is_void_v<Result>) {
      communicator_.attempt(call, f);
    } else {
      std::optional<Result> result;
      communicator_.attempt(call, [&] { result.emplace(f()); });
      return std::move(*result);
    }
  }

  /// The pass as the gate sees it: the batch is that of all ranks.
  class Batch {
   public:
    Batch(const Communicator& communicator, const RankBatch& batch, const Pass& pass)
        : shared_(communicator, batch), pass_(pass) {
      pass_.first_token += static_cast<std::uint32_t>(batch.first_row);
    }
    const Pass& pass() const {
      pass_.batch = &shared_;
      return pass_;
    }

   private:
    SharedOverRanks shared_;
    mutable Pass pass_;
  };

  /// Finds out how many rows and tokens all ranks have.
  template <class Expert, class F>
  Batch begin(const char* call, const Pass& pass, Index rows, Tape<Expert>& tape, F&& f) const {
    Index tokens = rows;
    for (const std::uint8_t flag : pass.valid) tokens -= flag == 0 ? 1 : 0;
    const std::span<const Index> all = communicator_.attempt_gather(
        call,
        {{"Pass.step", static_cast<std::int64_t>(pass.step)},
         {"Pass.first_token", static_cast<std::int64_t>(pass.first_token)},
         {"the layer", number_}},
        {rows, tokens},
        [&] {
          f();
          moe::detail::require(pass.batch == nullptr,
                               "ExpertParallel: Pass.batch is given, and is that of the ranks");
          tape.batch.resize(communicator_.size());
        });
    tape.batch.set(all, communicator_.rank());
    tape.step = pass.step;
    tape.number = communicator_.next_number();
    return Batch(communicator_, tape.batch, pass);
  }

  /// f() routes this rank's tokens; then the ranks tell each other how many slots there are for each
  /// of their experts.
  template <class Expert, class F>
  void route(Dispatch<typename Expert::Scalar>& dispatch, Tape<Expert>& tape, F&& f) const {
    communicator_.attempt("the gate", [&] {
      f();
      count_sent(dispatch, tape);
      communicator_.make_room_for_exchange(tape.sent_counts.size() + tape.received_counts.size());
    });
    communicator_.exchange_agreed(
        std::span<const Index>(tape.sent_counts), std::span<const Index>(rank_experts_),
        std::span<Index>(tape.received_counts), std::span<const Index>(here_for_each_rank_));
  }

  template <class Expert, class F>
  void forward(std::span<const Expert> experts, const MatrixRef<typename Expert::Scalar>& x,
               bool save, Dispatch<typename Expert::Scalar>& dispatch,
               moe::detail::ExpertTape<Expert>& own, Tape<Expert>& tape,
               Matrix<typename Expert::Scalar>& sum, F&& f) const {
    std::optional<RowExchange> there;
    std::optional<RowExchange> back;
    communicator_.attempt("the slots", [&] {
      prepare_others(x.cols(), tape);
      check_experts(experts, dispatch, x.rows(), own, tape);
      f();
      there.emplace(communicator_);
      back.emplace(communicator_);
    });
    send_tokens(x, tape.received_x, dispatch, tape, *there);
    for_each_other_rank([&](int r) {
      there->receive(tape.others.weight, tape.received[r], came_from(r, tape), r);
      there->send(dispatch.weight, dispatch.offsets[placement_.first(r)], leave_for(r, tape), r);
    });
    const std::exception_ptr failure = attempt_here([&] {
      if (experts.empty()) return there->wait();
      pass_of_own(experts, dispatch, x.rows(), own).forward(x, save, sum);
      there->wait();
      for (Index i = 0; i < tape.others.slots(); ++i) {
        tape.others_dispatch.weight[i] = tape.others.weight[tape.others_dispatch.sorted_slot[i]];
      }
      pass_of_others(experts, tape).forward(tape.received_x, save, tape.answer);
    });
    there->wait();  // where the experts failed before it
    return_answers(failure, tape, *back);
    finish("the experts", failure, tape, *back);
    add_answers(dispatch, tape, sum);
  }

  template <class Expert, class F>
  void backward(std::span<Expert> experts, const MatrixRef<typename Expert::Scalar>& x,
                Dispatch<typename Expert::Scalar>& dispatch, moe::detail::ExpertTape<Expert>& own,
                Tape<Expert>& tape, IndexedVector<typename Expert::Scalar>& dweight,
                Matrix<typename Expert::Scalar>& dx, F&& f) const {
    using Scalar = typename Expert::Scalar;
    const std::span<const Expert> constant = experts;
    std::optional<MatrixRef<Scalar>> dy;
    std::optional<RowExchange> there;
    std::optional<RowExchange> back;
    communicator_.attempt("ExpertParallel::backward",
                          {{"the step of the tape", static_cast<std::int64_t>(tape.step)},
                           {"the number of rows", tape.batch.rows},
                           {"the pass of the tape", tape.number}},
                          [&] {
                            dy.emplace(f());
                            check_tape(dispatch, tape);
                            check_experts(constant, dispatch, x.rows(), own, tape);
                            prepare_backward(x.cols(), tape);
                            there.emplace(communicator_);
                            back.emplace(communicator_);
                          });
    send_tokens(*dy, tape.received_dy, dispatch, tape, *there);
    const std::exception_ptr failure = attempt_here([&] {
      if (experts.empty()) return there->wait();
      Scalar* const own_dweight = dweight.data() + dispatch.offsets[experts_here(0).first];
      pass_of_own(constant, dispatch, x.rows(), own).backward(experts, x, *dy, own_dweight, dx);
      there->wait();
      pass_of_others(constant, tape)
          .backward(experts, tape.received_x, tape.received_dy, tape.sorted_dweight.data(),
                    tape.answer);
      sort_by_expert_backward(tape.others_dispatch, std::span<const Scalar>(tape.sorted_dweight),
                              tape.dweight);
    });
    there->wait();  // where the experts failed before it
    return_answers(failure, tape, *back);
    for_each_other_rank([&](int r) {
      back->receive(dweight, dispatch.offsets[placement_.first(r)], leave_for(r, tape), r);
      back->send(tape.dweight, tape.received[r], came_from(r, tape), r);
    });
    finish("the experts' gradients", failure, tape, *back);
    add_answers(dispatch, tape, dx);
  }

  /// Adds the gradients of all ranks' tokens to the gate's.
  template <class Gate, class Expert, class F>
  void gate_backward(Gate& gate, Tape<Expert>& tape, F&& f) const {
    bool aside = false;
    try {
      communicator_.attempt("the gate's gradients", [&] {
        tape.gate_gradients.set_aside(gate);
        aside = true;
        f();
        tape.gate_gradients.pack(gate, communicator_);
      });
      tape.gate_gradients.sum_packed(gate, communicator_);
    } catch (...) {
      // On the ranks that did not fail too, whose gradients were set aside as well.
      if (aside) tape.gate_gradients.restore(gate);
      throw;
    }
    tape.gate_gradients.add_back(gate);
  }

  /// Of the experts, this rank's only.
  template <class Gate, class Experts, class Visitor>
  void visit_parts(Gate& gate, Experts& experts, const Visitor& visit) const {
    Resident<Residence::reduced, Gate> reduced{gate};
    Shard<Experts> shard{placement_.first(communicator_.rank()), experts};
    Resident<Residence::sharded, Shard<Experts>> sharded{shard};
    visit("gate", reduced);
    visit("experts", sharded);
  }

 private:
  template <class Gate>
  static Index experts_together(const Gate& gate) {
    if constexpr (requires { gate.experts_together(); }) {
      return gate.experts_together();
    } else {
      return 1;
    }
  }
  template <class Gate>
  static Index shared_experts(const Gate& gate) {
    if constexpr (requires { gate.shared_experts(); }) {
      return gate.shared_experts();
    } else {
      return 0;
    }
  }

  /// Throws Error on all ranks where they have different configurations.
  template <class Config>
  void check_configuration(const Config& config, Index experts) const {
    std::vector<std::int64_t> fields;
    moe::detail::for_each_field(config, [&](const ParameterName&, const auto& field) {
      fields.push_back(moe::detail::field_bits(field));
    });
    communicator_.agree("ExpertParallel::ExpertParallel",
                        {{"Config.width", config.width},
                         {"the number of experts", experts},
                         {"Config.seed", static_cast<std::int64_t>(config.seed)},
                         {"the number of fields of Config", static_cast<Index>(fields.size())}});
    std::vector<std::int64_t> root = fields;
    communicator_.broadcast(std::span<std::int64_t>(root), 0);
    communicator_.attempt("ExpertParallel: Config", [&] {
      auto there = root.begin();
      moe::detail::for_each_field(
          config, [&]<class Field>(const ParameterName& name, const Field& field) {
            const std::int64_t bits = *there++;
            if (moe::detail::field_bits(field) == bits) return;
            moe::detail::require(false, "ExpertParallel: Config.", name.string(),
                                 " differs: ", moe::detail::field_text(field), " here, ",
                                 moe::detail::field_text(moe::detail::field_of_bits<Field>(bits)),
                                 " on rank 0");
          });
    });
  }

  // Each rank's slots: those of its own experts stay, the others leave.

  template <class Expert>
  moe::detail::ExpertPass<Expert> pass_of_own(std::span<const Expert> experts,
                                              const Dispatch<typename Expert::Scalar>& dispatch,
                                              Index tokens,
                                              moe::detail::ExpertTape<Expert>& tape) const {
    return {experts, {dispatch, tokens, experts_here(0)}, tape};
  }
  template <class Expert>
  static moe::detail::ExpertPass<Expert> pass_of_others(std::span<const Expert> experts,
                                                        Tape<Expert>& tape) {
    const Range all{0, static_cast<Index>(experts.size())};
    return {experts, {tape.others_dispatch, tape.others.tokens(), all}, tape.others_experts};
  }
  template <class Expert>
  void check_experts(std::span<const Expert> experts,
                     const Dispatch<typename Expert::Scalar>& dispatch, Index tokens,
                     moe::detail::ExpertTape<Expert>& own, Tape<Expert>& tape) const {
    if (experts.empty()) return;
    pass_of_own(experts, dispatch, tokens, own).check_experts();
    pass_of_others(experts, tape).check_experts();
  }

  template <class Expert>
  void count_sent(const Dispatch<typename Expert::Scalar>& dispatch, Tape<Expert>& tape) const {
    moe::detail::resize(tape.sent_counts, dispatch.experts());
    for (Index e = 0; e < dispatch.experts(); ++e) tape.sent_counts[e] = dispatch.slots_of(e);
    tape.sent.assign(1, 0);
    for (int r = 0; r < communicator_.size(); ++r) {
      const Index slots = r == communicator_.rank() ? 0
                                                    : dispatch.offsets[placement_.first(r + 1)] -
                                                          dispatch.offsets[placement_.first(r)];
      tape.sent.push_back(tape.sent.back() + slots);
    }
    moe::detail::resize(tape.received_counts,
                        communicator_.size() * placement_.count(communicator_.rank()));
  }

  /// Makes the dispatch of what comes, a token of one slot for each row, and room for it.
  template <class Expert>
  void prepare_others(Index width, Tape<Expert>& tape) const {
    const Index here = placement_.count(communicator_.rank());
    auto& others = tape.others;
    others.experts = here;
    others.expert.clear();
    tape.received.assign(1, 0);
    for (int r = 0; r < communicator_.size(); ++r) {
      for (Index e = 0; e < here && r != communicator_.rank(); ++e) {
        others.expert.insert(others.expert.end(),
                             moe::detail::to_size(tape.received_counts[r * here + e]), e);
      }
      tape.received.push_back(others.slots());
    }
    moe::detail::resize(others.weight, others.slots());
    moe::detail::resize(others.token_offsets, others.slots() + 1);
    std::iota(others.token_offsets.begin(), others.token_offsets.end(), Index{0});
    sort_by_expert(others, tape.others_dispatch);
    moe::detail::resize(tape.received_x, others.slots(), width);
    moe::detail::resize(tape.returned, tape.sent.back(), width);
    moe::detail::resize_to_zero(tape.answer, others.slots(), width);
    prepare_flags(tape);
  }
  template <class Expert>
  void prepare_backward(Index width, Tape<Expert>& tape) const {
    moe::detail::resize(tape.received_dy, tape.received.back(), width);
    moe::detail::resize(tape.returned, tape.sent.back(), width);
    moe::detail::resize_to_zero(tape.answer, tape.received.back(), width);
    moe::detail::resize(tape.sorted_dweight, tape.received.back());
    moe::detail::resize(tape.dweight, tape.received.back());
    prepare_flags(tape);
  }
  template <class Expert>
  void prepare_flags(Tape<Expert>& tape) const {
    tape.failed_here.assign(moe::detail::to_size(communicator_.size()), 0);
    tape.failed_there.assign(moe::detail::to_size(communicator_.size()), 0);
  }
  template <class Expert>
  void check_tape(const Dispatch<typename Expert::Scalar>& dispatch,
                  const Tape<Expert>& tape) const {
    moe::detail::require(
        tape.batch.rank_rows.size() == moe::detail::to_size(communicator_.size()) &&
            dispatch.experts() == placement_.experts(),
        "MoELayer::backward: the tape is another layer's, of ", tape.batch.rank_rows.size(),
        " ranks and ", dispatch.experts(), " experts");
  }

  template <class F>
  void for_each_other_rank(F&& f) const {
    // Each begins with its neighbour, so that not all of them send to rank 0 first.
    for (int i = 1; i < communicator_.size(); ++i) {
      f((communicator_.rank() + i) % communicator_.size());
    }
  }

  // Both ways of a pass: rows of tokens go to where their experts are, answers come back.

  /// The position in the dispatch of row i of those that leave.
  template <class Scalar>
  Index position_of(const Dispatch<Scalar>& dispatch, Index i) const {
    const Range here = experts_here(0);
    const Index own = dispatch.offsets[here.first];
    return i < own ? i : i + dispatch.offsets[here.first + here.count] - own;
  }

  /// Rows are packed into what the answers will come to later. An MPI datatype that lists them
  /// would spare that, but was 2 to 6 times slower, since MPI then neither copies from process to
  /// process nor lets a network read the memory.
  template <class Expert>
  void send_tokens(const MatrixRef<typename Expert::Scalar>& matrix,
                   Matrix<typename Expert::Scalar>& received,
                   const Dispatch<typename Expert::Scalar>& dispatch, Tape<Expert>& tape,
                   RowExchange& exchange) const {
    auto& packed = tape.returned;
    parallel_for_blocks(
        packed.rows(), 64, element_work(packed.size()), [&](Index first, Index count) {
          for (Index i = first; i < first + count; ++i) {
            const Index token = dispatch.token[position_of(dispatch, i)];
            std::copy_n(moe::detail::row_data(matrix, token), matrix.cols(),
                        moe::detail::row_data(packed, i));
          }
        });
    for_each_other_rank([&](int r) {
      exchange.receive(received, tape.received[r], came_from(r, tape), r);
      exchange.send(packed, tape.sent[r], leave_for(r, tape), r);
    });
  }

  /// Every rank tells every other whether its experts failed, so that none has to ask: the answers of
  /// one that did are anything.
  template <class Expert>
  void return_answers(const std::exception_ptr& failure, Tape<Expert>& tape,
                      RowExchange& exchange) const {
    const Index failed = failure != nullptr ? 1 : 0;
    std::fill(tape.failed_here.begin(), tape.failed_here.end(), failed);
    for_each_other_rank([&](int r) {
      exchange.receive(tape.failed_there, r, 1, r);
      exchange.send(tape.failed_here, r, 1, r);
      exchange.receive(tape.returned, tape.sent[r], leave_for(r, tape), r);
      exchange.send(tape.answer, tape.received[r], came_from(r, tape), r);
    });
  }
  template <class Expert>
  void finish(const char* call, const std::exception_ptr& failure, Tape<Expert>& tape,
              RowExchange& exchange) const {
    exchange.wait();
    const bool all_well = std::all_of(tape.failed_there.begin(), tape.failed_there.end(),
                                      [](Index failed) { return failed == 0; });
    if (!all_well || failure != nullptr) communicator_.agree(call, {}, failure);
  }
  /// What f() throws, or null; a communicator that is of no more use throws on.
  template <class F>
  std::exception_ptr attempt_here(F&& f) const {
    try {
      f();
    } catch (...) {
      if (!communicator_.channel().is_usable()) throw;
      return std::current_exception();
    }
    return nullptr;
  }

  template <class Expert>
  static Index leave_for(int rank, const Tape<Expert>& tape) {
    return tape.sent[rank + 1] - tape.sent[rank];
  }
  template <class Expert>
  static Index came_from(int rank, const Tape<Expert>& tape) {
    return tape.received[rank + 1] - tape.received[rank];
  }

  /// to.row(token) += the answers of its slots, in the order of their experts.
  template <class Expert>
  void add_answers(const Dispatch<typename Expert::Scalar>& dispatch, const Tape<Expert>& tape,
                   Matrix<typename Expert::Scalar>& to) const {
    using Scalar = typename Expert::Scalar;
    parallel_for_blocks(
        to.cols(), 64, element_work(tape.returned.size()), [&](Index first, Index count) {
          for (Index i = 0; i < tape.returned.rows(); ++i) {
            const Index token = dispatch.token[position_of(dispatch, i)];
            moe::detail::add_scaled(count, Scalar{1},
                                    moe::detail::row_data(tape.returned, i) + first,
                                    moe::detail::row_data(to, token) + first);
          }
        });
  }

  Communicator communicator_;
  Placement placement_{1, 1};
  std::int64_t number_ = 0;                ///< among what the communicator numbers
  std::vector<Index> rank_experts_;        ///< R, experts of each rank
  std::vector<Index> here_for_each_rank_;  ///< R times those of this one
};

}  // namespace moe::mpi
