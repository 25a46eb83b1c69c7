#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/mpi/communicator.hpp"
#include "moe/optim/gradient_clipping.hpp"
#include "moe/parameter.hpp"

/// \file
/// Gradients of several ranks: those of parameters of which every rank has a copy are summed, those of
/// parameters that only one rank has are not.

namespace moe::mpi {

/// Which ranks have a parameter of a model, and gradients of which tokens.
enum class Residence {
  replicated,  ///< every rank has a copy, and gradients of its own tokens
  reduced,     ///< every rank has a copy, and gradients of all tokens: an ExpertParallel's gate
  sharded,     ///< only this rank has it: an ExpertParallel's expert
};

/// A module that is not replicated. ExpertParallel visits its parts as such, so that they are recognised
/// at any depth of a model.
template <Residence residence, class Module>
struct Resident {
  static constexpr Residence lives = residence;  ///< where its parameters are
  Module& module;                                ///< the module

  /// The parameters of the module.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    std::remove_const_t<Module>::visit_parameters(self.module, visit);
  }
};

/// The part of a module that has certain residences; it is a module itself, and refers to the whole
/// module.
template <class Module, Residence... residences>
class PartOf {
 public:
  /// Refers to a module.
  explicit PartOf(Module& module) : module_(module) {}

  /// The parameters of the module that are in one of `residences`.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit_in(self.module_, {}, visit);
  }

 private:
  static constexpr bool has(Residence residence) { return ((residence == residences) || ...); }

  template <class Member, class Visitor>
  static void visit_in(Member& member, std::string_view name, const Visitor& visit) {
    using Type = std::remove_const_t<Member>;
    if constexpr (moe::detail::is_parameter<Type>) {
      if constexpr (has(Residence::replicated)) visit(name, member);
    } else if constexpr (moe::detail::is_vector<Type>) {
      for (auto& element : member) visit_in(element, name, visit);
    } else if constexpr (requires { Type::lives; }) {
      if constexpr (has(Type::lives)) visit(name, member);
    } else {
      Type::visit_parameters(
          member, [&](std::string_view part, auto& inner) { visit_in(inner, part, visit); });
    }
  }

  Module& module_;
};

/// Sums the gradients of copies over the ranks, packed into one array for each type of number.
class GradientSum {
 public:
  /// Saves the gradients of the trained parameters of a module and sets them to zero.
  template <class Module>
  void set_aside(Module& module) {
    saved_.clear();
    saved_states_.clear();
    moe::detail::walk_parameters(module, [&](const ParameterName&, auto& p) {
      if (!p.trained) return;
      saved_.push_back(p.gradient());
      saved_states_.push_back(p.stored.state);
    });
    moe::detail::walk_parameters(module, [&](const ParameterName&, auto& p) {
      if (!p.trained) return;
      moe::detail::resize_to_zero(p.gradient(), p.stored.rows, p.stored.columns);
      if (p.stored.state != State::untracked) p.stored.state = State::zero;
    });
  }

  /// Restores the gradients that set_aside() saved.
  template <class Module>
  void restore(Module& module) {
    saved_.rewind();
    auto state = saved_states_.begin();
    moe::detail::walk_parameters(
        module, [&]<class Scalar>(const ParameterName&, Parameter<Scalar>& p) {
          if (!p.trained) return;
          std::copy_n(saved_.next<Scalar>(p.size()), p.size(), p.gradient().data());
          p.stored.state = *state++;
        });
  }

  /// Adds the gradients that set_aside() saved.
  template <class Module>
  void add_back(Module& module) {
    saved_.rewind();
    auto state = saved_states_.begin();
    moe::detail::walk_parameters(
        module, [&]<class Scalar>(const ParameterName&, Parameter<Scalar>& p) {
          if (!p.trained) return;
          moe::detail::add_scaled(p.size(), Scalar{1}, saved_.next<Scalar>(p.size()),
                                  p.gradient().data());
          if (*state++ == State::added_to) p.stored.state = State::added_to;
        });
  }

