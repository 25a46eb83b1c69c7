#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

#include "moe/matrix.hpp"
#include "moe/random.hpp"

namespace moe {

/// Puts the values in a random order, a function of the seed alone, on every platform: Fisher and Yates'
/// shuffle. (The order of std::shuffle depends on the standard library.)
template <class Value>
void shuffle(std::vector<Value>& values, std::uint64_t seed) {
  for (std::size_t i = values.size(); i > 1; --i) {
    const std::uint64_t number = i;
    const auto bits = philox(
        {static_cast<std::uint32_t>(number), static_cast<std::uint32_t>(number >> 32), 0, 0}, seed);
    const std::uint64_t wide = (std::uint64_t{bits[0]} << 32) | bits[1];
    std::swap(values[i - 1], values[wide % i]);
  }
}

/// The rows of a data set in an order drawn for one epoch, cut into batches; the last batch is smaller if
/// batch_rows does not divide the number of rows. Every row comes once. With gather_rows() a batch is copied
/// out of the data:
///
///     for (const moe::IndexSpan rows :
///          moe::Batches({.rows = images.rows(), .batch_rows = 64, .seed = 1}, epoch)) {
///       moe::gather_rows(images, rows, x);
///       moe::gather_rows(labels, rows, y);
///     }
///
/// The order is a function of (seed, epoch) alone, so a run that was interrupted goes on with batch b of
/// its epoch, batches[b]. A Batches holds one Index for each row of the data.
class Batches {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    Index rows = 0;        ///< of the data, N >= 0
    Index batch_rows = 0;  ///< of each batch but the last, >= 1
    Seed seed;             ///< of the orders
  };

  /// Goes through the batches; its values are spans of row numbers, valid as long as the Batches.
  class Iterator {
   public:
    using iterator_category = std::input_iterator_tag;  ///< for algorithms
    using value_type = IndexSpan;                       ///< the rows of a batch
    using difference_type = std::ptrdiff_t;             ///< for algorithms
    using pointer = const IndexSpan*;                   ///< for algorithms
    using reference = IndexSpan;                        ///< made anew at each access

    /// Batch `batch` of `batches`.
    Iterator(const Batches& batches, Index batch) : batches_(&batches), batch_(batch) {}
    IndexSpan operator*() const { return (*batches_)[batch_]; }  ///< the rows of the batch
    /// Goes on to the next batch.
    Iterator& operator++() {
      ++batch_;
      return *this;
    }
    /// The same; returns where it was.
    Iterator operator++(int) {
      const Iterator before = *this;
      ++*this;
      return before;
    }
    bool operator==(const Iterator& other) const = default;  ///< whether both are at the same batch

   private:
    const Batches* batches_;
    Index batch_;
  };

  /// The batches of epoch `epoch`. Throws std::invalid_argument for a configuration out of range.
  Batches(const Config& config, std::uint64_t epoch) : config_(config) {
    detail::require(config.rows >= 0, "Batches::Config.rows = ", config.rows,
                    ", must be at least 0");
    detail::require(config.batch_rows >= 1, "Batches::Config.batch_rows = ", config.batch_rows,
                    ", must be at least 1");
    order_.resize(detail::to_size(config.rows));
    std::iota(order_.begin(), order_.end(), Index{0});
    shuffle(order_, derive_seed(config.seed, epoch));
  }

  /// The configuration.
  const Config& config() const { return config_; }

  /// The number of batches, N / batch_rows rounded up.
  Index count() const {
    return config_.rows / config_.batch_rows + (config_.rows % config_.batch_rows != 0);
  }

  /// The rows of a batch, 0 <= batch < count(), valid as long as this object. Throws
  /// std::invalid_argument for another one.
  IndexSpan operator[](Index batch) const {
    detail::require(batch >= 0 && batch < count(), "Batches: batch = ", batch, ", must be in [0, ",
                    count(), ")");
    const Index first = batch * config_.batch_rows;
    return std::span(order_).subspan(
        detail::to_size(first),
        detail::to_size(std::min(config_.batch_rows, config_.rows - first)));
  }

  Iterator begin() const { return {*this, 0}; }      ///< the first batch
  Iterator end() const { return {*this, count()}; }  ///< after the last batch

 private:
  Config config_;
  std::vector<Index> order_;
};

}  // namespace moe
