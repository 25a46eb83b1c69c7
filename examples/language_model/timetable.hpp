#pragma once

#include <algorithm>
#include <moe/moe.hpp>

#include "options.hpp"

/// \file
/// How long a training is, and what is to be done when.

namespace language_model {

/// What the gate's noise is multiplied by when this share of the training is over.
inline double noise_at(const Options& options, double fraction) {
  if (options.noise_until == 0) return options.noise;
  return options.noise * std::max(0.0, 1 - fraction / options.noise_until);
}

/// Where a training is.
struct Place {
  Index update = 0;    ///< the last one that was made
  double seconds = 0;  ///< since the first update was begun
};

/// It lasts for a number of readings of the text or for a time, as the options say.
class Timetable {
 public:
  /// `batches` are one reading of the text. The options must outlive this.
  Timetable(const Options& options, Index batches) : options_(options), batches_(batches) {
    const auto planned = static_cast<double>(batches) * options.epochs;
    total_ =
        options.minutes > 0 ? options.warm_up + 1 : std::max<Index>(1, static_cast<Index>(planned));
  }

  /// Begins the next update, `seconds` after the first one was begun.
  void next(double seconds) {
    ++update_;
    estimate(seconds);
  }

  /// Goes on from where place() was, with as many evaluations as these options say.
  void resume(const Place& place) {
    update_ = place.update;
    if (update_ > 0) estimate(place.seconds);
    evaluations_ = static_cast<Index>(fraction_ * static_cast<double>(options_.evaluations));
  }
  Place place(double seconds) const { return {update_, seconds}; }

  Index update() const { return update_; }
  Index total() const { return total_; }
  double fraction() const { return fraction_; }
  bool is_over() const { return fraction_ >= 1; }

  /// Of the update's batch; 0 where a reading begins.
  Index batch() const { return (update_ - 1) % batches_; }

  double learning_rate() const {
    return moe::WarmUpLinearDecay{.peak = options_.learning_rate,
                                  .warm_up = std::min(options_.warm_up, total_),
                                  .total = total_ + 1}(update_);
  }

  /// Of the update.
  double noise() const { return noise_at(options_, fraction_); }

  /// To be called once for each update.
  bool evaluation_is_due() {
    if (fraction_ * static_cast<double>(options_.evaluations) <
        static_cast<double>(evaluations_ + 1)) {
      return false;
    }
    ++evaluations_;
    return true;
  }

 private:
  /// How far the update is, and how many there will be.
  void estimate(double seconds) {
    if (options_.minutes > 0) {
      // How many updates there will be is an estimate that gets better; the learning rate and the
      // evaluations follow it.
      fraction_ = seconds / (60 * options_.minutes);
      total_ = std::max({update_, options_.warm_up + 1,
                         static_cast<Index>(static_cast<double>(update_) / fraction_)});
    } else {
      fraction_ = static_cast<double>(update_) / static_cast<double>(total_);
    }
  }

  const Options& options_;
  Index batches_;
  Index update_ = 0;
  Index total_ = 0;
  Index evaluations_ = 0;
  double fraction_ = 0;
};

}  // namespace language_model
