#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "moe/parameter.hpp"
#include "moe/random.hpp"

/// \file
/// Experts that come and go: where each one afterwards comes from, and with it each parameter.

namespace moe {

/// Stands for no expert, no column and no parameter of before: what is there now is fresh.
inline constexpr Index fresh_source = -1;

/// Where the experts after a change come from: an entry for each of them, the expert of before that
/// it was, or fresh_source for a new one. The first entry that names an expert is that expert; further
/// ones are copies of it. An expert that no entry names is removed.
class ExpertSources {
 public:
  /// Throws std::invalid_argument, which begins with `of`, where an entry names no expert of the
  /// `before` there were, or none would be left.
  ExpertSources(const char* of, std::vector<Index> sources, Index before)
      : sources_(std::move(sources)), before_(before), copies_(sources_.size(), 0) {
    detail::require(!sources_.empty(), of, ": no expert would be left of ", before);
    std::vector<std::uint8_t> named(detail::to_size(before), 0);
    for (std::size_t e = 0; e < sources_.size(); ++e) {
      const Index source = sources_[e];
      detail::require(source >= fresh_source && source < before, of, ": expert ", e,
                      " would come from expert ", source, " of ", before);
      if (source != fresh_source) copies_[e] = std::exchange(named[detail::to_size(source)], 1);
    }
  }

  Index before() const { return before_; }  ///< the number of experts before the change
  Index experts() const { return static_cast<Index>(sources_.size()); }  ///< after it
  Index operator[](Index e) const { return sources_[detail::to_size(e)]; }
  bool is_fresh(Index e) const { return (*this)[e] == fresh_source; }
  bool is_copy(Index e) const { return copies_[detail::to_size(e)] != 0; }
  const std::vector<Index>& list() const { return sources_; }

 private:
  std::vector<Index> sources_;
  Index before_;
  std::vector<std::uint8_t> copies_;
};

/// Where a parameter after a change comes from.
struct ParameterSource {
  /// The parameter of before, by its place in for_each_parameter(), or fresh_source.
  Index parameter = fresh_source;
  /// Its columns of before, one for each of now, or fresh_source; empty where it has its own as before.
  std::vector<Index> columns = {};
};

/// What a verb of a layer did that adds, copies or removes experts; optimizers follow by it.
struct ExpertChange {
  /// A parameter of an expert that goes from one rank to another, by its place among those that the
  /// sender had before, or that the receiver has now.
  struct Move {
    int rank;  ///< the other one
    Index parameter;
  };

  std::vector<Index> sources;               ///< of the experts, see ExpertSources
  std::vector<ParameterSource> parameters;  ///< of the layer's parameters on this rank
  Index parameters_before = 0;
  std::uint64_t structure_before = 0;  ///< Parameter::structure of the layer's parameters
  std::uint64_t structure = 0;
  std::vector<Move> sent;  ///< to other ranks, and what comes from them, both in one order
  std::vector<Move> received;
};

namespace detail {

/// The number of a layer's structure after one more change.
inline std::uint64_t next_structure(std::uint64_t structure, const ExpertSources& sources) {
  structure = derive_seed(structure, static_cast<std::uint64_t>(sources.before()));
  for (const Index source : sources.list()) {
    structure = derive_seed(structure, static_cast<std::uint64_t>(source));
  }
  return structure;
}

/// Where groups of `size` experts come from. Throws std::invalid_argument, which begins with `of`,
/// unless each of them is a whole group of before, or fresh.
inline ExpertSources sources_of_groups(const char* of, const ExpertSources& sources, Index size) {
  const char* const only = ": only whole groups of ";
  std::vector<Index> groups;
  for (Index e = 0; e < sources.experts(); ++e) {
    const Index first = sources[e - e % size];
    const bool is_fresh = first == fresh_source;
    require((is_fresh || first % size == 0) && sources[e] == (is_fresh ? first : first + e % size),
            of, ": expert ", e, " would not be in its place in a group of before", only, size,
            " experts can be added, copied or removed");
    if (e % size == 0) groups.push_back(is_fresh ? fresh_source : first / size);
  }
  require(sources.experts() % size == 0, of, ": ", sources.experts(), " experts", only, size,
          " experts can be added, copied or removed");
  return ExpertSources(of, std::move(groups), sources.before() / size);
}

/// The memory of a matrix, as it goes from rank to rank.
template <class Scalar>
std::span<char> bytes_of(Matrix<Scalar>& matrix) {
  return {reinterpret_cast<char*>(matrix.data()), to_size(matrix.size()) * sizeof(Scalar)};
}
template <class Scalar>
std::span<const char> bytes_of(const Matrix<Scalar>& matrix) {
  return {reinterpret_cast<const char*>(matrix.data()), to_size(matrix.size()) * sizeof(Scalar)};
}

/// to = the columns of `from` in the order of a list, zero where it says fresh_source.
template <class Scalar>
void select_columns(const Matrix<Scalar>& from, std::span<const Index> columns,
                    Matrix<Scalar>& to) {
  resize_to_zero(to, from.rows(), static_cast<Index>(columns.size()));
  for (Index row = 0; row < from.rows(); ++row) {
    const Scalar* const source = row_data(from, row);
    Scalar* const target = row_data(to, row);
    for (std::size_t j = 0; j < columns.size(); ++j) {
      if (columns[j] != fresh_source) target[j] = source[columns[j]];
    }
  }
}

/// Normal deviates added to every value, as to a copy's. One standard deviation of 0 changes no bit.
template <class Scalar>
void add_normal(Matrix<Scalar>& matrix, double stddev, std::uint64_t seed) {
  if (stddev == 0) return;
  Matrix<Scalar> noise(matrix.rows(), matrix.cols());
  fill_normal(noise, static_cast<Scalar>(stddev), seed);
  matrix += noise;
}

/// The same for every parameter of a copy.
template <class Module>
void add_copy_noise(Module& copy, double stddev, std::uint64_t seed) {
  std::uint64_t parameter = 0;
  walk_parameters(copy, [&](const ParameterName&, auto& p) {
    add_normal(p.value, stddev, derive_seed(seed, parameter++));
  });
}

/// Gives a gate's parameter that has a column an expert the columns of other experts: those of before
/// by their sources, copies with noise added, and fresh ones from `start`, rows x experts, or zero
/// where that is empty. Its gradient is zero afterwards. Throws std::bad_alloc alone, with nothing
/// changed.
template <class Scalar>
void change_columns(const ExpertSources& sources, Parameter<Scalar>& parameter,
                    const Matrix<Scalar>& start = {}, double noise_stddev = 0,
                    std::uint64_t noise_seed = 0) {
  Matrix<Scalar> value;
  select_columns(parameter.value, sources.list(), value);
  Matrix<Scalar> noise;
  if (noise_stddev > 0) {
    noise.setZero(value.rows(), value.cols());
    add_normal(noise, noise_stddev, noise_seed);
  }
  for (Index e = 0; e < sources.experts(); ++e) {
    if (sources.is_fresh(e) && start.size() > 0) value.col(e) = start.col(e);
    if (sources.is_copy(e) && noise_stddev > 0) value.col(e) += noise.col(e);
  }
  parameter.value.swap(value);
  auto& stored = parameter.stored;
  stored.memory.resize(0, 0);
  stored.columns = sources.experts();
  if (stored.state != GradientState::untracked) stored.state = GradientState::zero;
}

}  // namespace detail
}  // namespace moe
