#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/gates/gate.hpp"
#include "moe/layer/changed_experts.hpp"
#include "moe/layer/expert_pass.hpp"
#include "moe/mpi/communicator.hpp"
#include "moe/mpi/configuration.hpp"
#include "moe/mpi/gradients.hpp"
#include "moe/mpi/placement.hpp"
#include "moe/mpi/rank_batch.hpp"
#include "moe/mpi/row_exchange.hpp"
#include "moe/mpi/slot_exchange.hpp"
#include "moe/routing/dispatch.hpp"
#include "moe/routing/pass.hpp"

/// \file
/// The dispatch policy of a layer whose experts are spread over several machines [S17 sec. 3.1]: every
/// rank has tokens of its own and a copy of the gate; every expert is on one rank, which computes the
/// slots of this expert for the tokens of all ranks.

namespace moe::mpi {

/// The experts of a rank, with the names that they have in the whole layer. The object refers to
/// the experts.
template <class Experts>
struct Shard {
  Index first;       ///< the number of the first one in the layer
  Experts& experts;  ///< consecutive experts

  /// Their parameters, by the numbers of the experts in the layer.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    for (std::size_t i = 0; i < self.experts.size(); ++i) {
      visit(std::to_string(self.first + static_cast<Index>(i)), self.experts[i]);
    }
  }
};

/// The experts are spread over the ranks of a communicator, see Placement. It has the functions of
/// LocalDispatch; ExpertParallel describes a layer with it. It can be moved, not copied.
///
/// In forward and in backward, a slot whose expert is on another rank costs D numbers in each
/// direction, and one more number for its weight or the weight's gradient. The sending rank packs
/// the rows; the receiving rank does not sort them by expert. During the exchange a rank computes
/// the slots that stay. Experts of the dispatch after the placed ones (a layer's identity experts)
/// are left to the layer.
class RankDispatch {
 public:
  /// The experts will be on these ranks.
  RankDispatch(const Communicator& communicator)  // NOLINT(google-explicit-constructor)
      : communicator_(communicator) {}
  /// An object that was moved from cannot be used.
  RankDispatch(RankDispatch&&) = default;
  /// An object that was moved from cannot be used.
  RankDispatch& operator=(RankDispatch&&) = default;

  /// The ranks.
  const Communicator& communicator() const { return communicator_; }
  /// Which rank has which experts.
  const Placement& placement() const { return placement_; }

  template <class Expert>
  using Tape = RankTape<Expert>;  ///< see RankTape

  /// Places the experts. Throws Error on all ranks if they have different configurations, or if the gate
  /// cannot share a batch.
  template <class Config, class Gate>
  void place(const Config& config, const Gate& gate, Index experts) {
    together("ExpertParallel: the placement", [&] {
      sent_counts_.resize(moe::detail::to_size(communicator_.size()));
      received_counts_.resize(sent_counts_.size());
      set_placement(placement_for(gate, experts));
      // A gate that cannot share a batch throws here.
      for (const bool training : {true, false}) moe::detail::shared_calls_of(gate, training, 0, 0);
    });
    check_same_configuration(config, gate.experts(), communicator_);
    number_ = communicator_.next_number();
  }
  /// The experts of this rank.
  Range experts_here(Index) const {
    return {placement_.first(communicator_.rank()), placement_.count(communicator_.rank())};
  }

  // For adding, copying and removing experts.

  /// This rank.
  int rank() const { return communicator_.rank(); }
  /// The number of ranks.
  int ranks() const { return communicator_.size(); }
  /// Which rank has which experts.
  Placement placement(Index) const { return placement_; }
  /// The placement that this number of experts of a gate should have.
  template <class Gate>
  Placement placement_for(const Gate& gate, Index experts) const {
    return Placement(experts, communicator_.size(), experts_together(gate), shared_experts(gate));
  }
  /// Places the experts, after a change.
  void set_placement(const Placement& placement) {
    placement_ = placement;
    for (int r = 0; r < ranks(); ++r) {
      sent_counts_[moe::detail::to_size(Index{r})] = placement_.count(r) + 1;
    }
    std::fill(received_counts_.begin(), received_counts_.end(), placement_.count(rank()) + 1);
  }
  /// Throws Error on all ranks if their changes differ.
  void agree_on_change(const char* verb, std::uint64_t structure,
                       const moe::detail::ChangeDraws& draws) const {
    communicator_.agree(
        verb, {{"the hash of the experts", static_cast<std::int64_t>(structure)},
               {"seed", static_cast<std::int64_t>(draws.seed)},
               {"noise_stddev, as bits,", std::bit_cast<std::int64_t>(draws.noise_stddev)}});
  }
  /// Sends bytes to each rank and receives bytes from each; the numbers of bytes are known on both sides.
  /// `moves` is whether any rank sends something.
  void exchange(const char* call, bool moves, std::vector<std::vector<char>>& sent,
                std::vector<std::vector<char>>& received) const {
    std::optional<RowExchange> exchange;
    communicator_.attempt(call, {{"whether there is anything to move", moves ? 1 : 0}}, [&] {
      if (moves) exchange.emplace(communicator_);
    });
    if (!moves) return;
    communicator_.for_each_other_rank([&](int r) {
      const auto of = [r](auto& buffers) -> std::vector<char>& {
        return buffers[moe::detail::to_size(Index{r})];
      };
      exchange->receive(of(received), 0, static_cast<Index>(of(received).size()), r);
      exchange->send(of(sent), 0, static_cast<Index>(of(sent).size()), r);
    });
    exchange->wait();
  }

