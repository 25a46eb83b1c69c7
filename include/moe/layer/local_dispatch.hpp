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
/// Where a layer's experts are and how slots get to them: all of them here. mpi/rank_dispatch.hpp is
/// the other way.

namespace moe {

/// All experts of the layer are in this process. A dispatch policy has these verbs, of which those
/// that take an f call it once; where a policy spans processes, what one of these calls throws in one
/// of them is thrown in all.
class LocalDispatch {
 public:
  /// What a pass needs beside the layer's own tape.
  template <class Expert>
  struct Tape {};

  /// Called once by the layer's constructor, with the number of its experts.
  template <class Config, class Gate>
  void place(const Config&, const Gate&, Index) {}
  /// Those of the layer's experts that are here.
  Range experts_here(Index experts) const { return {0, experts}; }

  template <class F>
  auto together(const char*, F&& f) const {
    return f();
  }

  // Which rank has which experts before and after they come and go. There is one rank.

  class Placement {
   public:
    explicit Placement(Index experts) : experts_(experts) {}
    Index first(int rank) const { return rank == 0 ? 0 : experts_; }
    Index count(int) const { return experts_; }

   private:
    Index experts_;
  };
  int rank() const { return 0; }
  int ranks() const { return 1; }
  Placement placement(Index experts) const { return Placement(experts); }
  template <class Gate>
  Placement placement_for(const Gate&, Index experts) const {
    return Placement(experts);
  }
  void set_placement(const Placement&) {}
  /// Throws on all ranks where they differ in what is to be done.
  void agree_on_change(const char*, std::uint64_t, const detail::ChangeDraws&) const {}
  /// Sends to every rank the bytes for it, and receives what is from it, of which the number is known.
  /// `moves` is whether anything does, on all ranks.
  void exchange(const char*, bool, std::vector<std::vector<char>>&,
                std::vector<std::vector<char>>&) const {}

  /// The pass as the gate should see it, valid as long as this object.
  class Batch {
   public:
    explicit Batch(const Pass& pass) : pass_(pass) {}
    const Pass& pass() const { return pass_; }

   private:
    Pass pass_;
  };
  /// Begins a pass over `rows` rows, the gate's forward() or evaluate(); f() checks the arguments.
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

  /// Names the layer's parts, each of which has the place in the processes that the policy gave it.
  template <class Gate, class Experts, class Visitor>
  void visit_parts(Gate& gate, Experts& experts, const Visitor& visit) const {
    visit("gate", gate);
    visit("experts", experts);
  }
};

}  // namespace moe
