#pragma once

#include <cmath>
#include <moe/moe.hpp>
#include <span>
#include <vector>

/// \file
/// Attention: which letters a phoneme depends on.

namespace pronounce {

using moe::Index;

/// Attention by scaled dot products. M. Luong, H. Pham, C. Manning, "Effective Approaches to
/// Attention-based Neural Machine Translation", EMNLP 2015; the scale is that of A. Vaswani et al.,
/// "Attention Is All You Need", NeurIPS 2017. For a row that reads word w with query q:
///
///     α_j = softmax over the letters j of w of ⟨q, key_j⟩ / √A        context = Σ_j α_j·value_j
///
/// The letters of all words stand one after the other in the rows of keys and values; those of word
/// w are offsets[w] up to offsets[w + 1].
template <class Scalar>
class Attention {
  using Matrix = moe::Matrix<Scalar>;

 public:
  struct Tape {
    std::vector<Index> words;  ///< of each row
    Matrix query;              ///< T x A, a copy
    Matrix alpha;              ///< T x letters of the longest word
    Matrix context;            ///< T x D
    Matrix dquery;             ///< T x A
    Matrix dkeys;              ///< letters x A
    Matrix dvalues;            ///< letters x D
  };

  /// A word's letters.
  struct Letters {
    std::span<const Index> offsets;
    const Matrix& keys;
    const Matrix& values;

    Index words() const { return static_cast<Index>(offsets.size()) - 1; }
    Index first(Index word) const { return offsets[static_cast<std::size_t>(word)]; }
    Index count(Index word) const { return first(word + 1) - first(word); }
  };

  static const Matrix& forward(const Matrix& query, std::span<const Index> words,
                               const Letters& letters, Tape& tape) {
    tape.words.assign(words.begin(), words.end());
    tape.query = query;
    Index longest = 0;
    for (Index w = 0; w < letters.words(); ++w) longest = std::max(longest, letters.count(w));
    tape.alpha.resize(query.rows(), longest);
    tape.context.setZero(query.rows(), letters.values.cols());
    const Scalar scale = scale_of(query);
    const moe::Work work{2 * query.size() * longest};
    moe::parallel_for_blocks(query.rows(), 32, work, [&](Index from, Index count) {
      for (Index i = from; i < from + count; ++i) {
        const Index word = words[static_cast<std::size_t>(i)];
        const Index first = letters.first(word);
        const Index length = letters.count(word);
        Scalar* alpha = tape.alpha.row(i).data();
        for (Index j = 0; j < length; ++j) {
          alpha[j] = scale * moe::detail::dot(query.cols(), query.row(i).data(),
                                              letters.keys.row(first + j).data());
        }
        const auto softmax = moe::detail::softmax_row(length, alpha, alpha);
        for (Index j = 0; j < length; ++j) {
          alpha[j] /= static_cast<Scalar>(softmax.sum);
          moe::detail::add_scaled(tape.context.cols(), alpha[j],
                                  letters.values.row(first + j).data(), tape.context.row(i).data());
        }
      }
    });
    return tape.context;
  }

  /// Leaves the gradients by query, keys and values in the tape:
  ///
  ///     dα_j = ⟨dcontext, value_j⟩        ds_j = α_j·(dα_j - Σ α·dα) / √A
  ///     dquery = Σ_j ds_j·key_j           dkey_j += ds_j·query      dvalue_j += α_j·dcontext
  ///
  /// Every row belongs to one word, so words are the tasks; a sum goes over rows in their order.
  static void backward(const Matrix& dcontext, const Letters& letters, Tape& tape) {
    tape.dquery.setZero(tape.query.rows(), tape.query.cols());
    tape.dkeys.setZero(letters.keys.rows(), letters.keys.cols());
    tape.dvalues.setZero(letters.values.rows(), letters.values.cols());
    std::vector<std::vector<Index>> rows(static_cast<std::size_t>(letters.words()));
    for (std::size_t i = 0; i < tape.words.size(); ++i) {
      rows[static_cast<std::size_t>(tape.words[i])].push_back(static_cast<Index>(i));
    }
    const Scalar scale = scale_of(tape.query);
    const moe::Work work{4 * tape.query.size() * tape.alpha.cols()};
    moe::parallel_for_blocks(letters.words(), 8, work, [&](Index from, Index count) {
      std::vector<Scalar> dalpha(static_cast<std::size_t>(tape.alpha.cols()));
      for (Index word = from; word < from + count; ++word) {
        const Index first = letters.first(word);
        const Index length = letters.count(word);
        for (const Index i : rows[static_cast<std::size_t>(word)]) {
          const Scalar* alpha = tape.alpha.row(i).data();
          Scalar mean{0};
          for (Index j = 0; j < length; ++j) {
            Scalar& d = dalpha[static_cast<std::size_t>(j)];
            d = moe::detail::dot(dcontext.cols(), dcontext.row(i).data(),
                                 letters.values.row(first + j).data());
            mean += alpha[j] * d;
            moe::detail::add_scaled(dcontext.cols(), alpha[j], dcontext.row(i).data(),
                                    tape.dvalues.row(first + j).data());
          }
          for (Index j = 0; j < length; ++j) {
            const Scalar ds = scale * alpha[j] * (dalpha[static_cast<std::size_t>(j)] - mean);
            moe::detail::add_scaled(tape.query.cols(), ds, letters.keys.row(first + j).data(),
                                    tape.dquery.row(i).data());
            moe::detail::add_scaled(tape.query.cols(), ds, tape.query.row(i).data(),
                                    tape.dkeys.row(first + j).data());
          }
        }
      }
    });
  }

 private:
  static Scalar scale_of(const Matrix& query) {
    return Scalar{1} / std::sqrt(static_cast<Scalar>(query.cols()));
  }
};

}  // namespace pronounce
