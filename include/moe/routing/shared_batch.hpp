#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <vector>

#include "moe/matrix.hpp"

/// \file
/// A batch that several processes share, of which a gate's x is a part.

namespace moe {

/// A batch whose rows are spread over several processes: first those of process 0, then those of process
/// 1, and so on. A gate that computes something of a batch as a whole, the sums of its losses or a
/// choice among tokens, finds it in Pass::batch; if that is null, x is all of the batch.
/// mpi::ExpertParallel makes one.
///
/// Sums, prefix sums and gathers are collective: every process makes the same calls in the same order. If
/// a process has thrown since the call before, the call throws on every process. A gate uses the batch
/// only during the forward() or evaluate() it is an argument of.
class SharedBatch {
 public:
  virtual ~SharedBatch() = default;

  virtual Index processes() const = 0;  ///< R, the number of processes that share the batch
  virtual Index process() const = 0;    ///< this process, in [0, R)

  virtual Index rows() const = 0;         ///< of all processes, padding included
  virtual Index first_row() const = 0;    ///< this process's first row among them
  virtual Index tokens() const = 0;       ///< rows of all processes that are not padding
  virtual Index first_token() const = 0;  ///< this process's first token among them

  /// Replaces each number by its sum over the processes, which has the same bits on all.
  virtual void sum(std::span<float> numbers) const = 0;
  /// The same for doubles.
  virtual void sum(std::span<double> numbers) const = 0;
  /// The same for whole numbers.
  virtual void sum(std::span<Index> numbers) const = 0;

  /// Replaces each number by its sum over the processes before this one, 0 in the first.
  virtual void prefix(std::span<Index> numbers) const = 0;

  /// Both at once: `numbers` become the result of prefix(), and `sums`, of the same length, that of sum().
  virtual void sum_and_prefix(std::span<Index> numbers, std::span<Index> sums) const {
    std::copy(numbers.begin(), numbers.end(), sums.begin());
    sum(sums);
    prefix_agreed(numbers);
  }

  /// `numbers` has a block for each process, all of one length. Every process fills its own block and
  /// gets those of the others. Call it only after make_room_to_gather() of at least as many numbers and a
  /// sum() after that, and if no process can have failed since the sum: this call does not find out
  /// whether one did.
  virtual void gather_agreed(std::span<Index> numbers) const = 0;
  /// Room for gather_agreed(). Local, not collective; may throw std::bad_alloc.
  virtual void make_room_to_gather(Index /*numbers*/) const {}

  /// prefix() after a sum() of at least as many numbers, if no process can have failed since then: this call
  /// does not find out whether one did.
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
/// fails knows from this list in which call the others wait, and takes part in that call to tell them.
/// So the processes need not agree before a call. All other calls of a gate are `_agreed`.
using SharedCalls = std::array<SharedCall, 2>;

/// The calls of a gate that makes a choice among the tokens of the batch, or none, and then sums a number
/// of figures.
inline SharedCalls shared_calls(const SharedCall& choice, Index figures) {
  const SharedCall sum{SharedCall::sum_of_figures, figures};
  return choice.kind == SharedCall::none ? SharedCalls{sum} : SharedCalls{choice, sum};
}

/// Sums several lists of numbers over the processes of a batch in one collective. They are sent as
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
