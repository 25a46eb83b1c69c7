#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <span>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/mpi/communicator.hpp"
#include "moe/mpi/row_exchange.hpp"
#include "moe/parameter.hpp"

/// \file
/// Copies a model whose experts are spread over ranks to the same model in one process, and back to any
/// number of ranks. The whole model has a MoELayer in place of each ExpertParallel, so its parameters have
/// the same names, and it is saved and loaded like any other:
///
///     Model* whole = ...;   // on rank 0, null on the others
///     moe::mpi::gather_parameters(model, whole, communicator);
///     if (whole) moe::save_parameters("model.safetensors", *whole);
///
///     if (whole) moe::load_parameters("model.safetensors", *whole);
///     moe::mpi::scatter_parameters(whole, model, communicator);

namespace moe::mpi {

/// The numbers of parameters, or of an optimizer's state, by name. The object refers to the
/// numbers.
template <class Number>
class NamedNumbers {
 public:
  /// A matrix in memory, row-major.
  struct Place {
    Number* data = nullptr;  ///< its first number
    Index rows = 0;          ///< its rows
    Index columns = 0;       ///< its columns
  };

  /// Adds a matrix.
  void add(const std::string& name, Matrix<Number>& matrix) {
    places_[name] = {matrix.data(), matrix.rows(), matrix.cols()};
  }
  /// Adds a single number.
  void add(const std::string& name, Number& number) { places_[name] = {&number, 1, 1}; }

  /// All of them by name.
  const std::map<std::string, Place>& places() const { return places_; }

 private:
  std::map<std::string, Place> places_;
};

namespace checkpoint {

/// The names and shapes of a rank, a line "name rows columns" for each.
template <class Number>
std::string listing_of(const NamedNumbers<Number>& numbers) {
  std::ostringstream text;
  for (const auto& [name, place] : numbers.places()) {
    text << name << ' ' << place.rows << ' ' << place.columns << '\n';
  }
  return text.str();
}

/// Calls f(rank, name, rows, columns) for every line of the listings of all ranks, in order.
template <class F>
void for_each_line(const std::vector<std::string>& listings, F&& f) {
  for (std::size_t rank = 0; rank < listings.size(); ++rank) {
    std::istringstream text(listings[rank]);
    std::string name;
    Index rows = 0;
    Index columns = 0;
    while (text >> name >> rows >> columns) f(static_cast<int>(rank), name, rows, columns);
  }
}

/// The listings of all ranks, on every rank. Collective.
inline std::vector<std::string> exchange_listings(const std::string& own,
                                                  const Communicator& communicator) {
  const std::vector<Index> sizes = communicator.gather(static_cast<Index>(own.size()));
  std::string all(static_cast<std::size_t>(std::accumulate(sizes.begin(), sizes.end(), Index{0})),
                  ' ');
  communicator.gather(std::span<const char>(own), std::span<const Index>(sizes),
                      std::span<char>(all));
  std::vector<std::string> listings;
  std::size_t first = 0;
  for (const Index size : sizes) {
    listings.push_back(all.substr(first, moe::detail::to_size(size)));
    first += listings.back().size();
  }
  return listings;
}

/// Throws std::invalid_argument unless the ranks together have the same names and shapes as the whole.
template <class Number>
void check_listings(const std::vector<std::string>& listings, const NamedNumbers<Number>& whole) {
  using moe::detail::require;
  std::map<std::string, bool> found;
  for (const auto& entry : whole.places()) found[entry.first] = false;
  for_each_line(listings, [&](int rank, const std::string& name, Index rows, Index columns) {
    const auto place = whole.places().find(name);
    require(place != whole.places().end(), "the whole model has no ", name, ", but rank ", rank,
            " has it");
    require(place->second.rows == rows && place->second.columns == columns, name, " is ", rows,
            " x ", columns, " on rank ", rank, ", in the whole model ", place->second.rows, " x ",
            place->second.columns);
    found[name] = true;
  });
  for (const auto& [name, has] : found) require(has, "no rank has the whole model's ", name);
}

/// A copy of the numbers of one type between the root's `whole` and the ranks' `parts`.
template <class Number>
class Copy {
 public:
  /// Throws Error on all ranks unless parts and whole have the same names and shapes. Collective.
  Copy(NamedNumbers<Number> parts, NamedNumbers<Number> whole, int root,
       const Communicator& communicator)
      : parts_(std::move(parts)),
        whole_(std::move(whole)),
        root_(root),
        communicator_(communicator),
        listings_(exchange_listings(listing_of(parts_), communicator)) {
    communicator.attempt("checkpoint: names", [&] {
      if (communicator.rank() == root) check_listings(listings_, whole_);
    });
  }

