#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../common/svg.hpp"

/// \file
/// Panels of coloured cells, side by side in rows, as an SVG file.

namespace routing_map {

/// Cells of a square, row by row from above, each a colour such as "#0072b2".
struct Panel {
  std::string title;
  std::vector<std::string> cells;
};

class Picture {
 public:
  /// `cells` is the number of cells along the side of a panel.
  explicit Picture(std::size_t cells) : cells_(cells) {}

  /// Adds a panel at the end of a row.
  void add(std::size_t row, Panel panel) {
    if (rows_.size() <= row) rows_.resize(row + 1);
    rows_[row].push_back(std::move(panel));
  }

  /// Throws std::runtime_error if the file cannot be written.
  void write(const std::string& path) const {
    std::size_t columns = 0;
    for (const auto& row : rows_) columns = std::max(columns, row.size());
    const std::size_t step = cells_ * cell + gap;
    examples::Svg svg(columns * step + gap, rows_.size() * (step + title) + gap);
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      for (std::size_t column = 0; column < rows_[row].size(); ++column) {
        const Panel& panel = rows_[row][column];
        const std::size_t x = gap + column * step;
        const std::size_t y = gap + row * (step + title) + title;
        svg.add_text(x, y - 6, panel.title);
        svg.add_cells(x, y, cells_, cell, cell, panel.cells);
      }
    }
    svg.write(path);
  }

 private:
  static constexpr std::size_t cell = 3;    // pixels
  static constexpr std::size_t gap = 12;    // between panels
  static constexpr std::size_t title = 20;  // above a panel

  std::size_t cells_;
  std::vector<std::vector<Panel>> rows_;
};

}  // namespace routing_map
