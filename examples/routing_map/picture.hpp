#pragma once

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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
    std::string text = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" +
                       std::to_string(columns * step + gap) + "\" height=\"" +
                       std::to_string(rows_.size() * (step + title) + gap) +
                       "\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" "
                       "shape-rendering=\"crispEdges\">\n"
                       "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n";
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      for (std::size_t column = 0; column < rows_[row].size(); ++column) {
        draw(rows_[row][column], gap + column * step, gap + row * (step + title), text);
      }
    }
    text += "</svg>\n";
    std::ofstream file(path, std::ios::binary);
    file << text << std::flush;
    if (!file) throw std::runtime_error("cannot write " + path);
  }

 private:
  static constexpr std::size_t cell = 3;    // pixels
  static constexpr std::size_t gap = 12;    // between panels
  static constexpr std::size_t title = 20;  // above a panel

  /// One path for each colour, in which neighbours in a row are one rectangle.
  void draw(const Panel& panel, std::size_t x, std::size_t y, std::string& text) const {
    text += "<text x=\"" + std::to_string(x) + "\" y=\"" + std::to_string(y + title - 6) +
            "\" fill=\"#303030\">" + panel.title + "</text>\n";
    std::map<std::string, std::string> paths;
    for (std::size_t row = 0; row < cells_; ++row) {
      for (std::size_t first = 0; first < cells_;) {
        const std::string& colour = panel.cells[row * cells_ + first];
        std::size_t end = first + 1;
        while (end < cells_ && panel.cells[row * cells_ + end] == colour) ++end;
        char rectangle[96];
        const std::size_t width = (end - first) * cell;
        std::snprintf(rectangle, sizeof rectangle, "M%zu %zuh%zuv%zuh-%zuz", x + first * cell,
                      y + title + row * cell, width, cell, width);
        paths[colour] += rectangle;
        first = end;
      }
    }
    for (const auto& [colour, path] : paths) {
      text += "<path fill=\"" + colour + "\" d=\"" + path + "\"/>\n";
    }
  }

  std::size_t cells_;
  std::vector<std::vector<Panel>> rows_;
};

}  // namespace routing_map
