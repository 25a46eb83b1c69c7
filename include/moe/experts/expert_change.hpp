#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "moe/parameter.hpp"
#include "moe/random.hpp"

/// \file
/// Adding, copying and removing experts: where each expert and each parameter after the change
/// comes from.

namespace moe {

/// In lists of sources: a new expert, column or parameter, which comes from none.
inline constexpr Index fresh_source = -1;

/// Where the experts after a change come from. There is an entry for each of them: the number that it
/// had before the change, or fresh_source if it is new. If several entries name the same expert, the
/// first is that expert and the others are copies. An expert that no entry names is removed.
class ExpertSources {
 public:
  /// `before` is the number of experts before the change, and `of` begins the messages. Throws
  /// std::invalid_argument if an entry names an expert that does not exist, or if there is no entry.
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
  /// The source of expert e: the number that it, or the expert that it copies, had before the
  /// change, or fresh_source.
  Index operator[](Index e) const { return sources_[detail::to_size(e)]; }
  /// Whether expert e is new.
  bool is_fresh(Index e) const { return (*this)[e] == fresh_source; }
  /// Whether expert e is a copy of an expert that stays.
  bool is_copy(Index e) const { return copies_[detail::to_size(e)] != 0; }
  /// The sources of all experts.
  const std::vector<Index>& list() const { return sources_; }

 private:
  std::vector<Index> sources_;
  Index before_;
  std::vector<std::uint8_t> copies_;
};

/// Where a parameter after a change comes from.
struct ParameterSource {
  /// Its place in for_each_parameter() before the change, or fresh_source.
  Index parameter = fresh_source;
  /// For each of its columns the number it had before the change, or fresh_source. Empty if all columns
  /// stay.
  std::vector<Index> columns = {};
};

/// What MoELayer::add_experts(), copy_experts() or remove_experts() did: an optimizer's follow() needs it.
struct ExpertChange {
  /// A parameter of an expert that moves from one rank to another. Its place is that in
  /// for_each_parameter(): on the sender before the change, on the receiver after it.
  struct Move {
    int rank;         ///< the other rank
    Index parameter;  ///< its place, see above
  };

  std::vector<Index> sources;               ///< of the experts, see ExpertSources
  std::vector<ParameterSource> parameters;  ///< of the layer's parameters on this rank
  Index parameters_before = 0;         ///< the number of the layer's parameters on this rank before
  std::uint64_t structure_before = 0;  ///< Parameter::structure of the layer's parameters
  std::uint64_t structure = 0;         ///< Parameter::structure after the change
  std::vector<Move> sent;              ///< what this rank sent to others
  std::vector<Move> received;  ///< what it received from others, in the order in which they sent it
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

/// The sources of groups of `size` experts. Throws std::invalid_argument, with a message that begins with
/// `of`, unless each of them is a whole group from before the change, or fresh.
inline ExpertSources sources_of_groups(const char* of, const ExpertSources& sources, Index size) {
  const char* const only = ": only whole groups of ";
  std::vector<Index> groups;
  for (Index e = 0; e < sources.experts(); ++e) {
    const Index first = sources[e - e % size];
    const bool is_fresh = first == fresh_source;
    require((is_fresh || first % size == 0) && sources[e] == (is_fresh ? first : first + e % size),
            of, ": expert ", e, " would not keep its place in its group", only, size,
            " experts can be added, copied or removed");
    if (e % size == 0) groups.push_back(is_fresh ? fresh_source : first / size);
  }
  require(sources.experts() % size == 0, of, ": ", sources.experts(), " experts", only, size,
          " experts can be added, copied or removed");
  return {of, std::move(groups), sources.before() / size};
}

/// The memory of a matrix, as it is sent from rank to rank.
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

/// Adds normal deviates to every value, for copies of experts. A standard deviation of 0 changes no
/// bit.
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

/// Rearranges the columns of a gate's parameter that has one column for each expert. Every expert
/// gets the column of its source, copies with noise added; fresh experts get those of `start` (rows
/// x experts), or zeros if `start` is empty. The gradient is zero afterwards. Throws only
/// std::bad_alloc, with nothing changed.
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