  /// Replaces every gradient by its sum over the ranks. Tracked gradients to which any rank has added count
  /// as added to on all. Collective.
  template <class Module>
  void sum(Module& module, const Communicator& communicator) {
    const Counts counts = counts_of(module);
    communicator.attempt(
        "the gradients to be summed",
        {{Counts::float_name, counts.floats}, {Counts::double_name, counts.doubles}},
        [&] { pack(module, communicator); });
    sum_packed(module, communicator);
  }

  // The two halves of sum(): pack(), which can fail on one rank, and sum_packed(), which cannot. Between
  // them the ranks agree on the counts, which differ if a parameter is trained on some ranks only.

  /// The numbers that a rank packs, by type.
  struct Counts {
    static constexpr const char* float_name =
        "the count of numbers in gradients of float";  ///< for messages
    static constexpr const char* double_name =
        "the count of numbers in gradients of double";  ///< for messages
    std::int64_t floats = 0;                            ///< of float
    std::int64_t doubles = 0;                           ///< of double
  };
  /// The counts of a module.
  template <class Module>
  static Counts counts_of(const Module& module) {
    Counts counts;
    moe::detail::walk_parameters(
        module, [&]<class Scalar>(const ParameterName&, const Parameter<Scalar>& p) {
          // One more for the parameter's flag.
          std::int64_t& count = std::is_same_v<Scalar, float> ? counts.floats : counts.doubles;
          if (p.trained) count += p.gradient().size() + 1;
        });
    return counts;
  }

  /// Packs the gradients, and makes room for the sum. Local; may throw std::bad_alloc.
  template <class Module>
  void pack(Module& module, const Communicator& communicator) {
    pack(module);
    communicator.make_room_for_sum<float>(packed_.floats.size());
    communicator.make_room_for_sum<double>(packed_.doubles.size());
  }
  /// Packs the gradients, without room for the sum. Local.
  template <class Module>
  void pack(Module& module) {
    packed_.clear();
    moe::detail::walk_parameters(module, [&](const ParameterName&, auto& p) {
      if (!p.trained) return;
      packed_.push_back(p.gradient());
      packed_.push_flag(p.gradient(), p.stored.state == State::added_to);
    });
  }
  /// Sums the packed gradients and unpacks them. Collective, after a call in which no rank failed.
  template <class Module>
  void sum_packed(Module& module, const Communicator& communicator) {
    // A type that the module does not have is missing on all ranks.
    if (!packed_.floats.empty()) communicator.sum_agreed(std::span<float>(packed_.floats));
    if (!packed_.doubles.empty()) communicator.sum_agreed(std::span<double>(packed_.doubles));
    unpack(module);
  }

  // The second half after a pack() that may have failed. make_room() is called before the ranks agree on
  // the counts.

  /// Makes room for the sum, and for failing in it. Local; may throw std::bad_alloc.
  static void make_room(const Counts& counts, const Communicator& communicator) {
    communicator.make_room_to_fail<float>(moe::detail::to_size(counts.floats));
    communicator.make_room_to_fail<double>(moe::detail::to_size(counts.doubles));
  }
  /// Sums the packed gradients and unpacks them. Throws Error on all ranks if `failure` is not null on one.
  /// Collective.
  template <class Module>
  void sum_packed(Module& module, const Counts& counts, const char* call,
                  const std::exception_ptr& failure, const Communicator& communicator) {
    bool is_told = sum_or_fail(packed_.floats, counts.floats, call, failure, communicator);
    if (is_told && counts.doubles > 0) {
      communicator.sum_agreed(std::span<double>(packed_.doubles));
    } else if (!is_told) {
      is_told = sum_or_fail(packed_.doubles, counts.doubles, call, failure, communicator);
    }
    if (!is_told) communicator.agree(call, {}, failure);
    unpack(module);
  }

 private:
  using State = moe::detail::GradientState;

