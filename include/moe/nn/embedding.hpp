#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "moe/kernels/simd.hpp"
#include "moe/parallel.hpp"
#include "moe/parameter.hpp"
#include "moe/random.hpp"

namespace moe {

/// y[t] = weight[ids[t]]: a row of D = `width` trained numbers for each word of a vocabulary.
template <class Scalar = float>
class Embedding {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    Index vocabulary = 0;      ///< at least 1
    Index width = 0;           ///< at least 1
    double init_stddev = 0.1;  ///< standard deviation of the normal initial weights, at least 0

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("vocabulary", self.vocabulary);
      visit("width", self.width);
      visit("init_stddev", self.init_stddev);
    }
  };

  /// The caller's scratch: what one pass computes and what its backward needs.
  struct Tape {
    Matrix<Scalar> y;        ///< T x D
    std::vector<Index> ids;  ///< T, a copy
    Index vocabulary = 0;    ///< of the embedding in the last forward()
    bool trained = false;    ///< whether the last pass was a forward()
  };

  Parameter<Scalar> weight;  ///< vocabulary x D

  /// Throws std::invalid_argument for a configuration out of range.
  Embedding(const Config& config, std::uint64_t seed) : config_(config) {
    detail::require(config.vocabulary >= 1, "Embedding::Config.vocabulary = ", config.vocabulary,
                    ", must be at least 1");
    detail::require(config.width >= 1, "Embedding::Config.width = ", config.width,
                    ", must be at least 1");
    detail::require(config.init_stddev >= 0 && std::isfinite(config.init_stddev),
                    "Embedding::Config.init_stddev = ", config.init_stddev,
                    ", must be finite and at least 0");
    weight = Parameter<Scalar>(config.vocabulary, config.width);
    fill_normal(weight.value, static_cast<Scalar>(config.init_stddev), seed);
  }

  /// The configuration.
  const Config& config() const { return config_; }

  /// Training pass: returns tape.y (T x D). Throws std::invalid_argument if an id is not in
  /// [0, vocabulary), or if ids overlap tape.ids.
  const Matrix<Scalar>& forward(IndexSpan ids, Tape& tape) const {
    detail::require_apart("Embedding::forward", "ids", ids, {tape.ids});
    evaluate(ids, tape);
    detail::copy_vector(ids, tape.ids);
    tape.vocabulary = config_.vocabulary;
    tape.trained = true;
    return tape.y;
  }

  /// Adds row t of dy (T x D) to the gradient of word ids[t], in the order of the tokens. Throws
  /// std::invalid_argument if dy has another shape, or without a forward pass on the tape.
  void backward(const MatrixRef<Scalar>& dy, const Tape& tape) {
    const auto tokens = static_cast<Index>(tape.ids.size());
    detail::require(tape.trained && tape.vocabulary == config_.vocabulary,
                    "Embedding::backward without a forward pass on this tape");
    detail::require(dy.rows() == tokens, "Embedding::backward: dy has ", dy.rows(),
                    " rows, there were ", tokens, " ids");
    detail::require(dy.cols() == config_.width, "Embedding::backward: dy has ", dy.cols(),
                    " columns, the embedding's width is ", config_.width);
    detail::check_shapes(*this, "Embedding");
    if (!weight.trained) return;
    Matrix<Scalar>& gradient = weight.gradient();
    const Index block = std::max<Index>(64, elements_in_task / std::max<Index>(1, tokens));
    parallel_for_blocks(config_.width, block, element_work(dy.size()),
                        [&](Index column, Index columns) {
                          for (Index t = 0; t < tokens; ++t) {
                            const Scalar* from = dy.data() + t * dy.outerStride() + column;
                            Scalar* to = gradient.row(tape.ids[detail::to_size(t)]).data() + column;
                            detail::add_scaled(columns, Scalar{1}, from, to);
                          }
                        });
  }

  /// forward() without the copy of the ids that backward() needs. Throws std::invalid_argument if
  /// an id is not in [0, vocabulary).
  const Matrix<Scalar>& evaluate(IndexSpan ids, Tape& tape) const {
    detail::check_shapes(*this, "Embedding");
    for (const Index id : ids) {
      detail::require(id >= 0 && id < config_.vocabulary, "Embedding: id ", id,
                      " is outside the vocabulary of ", config_.vocabulary);
    }
    const auto tokens = static_cast<Index>(ids.size());
    tape.trained = false;
    detail::resize(tape.y, tokens, config_.width);
    const Index block = std::max<Index>(1, elements_in_task / config_.width);
    parallel_for_blocks(tokens, block, element_work(tape.y.size()), [&](Index first, Index count) {
      for (Index t = first; t < first + count; ++t) {
        tape.y.row(t) = weight.value.row(ids[detail::to_size(t)]);
      }
    });
    return tape.y;
  }

  /// The same with a tape of its own, which allocates.
  Matrix<Scalar> evaluate(IndexSpan ids) const {
    Tape tape;
    evaluate(ids, tape);
    return std::move(tape.y);
  }

  /// "weight".
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight);
  }

 private:
  /// Fewer elements than this are copied or added faster than another worker wakes.
  static constexpr Index elements_in_task = Index{1} << 15;

  Config config_;
};

}  // namespace moe
