#pragma once

#include <algorithm>
#include <type_traits>

#include "moe/parallel.hpp"
#include "moe/parameter.hpp"

namespace moe::detail {

/// Elements of a parameter that an optimizer works on at once: what its passes touch of them stays
/// in L2, so memory is read and written once.
inline constexpr Index optimizer_block = 4096;

/// Into how many lanes the blocks of a module are dealt, one after the other. A constant, so that
/// what a lane adds up has the same bits on any number of threads.
inline constexpr Index optimizer_lanes = 16;

/// Whether passes over a module leave a parameter out: it is idle, or its gradient stands for zero
/// without being stored so, the module being const.
template <class Scalar>
bool is_passed_by(const Parameter<Scalar>& parameter, Updates updates) {
  return is_idle(parameter, updates) || parameter.stored.is_stale();
}

/// Prepares the gradients of a module for passes over its parameters: to be read as they are, where
/// nothing is passed by. Returns the scalars of the parameters that are not passed by. Throws
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

/// The number of tasks for passes over the given number of scalars. Every task walks over all
/// parameters, and few of them at once make for short runs through memory, so there are two tasks a
/// worker for balance and none without enough to do.
inline Index optimizer_tasks(Index scalars) {
  constexpr Index worth_a_task = Index{1} << 14;
  const Index workers = worker_count(element_work(scalars));
  const Index most = workers > 1 ? std::min(2 * workers, optimizer_lanes) : 1;
  return std::clamp(scalars / worth_a_task, Index{1}, most);
}

/// Calls f(lane, index, parameter, first, count) for every block of every parameter that is not
/// idle, the blocks of a lane in order, several lanes at once; index counts the parameters. An idle
/// parameter's blocks are dealt all the same, so that leaving it out moves no other block to
/// another lane. It is one parallel region for the whole module, since a layer of many experts has
/// a thousand small parameters and waking the workers for each would cost more than the work. Does
/// not allocate. Throws std::invalid_argument, before the first call, if a gradient has another
/// shape than its value.
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

/// Calls f(index, parameter, worker) for every parameter that is not idle and that
/// chosen(parameter) says yes to, several at once, in one parallel region like
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
      if (dealt * tasks / scalars == task) f(i, parameter, worker);
      dealt += parameter.size();
    });
  });
}

}  // namespace moe::detail
