#pragma once

#include <filesystem>
#include <moe/io/safetensors.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "corpus.hpp"
#include "options.hpp"
#include "study_runs.hpp"
#include "timetable.hpp"

/// \file
/// A training in a file, from which it goes on to the same numbers as if it had never been interrupted.

namespace language_model {

/// All that decides the weights of the sparse model after its last update.
inline std::string training_settings(const Options& o, const Corpus& corpus, Index updates) {
  return configuration_of({.experts = o.experts,
                           .top_k = o.top_k,
                           .hidden = o.hidden,
                           .importance_weight = o.importance_weight,
                           .load_weight = o.load_weight,
                           .seed = o.seed,
                           .updates = updates},
                          o) +
         name_of(corpus);
}

/// Opens a file whose metadata `what` are the settings that it was written with. Throws
/// std::runtime_error, which has both, where they are other settings than these.
inline moe::SafetensorsFile open_with_settings(const std::string& path, const std::string& what,
                                               const std::string& settings) {
  moe::SafetensorsFile file(path);
  const auto found = file.metadata().find(what);
  if (found == file.metadata().end() || found->second != settings) {
    throw std::runtime_error(path + " is another " + what + ". It has\n  " +
                             (found == file.metadata().end() ? "no settings" : found->second) +
                             "\nand the options say\n  " + settings +
                             "\nDelete it, or take the same options.");
  }
  return file;
}

/// The file of a training; without a path nothing is written or read.
class Checkpoint {
 public:
  Checkpoint() = default;
  Checkpoint(std::string path, std::string settings)
      : path_(std::move(path)), settings_(std::move(settings)) {}

  const std::string& path() const { return path_; }
  bool is_wanted() const { return !path_.empty(); }
  bool exists() const { return is_wanted() && std::filesystem::exists(path_); }

  /// Writes what add(writer) adds, and where the training is. At any time the path has the whole old
  /// file or the whole new one. Throws std::runtime_error where it cannot be written.
  template <class Add>
  void write(const Place& place, Add&& add) const {
    if (!is_wanted()) return;
    moe::SafetensorsWriter writer;
    const std::vector<Index> updates{place.update};
    const moe::Matrix<double> elapsed = moe::Matrix<double>::Constant(1, 1, place.seconds);
    writer.add("training.updates", updates);
    writer.add("training.seconds", elapsed);
    writer.set_metadata(what, settings_);
    add(writer);
    writer.write(path_);
  }

  /// Takes up what write() left: calls read(file, place) and returns the place, the beginning where there
  /// is no file. Throws std::runtime_error for a file that is damaged or of other settings.
  template <class Read>
  Place read(Read&& read) const {
    if (!exists()) return {};
    const moe::SafetensorsFile file = open_with_settings(path_, what, settings_);
    const Place place = place_in(file);
    read(file, place);
    return place;
  }
  /// The place that read() would return, of which no more is read.
  Place place() const {
    return read([](const moe::SafetensorsFile&, const Place&) {});
  }

 private:
  Place place_in(const moe::SafetensorsFile& file) const {
    std::vector<Index> updates(1);
    moe::Matrix<double> elapsed(1, 1);
    file.read("training.updates", std::span<Index>(updates));
    file.read("training.seconds", elapsed);
    if (updates[0] < 0 || !(elapsed(0, 0) >= 0)) {
      throw std::runtime_error(path_ + ": training.updates or training.seconds is below 0");
    }
    return {updates[0], elapsed(0, 0)};
  }

  static constexpr const char* what = "training";

  std::string path_;
  std::string settings_;
};

}  // namespace language_model
