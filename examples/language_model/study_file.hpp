#pragma once

#include <charconv>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <moe/moe.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "study_runs.hpp"

/// \file
/// What the study has found out so far, in a file that outlives it.

namespace language_model {

/// The figures of a finished run; the balance is that of the test part.
struct Result {
  double operations = 0;  ///< multiply-adds a word
  double parameters = 0;
  double seconds = 0;     ///< of all updates
  double validation = 0;  ///< perplexity
  double test = 0;        ///< perplexity
  double cv_importance = 0;
  double cv_load = 0;
  double max_over_mean_load = 0;
  double unused_experts = 0;

  /// Calls f(name, number) for each.
  template <class Self, class F>
  static void for_each(Self& self, F&& f) {
    f("operations", self.operations);
    f("parameters", self.parameters);
    f("seconds", self.seconds);
    f("validation", self.validation);
    f("test", self.test);
    f("cv_importance", self.cv_importance);
    f("cv_load", self.cv_load);
    f("max_over_mean_load", self.max_over_mean_load);
    f("unused_experts", self.unused_experts);
  }
};

/// A CSV file with a line for every finished run: its figures, and the configuration that it is
/// known by. A line is there as a whole or not at all: what a killed program has left of one is
/// taken away when the file is opened. Throws std::runtime_error where the file cannot be read or
/// written, or was not written by this class.
class StudyFile {
 public:
  explicit StudyFile(const std::filesystem::path& path) : path_(path) {
    if (std::filesystem::exists(path)) read();
    file_.open(path, std::ios::app | std::ios::binary);
    if (results_.empty() && std::filesystem::file_size(path) == 0) write(header());
    if (!file_) throw std::runtime_error("cannot write " + path.string());
  }

  std::optional<Result> find(const std::string& configuration) const {
    const auto found = results_.find(configuration);
    return found == results_.end() ? std::nullopt : std::optional<Result>(found->second);
  }

  /// The line is in the file before this returns.
  void add(const std::string& configuration, const Result& result) {
    std::string line;
    Result::for_each(result, [&](const char*, double value) { line += digits(value) + ","; });
    write(line + configuration);
    results_[configuration] = result;
  }

 private:
  static std::string header() {
    std::string line;
    const Result none;
    Result::for_each(none, [&](const char* name, double) { line += std::string(name) + ","; });
    return line + "configuration";
  }

  void write(const std::string& line) {
    file_ << line + "\n" << std::flush;
    if (!file_) throw std::runtime_error("cannot write " + path_.string());
  }

  void read() {
    std::ifstream file(path_, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), {});
    if (!file) throw std::runtime_error("cannot read " + path_.string());
    file.close();
    const std::size_t whole = text.rfind('\n') + 1;  // 0 if there is none
    std::size_t number = 0;
    for (std::size_t start = 0; start < whole;) {
      const std::size_t end = text.find('\n', start);
      const std::string_view line = std::string_view(text).substr(start, end - start);
      if (++number == 1 ? line != header() : !read_line(line)) {
        throw std::runtime_error(path_.string() + ":" + std::to_string(number) +
                                 " is not a line of this study; take another folder");
      }
      start = end + 1;
    }
    // What is no line of a study's is not ours to cut.
    if (whole == 0 && !header().starts_with(text)) {
      throw std::runtime_error(path_.string() + " is not a file of a study; take another folder");
    }
    if (whole < text.size()) std::filesystem::resize_file(path_, whole);
  }

  bool read_line(std::string_view line) {
    Result result;
    bool good = true;
    Result::for_each(result, [&](const char*, double& value) {
      const char* end = line.data() + line.size();
      const auto [after, error] = std::from_chars(line.data(), end, value);
      good = good && error == std::errc{} && after != end && *after == ',';
      if (good) line.remove_prefix(static_cast<std::size_t>(after - line.data()) + 1);
    });
    good = good && !line.empty() && line.find(',') == std::string_view::npos;
    if (good) results_[std::string(line)] = result;
    return good;
  }

  std::filesystem::path path_;
  std::ofstream file_;
  std::map<std::string, Result> results_;
};

}  // namespace language_model
