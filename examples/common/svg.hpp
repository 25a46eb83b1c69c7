#pragma once

#include <cstdio>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

/// \file
/// Pictures of coloured cells and texts, as SVG files.

namespace examples {

/// Lengths are pixels, from the upper left corner on; colours are such as "#0072b2".
class Svg {
 public:
  Svg(std::size_t width, std::size_t height)
      : text_("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + std::to_string(width) +
              "\" height=\"" + std::to_string(height) +
              "\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" "
              "shape-rendering=\"crispEdges\">\n"
              "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n") {}

  /// A line of text that begins at a point of its base line. It must not have &, < or >.
  void add_text(std::size_t x, std::size_t y, const std::string& line) {
    text_ += "<text x=\"" + std::to_string(x) + "\" y=\"" + std::to_string(y) +
             "\" fill=\"#303030\">" + line + "</text>\n";
  }

  /// A grid of `columns` cells in a row, row by row from above, each with its colour. One path for
  /// each colour, in which neighbours in a row are one rectangle.
  void add_cells(std::size_t x, std::size_t y, std::size_t columns, std::size_t cell_width,
                 std::size_t cell_height, const std::vector<std::string>& colours) {
    std::map<std::string, std::string> paths;
    for (std::size_t row = 0; row < colours.size() / columns; ++row) {
      for (std::size_t first = 0; first < columns;) {
        const std::string& colour = colours[row * columns + first];
        std::size_t end = first + 1;
        while (end < columns && colours[row * columns + end] == colour) ++end;
        char rectangle[96];
        const std::size_t width = (end - first) * cell_width;
        std::snprintf(rectangle, sizeof rectangle, "M%zu %zuh%zuv%zuh-%zuz", x + first * cell_width,
                      y + row * cell_height, width, cell_height, width);
        paths[colour] += rectangle;
        first = end;
      }
    }
    for (const auto& [colour, path] : paths) {
      text_ += "<path fill=\"" + colour + "\" d=\"" + path + "\"/>\n";
    }
  }

  std::string text() const { return text_ + "</svg>\n"; }

  /// Throws std::runtime_error if the file cannot be written.
  void write(const std::string& path) const {
    std::ofstream file(path, std::ios::binary);
    file << text() << std::flush;
    if (!file) throw std::runtime_error("cannot write " + path);
  }

 private:
  std::string text_;
};

}  // namespace examples
