#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <moe/moe.hpp>
#include <moe/weights/narrow_linear.hpp>
#include <span>
#include <utility>
#include <vector>

/// \file
/// A softmax over many words that costs little for most of them.

namespace language_model {

using moe::Index;

/// The adaptive softmax. E. Grave, A. Joulin, M. Cissé, D. Grangier, H. Jégou, "Efficient softmax
/// approximation for GPUs", ICML 2017 (arXiv 1609.04309).
///
/// Words are numbered by falling frequency and cut into ranges. The head is a softmax over the first
/// range and one entry for each further range, a tail:
///
///     log p(w) = log p_head(w)                                w in the head
///     log p(w) = log p_head(tail) + log p_tail(w)             w in a tail
///
/// A tail is a projection D -> d, d < D, and a softmax over its own words. Training and perplexity
/// need it only for the tokens whose target lies in it, which are few. The probabilities of all
/// words add up to one, so the perplexity is exact. Without a cutoff it is the full softmax.
///
/// `Linear` is a moe::Linear, or a moe::NarrowLinear to serve.
template <class Scalar = float, class Linear = moe::Linear<Scalar>>
class AdaptiveSoftmax {
  using Matrix = moe::Matrix<Scalar>;
  using CrossEntropy = moe::SoftmaxCrossEntropy<Scalar>;

 public:
  struct Config {
    Index vocabulary = 0;
    Index width = 0;               ///< D, of the input
    std::vector<Index> cutoffs{};  ///< the first word of each tail, rising; those >= vocabulary do
                                   ///< not count
    Index shrink = 2;              ///< a tail's width d is that of the range before by this
  };

  struct TailTape {
    std::vector<Index> rows;     ///< the tokens whose target is in the tail
    std::vector<Index> targets;  ///< theirs, within the tail
    Matrix x;                    ///< their inputs
    typename Linear::Tape projection, words;
    typename CrossEntropy::Tape loss;
  };

  struct Tape {
    std::vector<Index> targets;  ///< T, words of the head and entries of tails
    typename Linear::Tape head;
    typename CrossEntropy::Tape loss;
    std::vector<TailTape> tails;
    Matrix dx;
  };

  AdaptiveSoftmax(const Config& config, std::uint64_t seed)
      : vocabulary_(config.vocabulary), starts_(starts_of(config)), head_(head_of(config, seed)) {
    Index width = config.width;
    for (std::size_t i = 0; i + 2 < starts_.size(); ++i) {
      width = std::max<Index>(1, width / config.shrink);
      const std::uint64_t tail_seed = moe::derive_seed(seed, i + 1);
      tails_.push_back(
          {Linear({.inputs = config.width, .outputs = width, .bias = false}, tail_seed),
           Linear({.inputs = width, .outputs = starts_[i + 2] - starts_[i + 1]},
                  moe::derive_seed(tail_seed, 1))});
    }
  }

  /// One that was trained, its weights rounded.
  AdaptiveSoftmax(const AdaptiveSoftmax<Scalar>& trained, const moe::NarrowOptions& options)
      : vocabulary_(trained.vocabulary_), starts_(trained.starts_), head_(trained.head_, options) {
    for (const auto& tail : trained.tails_) {
      tails_.push_back({Linear(tail.projection, options), Linear(tail.words, options)});
    }
  }

  /// Starts the bias of every word at the logarithm of its frequency (in a tail relative to the
  /// tail), which is the best guess of a model that knows nothing else, and costs a hundred updates
  /// to learn.
  void start_from_frequencies(std::span<const double> frequencies) {
    const Index words = starts_[1];
    start_from_frequencies(head_, frequencies.first(moe::detail::to_size(words)), 1);
    for (std::size_t i = 0; i < tails_.size(); ++i) {
      const Index first = starts_[i + 1];
      const auto own = frequencies.subspan(moe::detail::to_size(first),
                                           moe::detail::to_size(starts_[i + 2] - first));
      double mass = 0;
      for (const double frequency : own) mass += frequency;
      head_.bias.value(0, words + static_cast<Index>(i)) = static_cast<Scalar>(std::log(mass));
      start_from_frequencies(tails_[i].words, own, mass);
    }
  }

  /// The mean over tokens of -log p(target) in nats; x T x D, targets in [0, vocabulary).
  double forward(const Matrix& x, std::span<const Index> targets, Tape& tape) const {
    return run<true>(x, targets, tape);
  }

  /// Adds to the gradients and returns dx, those of `factor` times the loss. The tape is that of
  /// forward.
  const Matrix& backward(Tape& tape, double factor = 1) {
    if (factor != 1) tape.loss.dlogits *= static_cast<Scalar>(factor);
    tape.dx = head_.backward(cross_entropy_.backward(tape.loss), tape.head);
    for (std::size_t i = 0; i < tails_.size(); ++i) {
      TailTape& t = tape.tails[i];
      // The tail's loss is a mean over its own tokens, the whole loss one over all.
      t.loss.dlogits *= static_cast<Scalar>(share(t, tape) * factor);
      const Matrix& dhidden = tails_[i].words.backward(cross_entropy_.backward(t.loss), t.words);
      const Matrix& dx = tails_[i].projection.backward(dhidden, t.projection);
      for (std::size_t r = 0; r < t.rows.size(); ++r) {
        tape.dx.row(t.rows[r]) += dx.row(static_cast<Index>(r));
      }
    }
    return tape.dx;
  }

  /// forward()'s loss without what backward needs.
  double evaluate(const Matrix& x, std::span<const Index> targets, Tape& tape) const {
    return run<false>(x, targets, tape);
  }

