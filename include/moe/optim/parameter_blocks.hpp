#pragma once

#include <algorithm>
#include <type_traits>

#include "moe/parallel.hpp"
#include "moe/parameter.hpp"

namespace moe::detail {

/// Elements of a parameter that an optimizer updates at a time: its passes over them then stay in L2, and
/// memory is read and written once.
inline constexpr Index optimizer_block = 4096;

/// The number of lanes: block i of a module belongs to lane i mod optimizer_lanes. A constant, so that
/// sums over a lane have the same bits on any number of threads.
inline constexpr Index optimizer_lanes = 16;

/// Whether passes over a module leave a parameter out: because it is idle, or because its gradient is
/// stale and, the module being const, cannot be set to zeros.
template <class Scalar>
bool is_passed_by(const Parameter<Scalar>& parameter, Updates updates) {
  return is_idle(parameter, updates) || parameter.stored.is_stale();
}

/// Prepares the gradients of a module for passes over its parameters: stale ones of parameters that are
/// not left out are set to zeros. Returns the number of scalars in these parameters. Throws
/// std::invalid_argument, with no number changed, if a gradient has another shape than its value.
template <class Module>
Index prepare_gradients(Module& module, Updates updates) {
  Index scalars = 0;
  walk_parameters(module, [&](const ParameterName& name, auto& parameter) {
    if constexpr (!std::is_const_v<std::remove_reference_t<decltype(parameter)>>) {
      if (!is_idle(parameter, updates)) parameter.gradient();
    }
    const auto& value = parameter.value;
    const auto& gradient = parameter.stored.memory;
    if (gradient.size() == 0 ||
        (value.rows() == gradient.rows() && value.cols() == gradient.cols())) {
      if (!is_passed_by(parameter, updates)) scalars += parameter.size();
      return;
    }
    require(false, name.string(), " is ", value.rows(), " x ", value.cols(), ", its gradient ",
            gradient.rows(), " x ", gradient.cols());
  });
  return scalars;
}

/// The number of tasks for passes over the given number of scalars. Every task visits all parameters, and
/// the blocks of one task are the farther apart the more tasks there are. So there are only two
/// tasks per worker, for balance, and no task with too little work.
inline Index optimizer_tasks(Index scalars) {
  constexpr Index worth_a_task = Index{1} << 14;
  const Index workers = worker_count(element_work(scalars));
  const Index most = workers > 1 ? std::min(2 * workers, optimizer_lanes) : 1;
  return std::clamp(scalars / worth_a_task, Index{1}, most);
}

/// Replaces the compiler's message about the arguments of F, the function of an optimizer that is called with
/// a parameter.
template <class F, class... Arguments>
struct CheckScalarOfModule {
  static_assert(std::is_invocable_v<F&, Arguments...>,
                "an optimizer has the Scalar of its module: Adam<float> for one of floats");
};

/// Calls f(lane, index, parameter, first, count) for every block of every parameter that is not
/// idle, the blocks of a lane in order, several lanes at once; index counts the parameters. The blocks
/// of idle parameters are counted too, so that no other block moves to another lane when they are
/// left out. There is one parallel region for the whole module: a layer of many experts has
/// thousands of small parameters, and waking the workers for each would take longer than the work.
/// Allocates only the memory of gradients that have none yet. Throws std::invalid_argument, before the
/// first call, if a gradient has another shape than its value.
template <class Module, class F>
void for_each_parameter_block(Module& module, Updates updates, F&& f) {
  const Index tasks = optimizer_tasks(prepare_gradients(module, updates));
  parallel_for(tasks, [&](Index task, Index) {
    const Index first_lane = task * optimizer_lanes / tasks;
    const Index last_lane = (task + 1) * optimizer_lanes / tasks - 1;
    Index index = 0;
    Index dealt = 0;
    walk_parameters(module, [&](const ParameterName&, auto& parameter) {
      const Index size = parameter.size();
      const Index blocks = (size + optimizer_block - 1) / optimizer_block;
      (void)CheckScalarOfModule<F, Index, Index, decltype(parameter), Index, Index>();
      if (!is_passed_by(parameter, updates)) {
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

/// Calls f(index, parameter, worker) for every parameter that is not idle and for which
/// chosen(parameter) is true, several at once, in one parallel region like
/// for_each_parameter_block(). The gradients must be prepared. Does not allocate.
template <class Module, class Chosen, class F>
void for_each_whole_parameter(Module& module, Updates updates, Chosen&& chosen, F&& f) {
  Index scalars = 0;
  const auto takes_part = [&](const auto& parameter) {
    return parameter.size() > 0 && !is_passed_by(parameter, updates) && chosen(parameter);
  };
  walk_parameters(module, [&](const ParameterName&, const auto& parameter) {
    if (takes_part(parameter)) scalars += parameter.size();
  });
  const Index tasks = optimizer_tasks(scalars);
  parallel_for(tasks, [&](Index task, Index worker) {
    Index index = 0;
    Index dealt = 0;
    walk_parameters(module, [&](const ParameterName&, auto& parameter) {
      const Index i = index++;
      if (!takes_part(parameter)) return;
      (void)CheckScalarOfModule<F, Index, decltype(parameter), Index>();
      if (dealt * tasks / scalars == task) f(i, parameter, worker);
      dealt += parameter.size();
    });
  });
}

}  // namespace moe::detail