  /// Copies each name to the whole, from the lowest rank that has it, or from the whole to all ranks that
  /// have it. Returns when all ranks have their numbers. At most `most` numbers are sent at a time, in
  /// buffers of this call, which MPI may still use after a time-out. Collective.
  void run(bool to_whole, Index most = Index{1} << 22) const {
    std::vector<Piece> pieces;
    std::vector<Number> moving;
    communicator_.attempt("checkpoint: pieces", [&] {
      pieces = pieces_of(to_whole, most);
      moving.resize(moe::detail::to_size(most));
    });
    for (std::size_t first = 0; first < pieces.size();) {
      std::size_t last = first;
      Index numbers = 0;
      while (last < pieces.size() && numbers + pieces[last].count <= most) {
        numbers += pieces[last++].count;
      }
      move(std::span<const Piece>(pieces).subspan(first, last - first), to_whole, moving);
      // So that no rank goes on, or returns, before the others have their numbers.
      communicator_.agree("checkpoint: numbers");
      first = last;
    }
  }

 private:
  /// Consecutive numbers of a matrix, which the root or a rank sends to the other.
  struct Piece {
    int rank;
    Index count;
    Number* of_whole;  ///< on the root
    Number* of_part;   ///< on the rank
  };

  /// All pieces, the same on all ranks except for the pointers.
  std::vector<Piece> pieces_of(bool to_whole, Index most) const {
    std::vector<Piece> pieces;
    std::map<std::string, bool> copied;
    for_each_line(listings_, [&](int rank, const std::string& name, Index rows, Index columns) {
      if (to_whole && std::exchange(copied[name], true)) return;
      Number* const of_whole = has(root_) ? whole_.places().at(name).data : nullptr;
      Number* const of_part = has(rank) ? parts_.places().at(name).data : nullptr;
      for (Index first = 0; first < rows * columns; first += most) {
        pieces.push_back({rank, std::min(most, rows * columns - first),
                          has(root_) ? of_whole + first : nullptr,
                          has(rank) ? of_part + first : nullptr});
      }
    });
    return pieces;
  }
  bool has(int rank) const { return communicator_.rank() == rank; }

  void move(std::span<const Piece> pieces, bool to_whole, std::vector<Number>& moving) const {
    RowExchange exchange(communicator_);
    const auto for_each_here = [&](auto&& f) {
      Index first = 0;
      for (const Piece& piece : pieces) {
        if (has(root_) != has(piece.rank)) f(piece, first);
        first += piece.count;
      }
    };
    const bool sends = has(root_) != to_whole;
    for_each_here([&](const Piece& piece, Index first) {
      const int other = has(root_) ? piece.rank : root_;
      if (sends) {
        std::copy_n(has(root_) ? piece.of_whole : piece.of_part, piece.count,
                    moving.begin() + first);
        exchange.send(moving, first, piece.count, other);
      } else {
        exchange.receive(moving, first, piece.count, other);
      }
    });
    for (const Piece& piece : pieces) {
      if (!has(root_) || !has(piece.rank)) continue;
      std::copy_n(to_whole ? piece.of_part : piece.of_whole, piece.count,
                  to_whole ? piece.of_whole : piece.of_part);
    }
    exchange.wait();
    if (sends) return;
    for_each_here([&](const Piece& piece, Index first) {
      std::copy_n(moving.begin() + first, piece.count, has(root_) ? piece.of_whole : piece.of_part);
    });
  }

