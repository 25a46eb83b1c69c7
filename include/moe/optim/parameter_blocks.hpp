#pragma once

#include <algorithm>

#include "moe/parallel.hpp"
#include "moe/parameter.hpp"

namespace moe::detail {

/// Elements of a parameter that an optimizer works on at once: what its passes touch of them stays
/// in the second-level cache, so memory is read and written once.
inline constexpr Index optimizer_block = 4096;

/// Into how many lanes the blocks of a module are dealt, one after the other. A constant, so that
/// what a lane adds up has the same bits on any number of threads.
inline constexpr Index optimizer_lanes = 16;

/// Calls f(lane, index, parameter, first, count) for every block of every parameter that is not
/// idle, the blocks of a lane in order, several lanes at once; index counts the parameters. An idle
/// parameter's blocks are dealt all the same, so that leaving it out moves no other block to another
/// lane. It is one parallel region for the whole module, since a layer of many experts has a
/// thousand small parameters and waking the workers for each would cost more than the work. Does
/// not allocate. Throws std::invalid_argument, before the first call, if a gradient has another
/// shape than its value.
template <class Module, class F>
void for_each_parameter_block(Module& module, Updates updates, F&& f) {
  const auto passes_by = [updates](const auto& parameter) {
    // Of a const module a gradient that stands for zero cannot be made so.
    return is_idle(parameter, updates) || parameter.gradient_state == GradientState::cleared;
  };
  Index scalars = 0;
  walk_parameters(module, [&](const ParameterName& name, auto& parameter) {
    if (updates == Updates::dense) settle(parameter);
    const auto& value = parameter.value;
    const auto& gradient = parameter.gradient;
    if (value.rows() == gradient.rows() && value.cols() == gradient.cols()) {
      if (!passes_by(parameter)) scalars += parameter.size();
      return;
    }
    require(false, name.string(), " is ", value.rows(), " x ", value.cols(), ", its gradient ",
            gradient.rows(), " x ", gradient.cols());
  });
  // Every task walks over all parameters, and few lanes at once make for short runs through memory,
  // so there are two tasks a worker for balance and none without enough to do.
  constexpr Index worth_a_task = Index{1} << 14;
  const Index workers = worker_count();
  const Index most = workers > 1 ? std::min(2 * workers, optimizer_lanes) : 1;
  const Index tasks = std::clamp(scalars / worth_a_task, Index{1}, most);
  parallel_for(tasks, [&](Index task, Index) {
    const Index first_lane = task * optimizer_lanes / tasks;
    const Index last_lane = (task + 1) * optimizer_lanes / tasks - 1;
    Index index = 0;
    Index dealt = 0;
    walk_parameters(module, [&](const ParameterName&, auto& parameter) {
      const Index size = parameter.size();
      const Index blocks = (size + optimizer_block - 1) / optimizer_block;
      if (!passes_by(parameter)) {
        for (Index b = 0; b < blocks; ++b) {
          const Index lane = (dealt + b) % optimizer_lanes;
          if (lane < first_lane || lane > last_lane) continue;
          const Index first = b * optimizer_block;
          f(lane, index, parameter, first, std::min(optimizer_block, size - first));
        }
      }
      dealt += blocks;
      ++index;
    });
  });
}

}  // namespace moe::detail