  /// Returns f(). An exception of f() on one rank is thrown on all, as an Error.
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

  /// The pass as the gate gets it: its batch is that of all ranks.
  class Batch {
   public:
    /// Refers to the first two arguments.
    Batch(const Communicator& communicator, RankBatch& batch, const Pass& pass)
        : shared_(communicator, batch), pass_(pass) {
      pass_.first_token += static_cast<std::uint32_t>(batch.first_row);
      pass_.batch = &shared_;
    }
    Batch(const Batch&) = delete;  // its pass refers to it
    Batch& operator=(const Batch&) = delete;
    /// The pass.
    const Pass& pass() const { return pass_; }

   private:
    SharedOverRanks shared_;
    Pass pass_;
  };

  /// Begins a pass: f() checks the arguments, and the ranks exchange their numbers of rows and tokens.
  template <class Expert, class Gate, class F>
  Batch begin(const char* call, const Gate& gate, bool training, const Pass& pass, Index rows,
              Dispatch<typename Expert::Scalar>& dispatch, Tape<Expert>& tape, F&& f) const {
    const Index tokens = moe::detail::count_valid(pass.valid, rows);
    // Room for these is enough: with 0 rows a gate lists all calls that it makes with any number of
    // rows.
    const moe::detail::SharedCalls most =
        moe::detail::shared_calls_of(gate, training, 0, pass.sequences);
    const std::span<const Index> all = communicator_.attempt_gather(
        call,
        {{"Pass.step", static_cast<std::int64_t>(pass.step)},
         {"Pass.first_token", static_cast<std::int64_t>(pass.first_token)},
         {"Pass.sequences", pass.sequences},
         {"the layer", number_},
         {"the count of what the gate sums", most[0].numbers + most[1].numbers},
         {"Pass.loss_scale, as bits,", std::bit_cast<std::int64_t>(pass.loss_scale)},
         {"Pass.noise_factor, as bits,", std::bit_cast<std::int64_t>(pass.noise_factor)}},
        {rows, tokens}, [&] {
          f();
          moe::detail::require(pass.batch == nullptr,
                               "ExpertParallel: Pass.batch must be null, since the ranks make it");
          tape.batch.resize(communicator_.size());
          SlotExchange(communicator_, placement_, dispatch, tape).prepare_counts();
          for (const moe::detail::SharedCall& shared : most) make_room(communicator_, shared);
        });
    tape.batch.set(all, communicator_.rank());
    tape.batch.calls =
        moe::detail::shared_calls_of(gate, training, tape.batch.rows, pass.sequences);
    tape.batch.called = 0;
    tape.step = pass.step;
    tape.number = communicator_.next_number();
    return Batch(communicator_, tape.batch, pass);
  }

  /// f() routes this rank's tokens. Then the ranks tell each other the number of slots for each of their
  /// experts, and whether they failed. If the gate does not name its calls of the batch, a rank that failed
  /// cannot know in which call the others are, so all ranks agree first.
  template <class Expert, class F>
  void route(Dispatch<typename Expert::Scalar>& dispatch, Tape<Expert>& tape, F&& f) const {
    const SlotExchange slots(communicator_, placement_, dispatch, tape);
    const std::exception_ptr failure = communicator_.failure_of(f);
    if (!tape.batch.names_calls()) communicator_.agree(gate_call, {}, failure);
    if (failure != nullptr) fail_in_next_call(communicator_, tape.batch, failure);
    MOE_ASSERT(tape.batch.next_call().kind == moe::detail::SharedCall::none);
    slots.count_sent(failure != nullptr);
    communicator_.exchange_agreed(
        std::span<const Index>(tape.sent_counts), std::span<const Index>(sent_counts_),
        std::span<Index>(tape.received_counts), std::span<const Index>(received_counts_));
    if (slots.has_any_failed()) communicator_.agree(gate_call, {}, failure);
  }

