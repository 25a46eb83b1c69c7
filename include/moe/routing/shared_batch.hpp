#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <vector>

#include "moe/matrix.hpp"

/// \file
/// The batch that a gate's x is a part of, where several processes share one.

namespace moe {

/// A batch whose tokens are spread over several processes, each with a few rows of it: first those
/// of process 0, then those of process 1, and so on. A gate that looks at a batch as a whole, for
/// the sums of its losses or for a choice among tokens, finds it in Pass::batch; where that is null,
/// x is all of the batch. mpi::ExpertParallel makes one.
///
/// Sums and prefixes are collective: every process makes the same ones in the same order. They throw,
/// on every process, when one of them has thrown since the call before. A gate uses the batch
/// during the pass that it is given to; what backward() needs of it is in the gate's tape.
class SharedBatch {
 public:
  virtual ~SharedBatch() = default;

  virtual Index processes() const = 0;  ///< R, how many share the batch
  virtual Index process() const = 0;    ///< which of them this one is

  virtual Index rows() const = 0;         ///< of all processes, padding included
  virtual Index first_row() const = 0;    ///< the place of this process's first one among them
  virtual Index tokens() const = 0;       ///< of all processes: rows that are no padding
  virtual Index first_token() const = 0;  ///< the place of this process's first one among them

  /// Replaces each number by its sum over the processes, which has the same bits on all.
  virtual void sum(std::span<float> numbers) const = 0;
  virtual void sum(std::span<double> numbers) const = 0;
  virtual void sum(std::span<Index> numbers) const = 0;

  /// Replaces each number by its sum over the processes before this one, 0 in the first.
  virtual void prefix(std::span<Index> numbers) const = 0;

  /// Both: `numbers` become those of prefix() and `sums`, as many, those of sum().
  virtual void sum_and_prefix(std::span<Index> numbers, std::span<Index> sums) const {
    std::copy(numbers.begin(), numbers.end(), sums.begin());
    sum(sums);
    prefix_agreed(numbers);
  }

  /// `numbers` are a block for each process, of one length; every process fills its own, and gets those
  /// of the others. After a sum() of at least as many numbers, as the next two.
  virtual void gather_agreed(std::span<Index> numbers) const = 0;

  /// sum() and prefix() after a sum() of at least as many numbers since which no process can have
  /// failed: spares finding out whether one did.
  virtual void sum_agreed(std::span<Index> numbers) const { sum(numbers); }
  virtual void prefix_agreed(std::span<Index> numbers) const { prefix(numbers); }
};

namespace detail {

/// A call of a SharedBatch that a gate of this library makes in every pass.
struct SharedCall {
  enum Kind { none, sum_of_counts, sum_and_prefix, sum_of_figures };
  Kind kind = none;
  Index numbers = 0;

  bool operator==(const SharedCall&) const = default;
};
/// The calls before which a process can have failed, in their order, `none` at the end. A process that
/// fails knows from these in which one the others wait, takes part in it and says so there; so that
/// no process has to ask the others before a call. All else that a gate calls is `_agreed`.
using SharedCalls = std::array<SharedCall, 2>;

/// Of a gate that makes a choice among the tokens of the batch, or none, and then sums its figures.
inline SharedCalls shared_calls(const SharedCall& choice, Index figures) {
  const SharedCall sum{SharedCall::sum_of_figures, figures};
  return choice.kind == SharedCall::none ? SharedCalls{sum} : SharedCalls{choice, sum};
}

/// Sums several lists of numbers over the processes of a batch in one collective. They travel as
/// double, in which counts are exact. Does nothing where the batch is null.
class BatchSum {
 public:
  explicit BatchSum(const SharedBatch* batch) : batch_(batch) {}

  /// `numbers` must stay where they are until sum().
  template <class Number>
  void add(Number* numbers, Index count) {
    if (batch_ == nullptr) return;
    parts_.push_back({numbers, count, [](const double* from, void* to, Index size) {
                        for (Index i = 0; i < size; ++i) {
                          static_cast<Number*>(to)[i] = static_cast<Number>(from[i]);
                        }
                      }});
    for (Index i = 0; i < count; ++i) packed_.push_back(static_cast<double>(numbers[i]));
  }

  /// Replaces each number by its sum.
  void sum() {
    if (batch_ == nullptr) return;
    batch_->sum(std::span<double>(packed_));
    const double* from = packed_.data();
    for (const Part& part : parts_) {
      part.unpack(from, part.numbers, part.count);
      from += part.count;
    }
  }

 private:
  struct Part {
    void* numbers;
    Index count;
    void (*unpack)(const double* from, void* to, Index size);
  };
  const SharedBatch* batch_;
  std::vector<double> packed_;
  std::vector<Part> parts_;
};

}  // namespace detail
}  // namespace moe