  /// The logarithm of the probability of every word, T x vocabulary; costs a full softmax.
  Matrix log_probabilities(const Matrix& x) const {
    TailTape tape;
    const Matrix head = log_softmax(head_.evaluate(x));
    const Index words = starts_[1];
    Matrix result(x.rows(), vocabulary_);
    result.leftCols(words) = head.leftCols(words);
    for (std::size_t i = 0; i < tails_.size(); ++i) {
      const Matrix tail = log_softmax(tail_logits<false>(tails_[i], x, tape));
      result.middleCols(starts_[i + 1], tail.cols()) =
          tail.colwise() + head.col(words + static_cast<Index>(i));
    }
    return result;
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("head", self.head_);
    visit("tails", self.tails_);
  }

 private:
  template <class, class>
  friend class AdaptiveSoftmax;

  struct Tail {
    Linear projection;
    Linear words;

    template <class Self, class Visitor>
    static void visit_parameters(Self& self, Visitor visit) {
      visit("projection", self.projection);
      visit("words", self.words);
    }
  };

  /// The first word of each range, and the end of the last.
  static std::vector<Index> starts_of(const Config& config) {
    moe::detail::require(config.shrink >= 1, "AdaptiveSoftmax::Config.shrink = ", config.shrink,
                         ", must be at least 1");
    std::vector<Index> starts{0};
    for (const Index cutoff : config.cutoffs) {
      if (cutoff >= config.vocabulary) continue;
      moe::detail::require(cutoff > starts.back(), "AdaptiveSoftmax::Config.cutoffs: ", cutoff,
                           " after ", starts.back(), ", they must rise");
      starts.push_back(cutoff);
    }
    starts.push_back(config.vocabulary);
    return starts;
  }

  /// Needs starts_.
  Linear head_of(const Config& config, std::uint64_t seed) const {
    const auto tails = static_cast<Index>(starts_.size()) - 2;
    return Linear({.inputs = config.width, .outputs = starts_[1] + tails}, seed);
  }

  static void start_from_frequencies(Linear& words, std::span<const double> frequencies,
                                     double mass) {
    for (std::size_t i = 0; i < frequencies.size(); ++i) {
      words.bias.value(0, static_cast<Index>(i)) =
          static_cast<Scalar>(std::log(frequencies[i] / mass));
    }
  }

  /// Deals the tokens to the ranges of their targets.
  void assign(std::span<const Index> targets, Tape& tape) const {
    tape.targets.assign(targets.begin(), targets.end());
    tape.tails.resize(tails_.size());
    for (TailTape& tail : tape.tails) {
      tail.rows.clear();
      tail.targets.clear();
    }
    for (std::size_t row = 0; row < targets.size(); ++row) {
      const Index word = targets[row];
      moe::detail::require(word >= 0 && word < vocabulary_, "AdaptiveSoftmax: target ", word,
                           " is outside the vocabulary of ", vocabulary_);
      if (word < starts_[1]) continue;
      const auto next = std::upper_bound(starts_.begin(), starts_.end(), word);
      const Index range = next - starts_.begin() - 1;
      TailTape& tail = tape.tails[moe::detail::to_size(range - 1)];
      tail.rows.push_back(static_cast<Index>(row));
      tail.targets.push_back(word - *(next - 1));
      tape.targets[row] = starts_[1] + range - 1;
    }
  }

  static void gather(const Matrix& x, TailTape& tail) {
    tail.x.resize(static_cast<Index>(tail.rows.size()), x.cols());
    for (std::size_t r = 0; r < tail.rows.size(); ++r) {
      tail.x.row(static_cast<Index>(r)) = x.row(tail.rows[r]);
    }
  }

  static double share(const TailTape& tail, const Tape& tape) {
    return static_cast<double>(tail.rows.size()) / static_cast<double>(tape.targets.size());
  }

  // Forward passes, or evaluations where `trains` is false.

  template <bool trains>
  double run(const Matrix& x, std::span<const Index> targets, Tape& tape) const {
    assign(targets, tape);
    double loss = loss_of<trains>(pass<trains>(head_, x, tape.head), tape.targets, tape.loss);
    for (std::size_t i = 0; i < tails_.size(); ++i) {
      TailTape& t = tape.tails[i];
      gather(x, t);
      loss += share(t, tape) *
              loss_of<trains>(tail_logits<trains>(tails_[i], t.x, t), t.targets, t.loss);
    }
    return loss;
  }
  template <bool trains>
  static const Matrix& tail_logits(const Tail& tail, const Matrix& x, TailTape& tape) {
    return pass<trains>(tail.words, pass<trains>(tail.projection, x, tape.projection), tape.words);
  }
  template <bool trains>
  static const Matrix& pass(const Linear& linear, const Matrix& x, typename Linear::Tape& tape) {
    if constexpr (trains) {
      return linear.forward(x, tape);
    } else {
      return linear.evaluate(x, tape);
    }
  }
  template <bool trains>
  double loss_of(const Matrix& logits, std::span<const Index> targets,
                 typename CrossEntropy::Tape& tape) const {
    return trains ? cross_entropy_.forward(logits, targets, tape)
                  : cross_entropy_.evaluate(logits, targets, tape);
  }

  static Matrix log_softmax(const Matrix& logits) {
    const moe::Vector<Scalar> largest = logits.rowwise().maxCoeff();
    const Matrix shifted = logits.colwise() - largest;
    const moe::Vector<Scalar> sums = shifted.array().exp().rowwise().sum().log();
    return shifted.colwise() - sums;
  }

  Index vocabulary_;
  std::vector<Index> starts_;
  Linear head_;
  std::vector<Tail> tails_;
  CrossEntropy cross_entropy_;
};

}  // namespace language_model