  /// Returns whether there are any numbers: if so, the ranks know now that none failed.
  template <class Scalar>
  static bool sum_or_fail(std::vector<Scalar>& numbers, std::int64_t count, const char* call,
                          const std::exception_ptr& failure, const Communicator& communicator) {
    if (count == 0) return false;
    if (failure != nullptr) {
      communicator.fail_in_sum<Scalar>(moe::detail::to_size(count));
    } else if (!communicator.sum_or_fail(std::span<Scalar>(numbers))) {
      return true;
    }
    communicator.agree(call, {}, failure);
    return true;
  }

  template <class Module>
  void unpack(Module& module) {
    packed_.rewind();
    moe::detail::walk_parameters(
        module, [&]<class Scalar>(const ParameterName&, Parameter<Scalar>& p) {
          if (!p.trained) return;
          std::copy_n(packed_.next<Scalar>(p.size()), p.size(), p.gradient().data());
          if (*packed_.next<Scalar>(1) > 0) p.stored.state = State::added_to;
        });
  }

  /// The numbers of some matrices, one after the other, by type.
  struct Numbers {
    std::vector<float> floats;
    std::vector<double> doubles;
    Index next_float = 0;
    Index next_double = 0;

    void clear() {
      floats.clear();
      doubles.clear();
    }
    void rewind() { next_float = next_double = 0; }

    void push_back(const Matrix<float>& m) {
      floats.insert(floats.end(), m.data(), m.data() + m.size());
    }
    void push_back(const Matrix<double>& m) {
      doubles.insert(doubles.end(), m.data(), m.data() + m.size());
    }
    /// Appends a flag as a number of the type of a matrix.
    void push_flag(const Matrix<float>&, bool flag) { floats.push_back(flag ? 1.0f : 0.0f); }
    void push_flag(const Matrix<double>&, bool flag) { doubles.push_back(flag ? 1.0 : 0.0); }

    template <class Scalar>
    const Scalar* next(Index count) {
      if constexpr (std::is_same_v<Scalar, float>) {
        return floats.data() + std::exchange(next_float, next_float + count);
      } else {
        return doubles.data() + std::exchange(next_double, next_double + count);
      }
    }
  };

  Numbers saved_;
  std::vector<State> saved_states_;
  Numbers packed_;
};

/// Sums the gradients of replicated parameters over the ranks. Call it once per update, after the
/// last backward pass and before clipping. It leaves out the parameters of an ExpertParallel, whose
/// backward() has summed the gate's gradients, and whose experts' gradients are complete. Gradients
/// are those of a loss of the whole batch, so nothing is divided. The sums have the same bits on
/// all ranks, so the copies stay equal. Throws Error on all ranks, with nothing changed, if their
/// numbers of gradients differ, as where a parameter is trained on some ranks only. Collective.
template <class Module>
void sum_gradients(Module& module, const Communicator& communicator) {
  PartOf<Module, Residence::replicated> copies(module);
  GradientSum().sum(copies, communicator);
}

/// gradient_norm() of the whole model: parameters of which every rank has a copy count once. The same bits
/// on all ranks. Collective.
template <class Module>
double gradient_norm(const Module& module, const Communicator& communicator,
                     Updates updates = Updates::dense) {
  const PartOf<const Module, Residence::replicated, Residence::reduced> copies(module);
  const PartOf<const Module, Residence::sharded> own(module);
  double square = std::pow(moe::gradient_norm(own, updates), 2);
  communicator.sum(std::span<double>(&square, 1));
  return std::hypot(moe::gradient_norm(copies, updates), std::sqrt(square));
}

/// clip_gradients() by the norm of the whole model, which it returns; after sum_gradients(). Throws Error
/// on all ranks unless max_norm > 0. Collective.
template <class Module>
double clip_gradients(Module& module, double max_norm, const Communicator& communicator,
                      Updates updates = Updates::dense) {
  communicator.attempt("clip_gradients", [&] {
    moe::detail::require(max_norm > 0, "clip_gradients: max_norm = ", max_norm,
                         ", must be above 0");
  });
  const double norm = mpi::gradient_norm(module, communicator, updates);
  if (std::isfinite(norm) && norm > max_norm) {
    moe::detail::scale_gradients(module, max_norm / norm, updates);
  }
  return norm;
}

}  // namespace moe::mpi