  /// sum += Σ over slots G·expert(x), both T x D; f() makes room for the sum and sets it to
  /// zero.
  template <class Expert, class F>
  void forward(std::span<const Expert> experts, const MatrixRef<typename Expert::Scalar>& x,
               bool save, Dispatch<typename Expert::Scalar>& dispatch,
               moe::detail::ExpertTape<Expert>& own, Tape<Expert>& tape,
               Matrix<typename Expert::Scalar>& sum, F&& f) const {
    const SlotExchange<Expert> slots(communicator_, placement_, dispatch, tape);
    std::optional<RowExchange> there;
    std::optional<RowExchange> back;
    communicator_.attempt("the slots", [&] {
      slots.prepare_forward(x.cols());
      check_experts(experts, dispatch, x.rows(), own, tape);
      f();
      there.emplace(communicator_);
      back.emplace(communicator_);
    });
    slots.send_tokens(x, tape.received_x, *there);
    slots.send_weights(*there);
    const std::exception_ptr failure = communicator_.failure_of([&] {
      if (experts.empty()) return there->wait();
      pass_of_own(experts, dispatch, x.rows(), own).forward(x, save, sum);
      there->wait();
      for (Index i = 0; i < tape.others.slots(); ++i) {
        tape.others_dispatch.weight[i] = tape.others.weight[tape.others_dispatch.sorted_slot[i]];
      }
      pass_of_others(experts, tape).forward(tape.received_x, save, tape.answer);
    });
    there->wait();  // if the experts failed before they waited
    slots.return_answers(failure, *back);
    slots.finish("the experts", failure, *back);
    slots.add_answers(sum);
  }

  /// f() checks the arguments, makes room and returns the gradient w.r.t. the sum (T x D).
  /// Fills dweight (S, in the order of the dispatch), adds to dx and to the experts' gradients.
  template <class Expert, class Gate, class F>
  void backward(const Gate& gate, std::span<Expert> experts,
                const MatrixRef<typename Expert::Scalar>& x,
                Dispatch<typename Expert::Scalar>& dispatch, moe::detail::ExpertTape<Expert>& own,
                Tape<Expert>& tape, IndexedVector<typename Expert::Scalar>& dweight,
                Matrix<typename Expert::Scalar>& dx, F&& f) const {
    using Scalar = typename Expert::Scalar;
    const std::span<const Expert> constant = experts;
    const SlotExchange<Expert> slots(communicator_, placement_, dispatch, tape);
    std::optional<MatrixRef<Scalar>> dy;
    std::optional<RowExchange> there;
    std::optional<RowExchange> back;
    const GradientSum::Counts counts = GradientSum::counts_of(gate);
    communicator_.attempt("MoELayer::backward",
                          {{"the step of the tape", static_cast<std::int64_t>(tape.step)},
                           {"the number of rows", tape.batch.rows},
                           {"the pass of the tape", tape.number},
                           {GradientSum::Counts::float_name, counts.floats},
                           {GradientSum::Counts::double_name, counts.doubles}},
                          [&] {
                            dy.emplace(f());
                            check_tape(dispatch, tape);
                            check_experts(constant, dispatch, x.rows(), own, tape);
                            slots.prepare_backward(x.cols());
                            GradientSum::make_room(counts, communicator_);
                            there.emplace(communicator_);
                            back.emplace(communicator_);
                          });
    slots.send_tokens(*dy, tape.received_dy, *there);
    const std::exception_ptr failure = communicator_.failure_of([&] {
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
    there->wait();  // if the experts failed before they waited
    slots.return_answers(failure, *back);
    slots.return_dweight(dweight, *back);
    slots.finish("the experts' gradients", failure, *back);
    slots.add_answers(dx);
  }

  /// f() adds this rank's gradients to those of the gate, and the gradients are summed over the
  /// ranks. Called after backward(), in which the ranks agreed on the number of gradients.
  template <class Gate, class Expert, class F>
  void gate_backward(Gate& gate, Tape<Expert>& tape, F&& f) const {
    bool aside = false;
    const GradientSum::Counts counts = GradientSum::counts_of(gate);
    try {
      const std::exception_ptr failure = communicator_.failure_of([&] {
        tape.gate_gradients.set_aside(gate);
        aside = true;
        f();
        tape.gate_gradients.pack(gate);
      });
      tape.gate_gradients.sum_packed(gate, counts, "the gate's gradients", failure, communicator_);
    } catch (...) {
      // Also on the ranks that did not fail, since their gradients were set aside too.
      if (aside) tape.gate_gradients.restore(gate);
      throw;
    }
    tape.gate_gradients.add_back(gate);
  }

  /// Visits the gate and the experts of this rank, as visit_parameters() does.
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

  // Slots of this rank's tokens whose experts are here, and slots of other ranks' tokens.

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
  void check_tape(const Dispatch<typename Expert::Scalar>& dispatch,
                  const Tape<Expert>& tape) const {
    moe::detail::require(
        tape.batch.rank_rows.size() == moe::detail::to_size(communicator_.size()) &&
            dispatch.experts() >= placement_.experts(),
        "MoELayer::backward: the tape is another layer's, of ", tape.batch.rank_rows.size(),
        " ranks and ", dispatch.experts(), " experts");
  }

  Communicator communicator_;
  Placement placement_{1, 1};
  std::int64_t number_ = 0;  ///< of the layer, among those of the communicator
  // The number of values that the ranks exchange before the slots: a count for each expert, and a flag.
  std::vector<Index> sent_counts_;      ///< R, for each rank
  std::vector<Index> received_counts_;  ///< R, from each rank
};

}  // namespace moe::mpi
