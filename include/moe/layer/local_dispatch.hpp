#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "moe/layer/changed_experts.hpp"
#include "moe/layer/expert_pass.hpp"
#include "moe/routing/dispatch.hpp"
#include "moe/routing/pass.hpp"

/// \file
/// The dispatch policy of a layer whose experts are all in one process. The policy for several
/// processes is in mpi/rank_dispatch.hpp.

namespace moe {

/// All experts of the layer are in this process. Every dispatch policy has these functions. Those that
/// take an f call it once. In a policy of several processes an exception that f throws in one process
/// is thrown in all.
class LocalDispatch {
 public:
  /// What a pass needs besides the rest of the layer's tape: nothing.
  template <class Expert>
  struct Tape {};

  /// Called once by the layer's constructor, with the number of its experts.
  template <class Config, class Gate>
  void place(const Config&, const Gate&, Index) {}
  /// The experts of this process, out of this number in the layer.
  Range experts_here(Index experts) const { return {0, experts}; }

  /// Returns f(). What it throws is thrown in all processes; the text names the call in
  /// messages.
  template <class F>
  auto together(const char*, F&& f) const {
    return f();
  }

  // Which rank has which experts, before and after experts are added or removed. Here there is only
  // one rank.

  /// Which experts a rank has: all of them.
  class Placement {
   public:
    /// A placement of this number of experts.
    explicit Placement(Index experts) : experts_(experts) {}
    /// The first expert of a rank.
    Index first(int rank) const { return rank == 0 ? 0 : experts_; }
    /// How many experts a rank has.
    Index count(int) const { return experts_; }

   private:
    Index experts_;
  };
  /// This process.
  int rank() const { return 0; }
  /// The number of processes.
  int ranks() const { return 1; }
  /// The placement now, of this number of experts.
  Placement placement(Index experts) const { return Placement(experts); }
  /// The placement that this number of experts of a gate should have.
  template <class Gate>
  Placement placement_for(const Gate&, Index experts) const {
    return Placement(experts);
  }
  /// Places the experts, after a change.
  void set_placement(const Placement&) {}
  /// In a policy of several processes, throws on all of them if the changes differ.
  void agree_on_change(const char*, std::uint64_t, const detail::ChangeDraws&) const {}
  /// Sends bytes to each rank and receives bytes from each; the numbers of bytes are known on both sides.
  /// The flag is whether any rank sends something.
  void exchange(const char*, bool, std::vector<std::vector<char>>&,
                std::vector<std::vector<char>>&) const {}

  /// The pass as the gate gets it, valid as long as this object.
  class Batch {
   public:
    /// Copies the pass.
    explicit Batch(const Pass& pass) : pass_(pass) {}
    /// The pass.
    const Pass& pass() const { return pass_; }

   private:
    Pass pass_;
  };
  /// Begins a pass, the gate's forward() or evaluate(), over a number of rows; f() checks the arguments.
  template <class Expert, class Gate, class F>
  Batch begin(const char*, const Gate&, bool, const Pass& pass, Index,
              Dispatch<typename Expert::Scalar>&, Tape<Expert>&, F&& f) const {
    f();
    return Batch(pass);
  }
  /// f() routes and sorts the slots by expert.
  template <class Expert, class F>
  void route(Dispatch<typename Expert::Scalar>&, Tape<Expert>&, F&& f) const {
    f();
  }
  /// sum += Σ over slots G·expert(x), both T x D; f() makes room for the sum and sets it to zero.
  template <class Expert, class F>
  void forward(std::span<const Expert> experts, const MatrixRef<typename Expert::Scalar>& x,
               bool save, Dispatch<typename Expert::Scalar>& dispatch,
               detail::ExpertTape<Expert>& tape, Tape<Expert>&,
               Matrix<typename Expert::Scalar>& sum, F&& f) const {
    const detail::ExpertPass<Expert> pass(
        experts, {dispatch, x.rows(), {0, static_cast<Index>(experts.size())}}, tape);
    pass.check_experts();
    f();
    pass.forward(x, save, sum);
  }

  /// f() checks the arguments, makes room and returns the gradient w.r.t. the sum (T x D). Fills
  /// dweight (S, in the order of the dispatch), adds to dx and to the experts' gradients.
  template <class Expert, class Gate, class F>
  void backward(const Gate&, std::span<Expert> experts, const MatrixRef<typename Expert::Scalar>& x,
                Dispatch<typename Expert::Scalar>& dispatch, detail::ExpertTape<Expert>& tape,
                Tape<Expert>&, IndexedVector<typename Expert::Scalar>& dweight,
                Matrix<typename Expert::Scalar>& dx, F&& f) const {
    const MatrixRef<typename Expert::Scalar> dsum = f();
    const detail::ExpertPass<Expert> pass(
        experts, {dispatch, x.rows(), {0, static_cast<Index>(experts.size())}}, tape);
    pass.check_experts();
    pass.backward(experts, x, dsum, dweight.data(), dx);
  }
  /// f() adds to the gradients of the gate.
  template <class Gate, class Expert, class F>
  void gate_backward(Gate&, Tape<Expert>&, F&& f) const {
    f();
  }

  /// Visits the layer's parts, as visit_parameters() does.
  template <class Gate, class Experts, class Visitor>
  void visit_parts(Gate& gate, Experts& experts, const Visitor& visit) const {
    visit("gate", gate);
    visit("experts", experts);
  }
};

}  // namespace moe
