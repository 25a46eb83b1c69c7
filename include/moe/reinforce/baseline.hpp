#pragma once

/// \file
/// What is taken from a return, so that the sum of what was better and what was worse than expected
/// remains: the expectation of the gradient stays, its variance falls ([W92], see returns.hpp;
/// [R16], see schedule.hpp).

namespace moe {

/// b in the advantage R_t - b. It never depends on the symbols whose probability it weighs. A
/// sequence's return below is that of its first sampled step, and b is then the same at all its
/// steps: right for rewards at the end. Where rewards come at every step, late steps have less to
/// come, and of these baselines only the linear one knows.
enum class Baseline {
  none,          ///< 0
  running_mean,  ///< of the returns of the sequences in batches before
  linear,        ///< b_t = w·h_t + c in the policy's state, trained by squared error, with no
                 ///< gradient into the policy [R16 sec. 3.2.1]; needs a PolicyWithHidden
  greedy,        ///< the return of what the policy writes for the same input when it takes the most
                 ///< probable symbol at every step, without noise: S. Rennie, E. Marcheret,
                 ///< Y. Mroueh, J. Ross, V. Goel, "Self-critical Sequence Training for Image
                 ///< Captioning", CVPR 2017
  leave_one_out  ///< the mean return of the other samples for the same input: W. Kool, H. van Hoof,
                 ///< M. Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019
};

/// An exponential moving average. Two numbers, so that it can be saved and restored.
struct RunningMean {
  double sum = 0;
  double weight = 0;

  /// 0 before the first value.
  double mean() const { return weight > 0 ? sum / weight : 0; }

  /// The older values lose `rate` of their weight, which is 1 in the end.
  void add(double value, double rate) {
    sum += rate * (value - sum);
    weight += rate * (1 - weight);
  }
};

}  // namespace moe
