#pragma once

#include <fstream>
#include <stdexcept>
#include <string>

namespace examples {

/// Rows for plotting; each is in the file before add() returns. Throws std::runtime_error when they
/// cannot be written.
class CsvFile {
 public:
  CsvFile(const std::string& path, const std::string& header) : path_(path), file_(path) {
    add(header);
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
