#pragma once

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

namespace examples {

/// Rows for plotting; each is in the file before add() returns. Throws std::runtime_error when they
/// cannot be written.
class CsvFile {
 public:
  /// An empty file but for the header; or, where a program goes on, the file that is there, with its
  /// rows.
  CsvFile(const std::string& path, const std::string& header, bool goes_on = false)
      : path_(path), file_(path, goes_on ? std::ios::app : std::ios::trunc) {
    if (!goes_on || std::filesystem::file_size(path) == 0) add(header);
  }

  void add(const std::string& row) {
    file_ << row << '\n' << std::flush;
    if (!file_) throw std::runtime_error("cannot write " + path_);
  }

 private:
  std::string path_;
  std::ofstream file_;
};

}  // namespace examples
