#pragma once

#include <cmath>

#include "moe/matrix.hpp"

/// \file
/// Learning-rate schedules: the rate as a function of the number of the update, counted from 1.
///
///     const moe::WarmUpInverseSquareRoot schedule{.peak = 1e-3, .warm_up = 1000};
///     adam.update(model, schedule(step));

namespace moe {

namespace detail {

inline void check_step(Index step) {
  require(step >= 1, "learning rate: step = ", step, ", must be at least 1");
}

}  // namespace detail

/// Grows linearly to `peak` at step `warm_up`, then falls with the inverse square root of the step
/// [Shazeer et al. 2017, App. C.1].
struct WarmUpInverseSquareRoot {
  double peak = 1e-3;    ///< the largest rate
  Index warm_up = 1000;  ///< at least 1

  /// Throws std::invalid_argument if warm_up or the step is below 1.
  double operator()(Index step) const {
    detail::check_step(step);
    detail::require(warm_up >= 1, "WarmUpInverseSquareRoot.warm_up = ", warm_up,
                    ", must be at least 1");
    const double ratio = static_cast<double>(step) / static_cast<double>(warm_up);
    return peak * (step <= warm_up ? ratio : 1 / std::sqrt(ratio));
  }
};

/// Grows linearly to `peak` at step `warm_up`, then falls linearly to 0 at step `total` and stays 0.
struct WarmUpLinearDecay {
  double peak = 1e-3;    ///< the largest rate
  Index warm_up = 1000;  ///< at least 0
  Index total = 100000;  ///< above warm_up

  /// Throws std::invalid_argument if warm_up or total is out of range or the step is below 1.
  double operator()(Index step) const {
    detail::check_step(step);
    detail::require(warm_up >= 0, "WarmUpLinearDecay.warm_up = ", warm_up, ", must be at least 0");
    detail::require(total > warm_up, "WarmUpLinearDecay.total = ", total,
                    ", must be above warm_up = ", warm_up);
    if (step <= warm_up) return peak * static_cast<double>(step) / static_cast<double>(warm_up);
    if (step >= total) return 0;
    return peak * static_cast<double>(total - step) / static_cast<double>(total - warm_up);
  }
};

}  // namespace moe
