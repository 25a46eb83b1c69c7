#pragma once

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "terminal.hpp"

namespace examples {

/// Curves in characters, drawn over themselves on a terminal; nothing where standard error is none.
class LivePlot {
 public:
  struct Curve {
    std::string name;
    char mark = '*';
    std::vector<std::pair<double, double>> points{};  ///< x in [0, 1]
  };

  explicit LivePlot(std::vector<Curve> curves, bool visible = isatty(STDERR_FILENO) != 0)
      : curves_(std::move(curves)), visible_(visible) {}
  ~LivePlot() { clear(); }
  LivePlot(const LivePlot&) = delete;
  LivePlot& operator=(const LivePlot&) = delete;

  void add(std::size_t curve, double x, double y) { curves_[curve].points.emplace_back(x, y); }

  /// Whether the last plot is old enough for another.
  bool is_due() const { return visible_ && seconds_now() - drawn_at_ >= 0.3; }

  /// The plot, and under it the time that is left when `fraction` of the work is done, and a text.
  void draw(double fraction, const std::string& text) {
    if (!visible_) return;
    clear();
    drawn_at_ = seconds_now();
    const std::string lines = drawn();
    const std::string left = time_left_.text(fraction);
    std::fputs((lines + left + (left.empty() ? "" : "  ") + text).c_str(), stderr);
    lines_ = std::count(lines.begin(), lines.end(), '\n');
  }

  /// Takes the drawing away, so that something else can be written in its place.
  void clear() {
    if (!visible_ || lines_ < 0) return;
    std::string up = "\r";
    for (std::ptrdiff_t i = 0; i < lines_; ++i) up += "\x1b[A";
    std::fputs((up + "\x1b[J").c_str(), stderr);
    lines_ = -1;
  }

  /// The plot alone: the highest value above, later curves over earlier ones.
  std::string drawn() const {
    constexpr std::size_t rows = 12;
    constexpr std::size_t columns = 64;
    double low = std::numeric_limits<double>::infinity();
    double high = -low;
    for (const Curve& curve : curves_) {
      for (const auto& [x, y] : curve.points) {
        low = std::min(low, y);
        high = std::max(high, y);
      }
    }
    if (!(low < high)) return {};
    std::vector<std::string> grid(rows, std::string(columns, ' '));
    const auto cell = [](double fraction, std::size_t size) {
      return std::min(size - 1, static_cast<std::size_t>(fraction * static_cast<double>(size)));
    };
    for (const Curve& curve : curves_) {
      for (const auto& [x, y] : curve.points) {
        if (!std::isfinite(y)) continue;
        grid[cell((high - y) / (high - low), rows)][cell(x, columns)] = curve.mark;
      }
    }
    std::string text;
    for (std::size_t row = 0; row < rows; ++row) {
      char label[16] = "       ";
      if (row == 0) std::snprintf(label, sizeof label, "%7.3f", high);
      if (row + 1 == rows) std::snprintf(label, sizeof label, "%7.3f", low);
      text += std::string(label) + " |" + grid[row];
      if (row < curves_.size())
        text += std::string("  ") + curves_[row].mark + " " + curves_[row].name;
      text += '\n';
    }
    return text;
  }

 private:
  std::vector<Curve> curves_;
  bool visible_;
  std::ptrdiff_t lines_ = -1;  ///< of the last plot; negative when none is drawn
  double drawn_at_ = 0;
  TimeLeft time_left_;
};

}  // namespace examples