  NamedNumbers<Number> parts_;
  NamedNumbers<Number> whole_;
  int root_;
  const Communicator& communicator_;
  std::vector<std::string> listings_;
};

/// Copies numbers of all types. parts(Number{}) and, on the root only, whole(Number{}) return the numbers
/// of a type. Throws Error on all ranks, with nothing changed, if names or shapes differ.
template <class Parts, class Whole>
void copy_all(bool to_whole, Parts&& parts, bool has_whole, Whole&& whole, int root,
              const Communicator& communicator) {
  const bool is_root = communicator.rank() == root;
  communicator.attempt("checkpoint", {{"root", root}, {"direction", to_whole ? 1 : 0}}, [&] {
    moe::detail::require(root >= 0 && root < communicator.size(), "checkpoint: root = ", root,
                         ", must be one of ", communicator.size(), " ranks");
    moe::detail::require(has_whole || !is_root, "checkpoint: the root has no whole model");
  });
  const auto copy_of = [&]<class Number>(Number) {
    NamedNumbers<Number> of_parts;
    NamedNumbers<Number> of_whole;
    communicator.attempt("checkpoint: numbers", [&] {
      of_parts = parts(Number{});
      if (is_root) of_whole = whole(Number{});
    });
    return Copy<Number>(std::move(of_parts), std::move(of_whole), root, communicator);
  };
  const auto floats = copy_of(float{});
  const auto doubles = copy_of(double{});
  const auto counts = copy_of(Index{});
  floats.run(to_whole);
  doubles.run(to_whole);
  counts.run(to_whole);
}

/// A module's parameters of one type.
template <class Scalar, class Module>
NamedNumbers<Scalar> parameters_of(Module& module) {
  NamedNumbers<Scalar> numbers;
  for_each_parameter(module, [&]<class S>(const std::string& name, Parameter<S>& parameter) {
    if constexpr (std::is_same_v<S, Scalar>) numbers.add(name, parameter.value);
  });
  return numbers;
}

/// For each matrix of an optimizer, by its name: 1, or 0 if it is empty, as for a parameter that
/// was never trained.
using Presence = std::map<std::string, Index>;

/// Calls f(name, matrix, shape...) for every matrix of an optimizer; `shape`, where the optimizer
/// passes it, is that of the matrix when it is not empty.
template <class Optimizer, class Module, class F>
void for_each_matrix(Optimizer& optimizer, Module& module, F&& f) {
  optimizer.for_each_state(module,
                           [&](const std::string& name, auto&& state, const auto&... shape) {
                             if constexpr (requires { state.rows(); }) f(name, state, shape...);
                           });
}

/// Which matrices of an optimizer are not empty.
template <class Optimizer, class Module>
Presence presence_of(Optimizer& optimizer, Module& module) {
  Presence presence;
  for_each_matrix(optimizer, module, [&](const std::string& name, auto& matrix, const auto&...) {
    presence[name] = matrix.size() > 0 ? 1 : 0;
  });
  return presence;
}

/// The same as numbers, to be copied between ranks.
template <class Number>
NamedNumbers<Number> numbers_of(Presence& presence) {
  NamedNumbers<Number> numbers;
  if constexpr (std::is_same_v<Number, Index>) {
    for (auto& [name, is_there] : presence) numbers.add(name, is_there);
  }
  return numbers;
}

/// Empties an optimizer's matrices that are not present.
template <class Optimizer, class Module>
void release_absent(Optimizer& optimizer, Module& module, const Presence& presence) {
  for_each_matrix(optimizer, module, [&](const std::string& name, auto& matrix, const auto&...) {
    if (presence.at(name) == 0) matrix.resize(0, 0);
  });
}

/// An optimizer's matrices, or its counts of updates: in all, and of each parameter. An empty
/// matrix whose `presence` is 1 becomes zeros; matrices whose `presence` is 0 are left out.
template <class Number, class Optimizer, class Module>
NamedNumbers<Number> state_of(Optimizer& optimizer, Module& module, const Presence& presence) {
  NamedNumbers<Number> numbers;
  std::vector<std::string> names;
  for_each_parameter(module, [&](const std::string& name, const auto&) { names.push_back(name); });
  const auto add = [&](const std::string& what, auto&& state, const auto&... shape) {
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(state)>, std::span<Index>>) {
      if constexpr (std::is_same_v<Number, Index>) {
        const bool each = state.size() == names.size() && what != "steps";
        for (std::size_t i = 0; i < state.size(); ++i) {
          numbers.add(each ? what + '.' + names[i] : what, state[i]);
        }
      }
    } else if constexpr (std::is_same_v<std::remove_cvref_t<decltype(state)>, Matrix<Number>>) {
      if (presence.at(what) == 0) return;
      if (state.size() == 0) (state.setZero(shape.rows, shape.columns), ...);
      numbers.add(what, state);
    }
  };
  optimizer.for_each_state(module, add);
  return numbers;
}

/// Copies parameters to or from the whole model.
template <class Module, class Whole>
void copy_parameters(bool to_whole, Module& module, Whole* whole, int root,
                     const Communicator& communicator) {
  copy_all(
      to_whole, [&]<class Number>(Number) { return parameters_of<Number>(module); },
      whole != nullptr, [&]<class Number>(Number) { return parameters_of<Number>(*whole); }, root,
      communicator);
}

/// Copies an optimizer's state to or from that of the whole model.
template <class Optimizer, class Module, class Whole>
void copy_state(bool to_whole, Optimizer& optimizer, Module& module, Optimizer* whole_optimizer,
                Whole* whole, int root, const Communicator& communicator) {
  const bool has_whole = whole != nullptr && whole_optimizer != nullptr;
  const bool is_root = communicator.rank() == root;
  Presence of_parts;
  Presence of_whole;
  communicator.attempt("checkpoint: state", [&] {
    of_parts = presence_of(optimizer, module);
    if (is_root && has_whole) of_whole = presence_of(*whole_optimizer, *whole);
  });
  copy_all(
      to_whole, [&]<class Number>(Number) { return numbers_of<Number>(of_parts); }, has_whole,
      [&]<class Number>(Number) { return numbers_of<Number>(of_whole); }, root, communicator);
  copy_all(
      to_whole, [&]<class Number>(Number) { return state_of<Number>(optimizer, module, of_parts); },
      has_whole,
      [&]<class Number>(Number) { return state_of<Number>(*whole_optimizer, *whole, of_whole); },
      root, communicator);
  communicator.attempt("checkpoint: state", [&] {
    if (!to_whole) release_absent(optimizer, module, of_parts);
    if (to_whole && is_root) release_absent(*whole_optimizer, *whole, of_whole);
  });
}

}  // namespace checkpoint

