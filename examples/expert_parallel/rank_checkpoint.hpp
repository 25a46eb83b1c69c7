#pragma once

#include <algorithm>
#include <filesystem>
#include <moe/mpi/communicator.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../language_model/checkpoint.hpp"
#include "../language_model/timetable.hpp"

/// \file
/// A training of several ranks, each with its part in a file of its own, from which they go on together.

namespace expert_parallel {

using moe::Index;

/// Rank N's part is in FILE.rankN. It is first written to FILE.rankN.new, and no rank takes a new file in
/// place of its old one before all have theirs. So whenever the program is killed, there is an update
/// that all ranks have in one of the two. Without a path nothing is written or read. write() and read()
/// are collective.
class RankCheckpoint {
 public:
  RankCheckpoint() = default;
  /// `path` is that of all ranks, or empty; `settings` are the rank's own.
  RankCheckpoint(std::string path, const std::string& settings,
                 const moe::mpi::Communicator& communicator)
      : path_(std::move(path)) {
    if (!is_wanted()) return;
    const std::string file = path_ + ".rank" + std::to_string(communicator.rank());
    saved_ = {file, settings};
    next_ = {file + ".new", settings};
  }

  const std::string& path() const { return path_; }
  bool is_wanted() const { return !path_.empty(); }
  /// Whether this rank has a file to go on from.
  bool exists() const { return saved_.exists() || next_.exists(); }

  /// As language_model::Checkpoint::write(). Throws moe::mpi::Error on all ranks where one cannot write;
  /// then all have their old files.
  template <class Add>
  void write(const moe::mpi::Communicator& communicator, const language_model::Place& place,
             Add&& add) const {
    if (!is_wanted()) return;
    communicator.attempt("saving the training", [&] { next_.write(place, add); });
    communicator.attempt("replacing the checkpoints", [&] { replace(); });
  }

  /// As language_model::Checkpoint::read(), from the newest update that all ranks have. Throws
  /// moe::mpi::Error on all ranks where a file cannot be read, and where some have a file and there is
  /// no such update.
  template <class Read>
  language_model::Place read(const moe::mpi::Communicator& communicator, Read&& read) const {
    if (!is_wanted()) return {};
    Index saved = 0;
    Index next = 0;
    communicator.attempt("the checkpoints", [&] {
      saved = saved_.place().update;
      next = next_.place().update;
    });
    const std::vector<Index> all_saved = communicator.gather(saved);
    const std::vector<Index> all_next = communicator.gather(next);
    language_model::Place place;
    communicator.attempt("the checkpoint", [&] {
      const Index update = newest_of_all(all_saved, all_next);
      if (update == 0) return;
      place = (update == saved ? saved_ : next_).read(read);
      if (update != saved) replace();
    });
    return place;
  }

 private:
  void replace() const { std::filesystem::rename(next_.path(), saved_.path()); }

  /// The newest update that each rank has in one of its files, of which 0 is that there is none.
  Index newest_of_all(const std::vector<Index>& saved, const std::vector<Index>& next) const {
    for (const Index update : {std::max(saved[0], next[0]), std::min(saved[0], next[0])}) {
      bool has_each = update > 0;
      for (std::size_t rank = 0; rank < saved.size(); ++rank) {
        has_each = has_each && (saved[rank] == update || next[rank] == update);
      }
      if (has_each) return update;
    }
    // Files that are all new are what a kill leaves within the first write().
    std::string updates;
    bool is_begun = false;
    for (std::size_t rank = 0; rank < saved.size(); ++rank) {
      is_begun = is_begun || saved[rank] > 0;
      updates += (rank > 0 ? ", " : "") + std::to_string(saved[rank]);
    }
    if (is_begun) {
      throw std::runtime_error(
          "the ranks' files of " + path_ + " are not those of one update, but of " + updates +
          " (0: no file); put back those of one, or delete all of them to begin anew");
    }
    return 0;
  }

  std::string path_;
  language_model::Checkpoint saved_, next_;
};

}  // namespace expert_parallel
