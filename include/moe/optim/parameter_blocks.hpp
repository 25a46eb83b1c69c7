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

/// Calls f(lane, index, parameter, first, count) for every block of every parameter, the blocks of
/// a lane in order, several lanes at once; index counts the parameters. It is one parallel region
/// for the whole module, since a layer of many experts has a thousand small parameters and waking
/// the workers for each would cost more than the work. Does not allocate. Throws
/// std::invalid_argument, before the first call, if a gradient has another shape than its value.
template <class Module, class F>
void for_each_parameter_block(Module& module, F&& f) {
  const auto run = [&](Index lane, Index) {
    Index index = 0;
    Index dealt = 0;
    for_each_parameter(module, [&](const ParameterName&, auto& parameter) {
      const Index size = parameter.size();
      const Index blocks = (size + optimizer_block - 1) / optimizer_block;
      const Index mine = (lane - dealt % optimizer_lanes + optimizer_lanes) % optimizer_lanes;
      for (Index b = mine; b < blocks; b += optimizer_lanes) {
        const Index first = b * optimizer_block;
        f(lane, index, parameter, first, std::min(optimizer_block, size - first));
      }
      dealt += blocks;
      ++index;
    });
  };
  for_each_parameter(module, [](const ParameterName& name, const auto& parameter) {
    const auto& [value, gradient] = parameter;
    if (value.rows() == gradient.rows() && value.cols() == gradient.cols()) return;
    require(false, name.string(), " is ", value.rows(), " x ", value.cols(), ", its gradient ",
            gradient.rows(), " x ", gradient.cols());
  });
  constexpr Index worth_waking = Index{1} << 15;
  if (parameter_count(module) >= worth_waking) {
    parallel_for(optimizer_lanes, run);
  } else {
    for (Index lane = 0; lane < optimizer_lanes; ++lane) run(lane, 0);
  }
}

}  // namespace moe::detail