/// Copies the parameters of all ranks' modules to the whole model of rank `root`; if several ranks
/// have a parameter, that of the lowest rank is copied. `whole` is null on the other ranks. When it
/// returns on any rank, the whole model is complete. Throws Error on all ranks, with nothing
/// changed, if names or shapes differ, if `root` is not a rank or not the same on all ranks, or if
/// `whole` is null on it. If a rank has stopped, the others throw
/// std::runtime_error after the communicator's timeout; the whole model then has old and new
/// numbers and must not be saved. Collective.
template <class Module, class Whole>
void gather_parameters(Module& module, Whole* whole, const Communicator& communicator,
                       int root = 0) {
  checkpoint::copy_parameters(true, module, whole, root, communicator);
}

/// Copies the parameters of the whole model of rank `root` to the modules of all ranks. When it returns on
/// any rank, all ranks have their parameters. Throws as gather_parameters() does. Collective.
template <class Whole, class Module>
void scatter_parameters(Whole* whole, Module& module, const Communicator& communicator,
                        int root = 0) {
  checkpoint::copy_parameters(false, module, whole, root, communicator);
}

/// gather_parameters() for the state of an optimizer (its for_each_state()), so that training can go on
/// with another number of ranks. Collective. A matrix that is empty here, since its parameter was
/// never trained, is empty in the whole state afterwards.
template <class Optimizer, class Module, class Whole>
void gather_state(Optimizer& optimizer, Module& module, Optimizer* whole_optimizer, Whole* whole,
                  const Communicator& communicator, int root = 0) {
  checkpoint::copy_state(true, optimizer, module, whole_optimizer, whole, root, communicator);
}
/// scatter_parameters() for the state of an optimizer. Collective.
template <class Optimizer, class Whole, class Module>
void scatter_state(Optimizer* whole_optimizer, Whole* whole, Optimizer& optimizer, Module& module,
                   const Communicator& communicator, int root = 0) {
  checkpoint::copy_state(false, optimizer, module, whole_optimizer, whole, root, communicator);
}

}  // namespace moe::mpi
