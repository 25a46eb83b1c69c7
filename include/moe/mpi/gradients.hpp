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
/// Gradients of several ranks: those of what every rank has a copy of are summed, those of what
/// only one rank has are not.

namespace moe::mpi {

/// Where a parameter of a model lives.
enum class Residence {
  replicated,  ///< every rank has a copy, and gradients of its own tokens
  reduced,     ///< every rank has a copy, with gradients of all tokens: an ExpertParallel's gate
  sharded,     ///< only this rank has it: an ExpertParallel's expert
};

/// A module that is not replicated. ExpertParallel shows its parts as such, so they are
/// known for what they are however deep in a model they lie.
template <Residence residence, class Module>
struct Resident {
  static constexpr Residence lives = residence;
  Module& module;

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    std::remove_const_t<Module>::visit_parameters(self.module, visit);
  }
};

/// The parameters of a module that live somewhere, a module itself; it refers to the other one.
template <class Module, Residence... residences>
class PartOf {
 public:
  explicit PartOf(Module& module) : module_(module) {}

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

/// Sums the gradients of copies over the ranks, packed into one message a type.
class GradientSum {
 public:
  /// Keeps the gradients of what is trained of a module and leaves zeros, to which others are then
  /// added.
  template <class Module>
  void set_aside(Module& module) {
    kept_.clear();
    kept_states_.clear();
    moe::detail::walk_parameters(module, [&](const ParameterName&, auto& p) {
      if (!p.trained) return;
      kept_.push_back(p.gradient());
      kept_states_.push_back(p.stored.state);
    });
    moe::detail::walk_parameters(module, [&](const ParameterName&, auto& p) {
      if (!p.trained) return;
      moe::detail::resize_to_zero(p.gradient(), p.stored.rows, p.stored.columns);
      if (p.stored.state != State::untracked) p.stored.state = State::zero;
    });
  }

  /// Makes gradients again what they were when they were set aside.
  template <class Module>
  void restore(Module& module) {
    kept_.rewind();
    auto state = kept_states_.begin();
    moe::detail::walk_parameters(
        module, [&]<class Scalar>(const ParameterName&, Parameter<Scalar>& p) {
          if (!p.trained) return;
          std::copy_n(kept_.next<Scalar>(p.size()), p.size(), p.gradient().data());
          p.stored.state = *state++;
        });
  }

  /// Adds what was set aside.
  template <class Module>
  void add_back(Module& module) {
    kept_.rewind();
    auto state = kept_states_.begin();
    moe::detail::walk_parameters(
        module, [&]<class Scalar>(const ParameterName&, Parameter<Scalar>& p) {
          if (!p.trained) return;
          moe::detail::add_scaled(p.size(), Scalar{1}, kept_.next<Scalar>(p.size()),
                                  p.gradient().data());
          if (*state++ == State::added_to) p.stored.state = State::added_to;
        });
  }

  /// Every gradient becomes its sum over the ranks, and every rank learns to which something was
  /// added. Collective.
  template <class Module>
  void sum(Module& module, const Communicator& communicator) {
    const Counts counts = counts_of(module);
    communicator.attempt("the gradients to be summed",
                         {{counts.float_name, counts.floats}, {counts.double_name, counts.doubles}},
                         [&] { pack(module, communicator); });
    sum_packed(module, communicator);
  }

  // The two halves of sum(): what can fail on one rank, and what cannot. In between the ranks agree
  // on the counts, which differ where a parameter is trained on some of them only.

  struct Counts {
    static constexpr const char* float_name = "the count of numbers in gradients of float";
    static constexpr const char* double_name = "the count of numbers in gradients of double";
    std::int64_t floats = 0;
    std::int64_t doubles = 0;
  };
  template <class Module>
  static Counts counts_of(const Module& module) {
    Counts counts;
    moe::detail::walk_parameters(
        module, [&]<class Scalar>(const ParameterName&, const Parameter<Scalar>& p) {
          // With the flag of each.
          std::int64_t& count = std::is_same_v<Scalar, float> ? counts.floats : counts.doubles;
          if (p.trained) count += p.gradient().size() + 1;
        });
    return counts;
  }

  /// Local.
  template <class Module>
  void pack(Module& module, const Communicator& communicator) {
    pack(module);
    communicator.make_room_for_sum<float>(packed_.floats.size());
    communicator.make_room_for_sum<double>(packed_.doubles.size());
  }
  template <class Module>
  void pack(Module& module) {
    packed_.clear();
    moe::detail::walk_parameters(module, [&](const ParameterName&, auto& p) {
      if (!p.trained) return;
      packed_.push_back(p.gradient());
      packed_.push_flag(p.gradient(), p.stored.state == State::added_to);
    });
  }
  /// Collective, after a call in which no rank failed.
  template <class Module>
  void sum_packed(Module& module, const Communicator& communicator) {
    // A type that the module does not have is missing on all ranks.
    if (!packed_.floats.empty()) communicator.sum_agreed(std::span<float>(packed_.floats));
    if (!packed_.doubles.empty()) communicator.sum_agreed(std::span<double>(packed_.doubles));
    unpack(module);
  }

  // The second half after a pack() that may have failed, on a rank that made room before the ranks agreed
  // on the counts.

  /// Local.
  static void make_room(const Counts& counts, const Communicator& communicator) {
    communicator.make_room_to_fail<float>(moe::detail::to_size(counts.floats));
    communicator.make_room_to_fail<double>(moe::detail::to_size(counts.doubles));
  }
  /// Throws Error on all ranks where `failure` is not null on one. Collective.
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

  /// Returns whether there are any numbers, with which the ranks told each other that none failed.
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

  /// Matrices one behind the other, by type.
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
    /// A number beside those of a matrix, of its type.
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

  Numbers kept_;
  std::vector<State> kept_states_;
  Numbers packed_;
};

/// Sums the gradients of all that every rank has a copy of over the ranks, once an update, after
/// the last backward pass and before clipping. ExpertParallel's own are left alone: its backward()
/// has summed the gate's, and its experts' are complete. Gradients are those of a loss of the whole
/// batch, so nothing is divided. The sums have the same bits everywhere, and with them the copies
/// stay the same. Collective.
template <class Module>
void sum_gradients(Module& module, const Communicator& communicator) {
  PartOf<Module, Residence::replicated> copies(module);
  GradientSum().sum(copies, communicator);
}

/// gradient_norm() of the whole model: what every rank has a copy of counts once. The same bits on
/// all ranks. Collective.
template <class Module>
double gradient_norm(const Module& module, const Communicator& communicator,
                     Updates updates = Updates::dense) {
  const PartOf<const Module, Residence::replicated, Residence::reduced> copies(module);
  const PartOf<const Module, Residence::sharded> own(module);
  double square = std::pow(moe::gradient_norm(own, updates), 2);
  communicator.sum(std::span<double>(&square, 1));
  return std::hypot(moe::gradient_norm(copies, updates), std::sqrt(square));
}

/// clip_gradients() by the norm of the whole model, after sum_gradients(). Collective.
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
