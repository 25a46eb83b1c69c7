#pragma once

#include <algorithm>
#include <cstddef>
#include <moe/moe.hpp>
#include <string>
#include <utility>
#include <vector>

#include "../common/svg.hpp"
#include "options.hpp"

/// \file
/// How the load of the experts went during a training, as a picture: a row for each expert, time from
/// left to right.

namespace language_model {

/// Tokens of each expert, in columns of equally many updates. How long the training will be need not be
/// known: when there are too many columns, each two become one.
class LoadMap {
 public:
  static constexpr Index most_columns = 64;

  explicit LoadMap(Index experts) : tokens_(0, experts) {}

  Index experts() const { return tokens_.cols(); }
  Index updates() const { return updates_; }
  /// In a column; in the last one as many as there were.
  Index updates_per_column() const { return width_; }
  /// Columns (rows of the matrix) x experts.
  const moe::Matrix<double>& tokens() const { return tokens_; }

  /// Takes the figures of one more update.
  void add(const moe::Balance<float>& balance) {
    if (updates_ == width_ * most_columns) halve();
    if (updates_ % width_ == 0) {
      tokens_.conservativeResize(tokens_.rows() + 1, Eigen::NoChange);
      tokens_.bottomRows(1).setZero();
    }
    for (Index e = 0; e < experts(); ++e) {
      tokens_(tokens_.rows() - 1, e) +=
          static_cast<double>(balance.tokens_per_expert[static_cast<std::size_t>(e)]);
    }
    ++updates_;
  }

  /// Goes on from what tokens() and updates() were.
  void resume(Index updates, moe::Matrix<double> tokens) {
    updates_ = updates;
    width_ = 1;
    while (updates_ > width_ * most_columns) width_ *= 2;
    moe::detail::require(
        tokens.cols() == experts() && tokens.rows() == (updates_ + width_ - 1) / width_,
        "a load map of ", updates_, " updates and ", experts(), " experts cannot be ",
        tokens.rows(), " x ", tokens.cols());
    tokens_ = std::move(tokens);
  }

  /// What an expert got in a column, over the mean of the experts; 0 where no expert got any.
  double load(Index column, Index expert) const {
    const double mean = tokens_.row(column).mean();
    return mean > 0 ? tokens_(column, expert) / mean : 0;
  }

 private:
  void halve() {
    moe::Matrix<double> pairs(tokens_.rows() / 2, experts());
    for (Index i = 0; i < pairs.rows(); ++i) {
      pairs.row(i) = tokens_.row(2 * i) + tokens_.row(2 * i + 1);
    }
    tokens_ = std::move(pairs);
    width_ *= 2;
  }

  moe::Matrix<double> tokens_;
  Index updates_ = 0;
  Index width_ = 1;
};

/// A colour of the picture, for loads below `below`, and what the legend says of them.
struct LoadColour {
  double below;
  const char* colour;
  const char* text;
};

/// From blue, below the mean, over white to red. Loads of about the mean have one colour, so that the
/// noise of balanced experts is not seen.
inline const std::vector<LoadColour>& load_colours() {
  static const std::vector<LoadColour> colours = {
      {1e-9, "#20304c", "none"},  {0.25, "#3670b0", "below 1/4"}, {0.5, "#84b0d8", "to 1/2"},
      {0.8, "#c6dcee", "to 0.8"}, {1.25, "#f4f4f0", "to 1.25"},   {2, "#f6cba4", "to 2"},
      {4, "#e8814d", "to 4"},     {1e300, "#b2182b", "above 4"}};
  return colours;
}

inline const LoadColour& colour_of_load(double load) {
  return *std::find_if(load_colours().begin(), load_colours().end(),
                       [&](const LoadColour& colour) { return load < colour.below; });
}

/// A panel for each model, one below the other, above a legend. Models without an update are left out.
inline examples::Svg load_picture(const std::vector<std::pair<std::string, LoadMap>>& models) {
  constexpr std::size_t gap = 12;
  constexpr std::size_t title = 20;
  constexpr std::size_t panel_width = 768;
  constexpr std::size_t legend_step = 96;
  // Experts are as high as leaves room for text at few, and can still be told apart at many.
  const auto cell_height = [](const LoadMap& map) {
    return static_cast<std::size_t>(std::clamp<Index>(512 / map.experts(), 2, 12));
  };
  std::size_t height = gap;
  for (const auto& [name, map] : models) {
    height += title + static_cast<std::size_t>(map.experts()) * cell_height(map) + gap;
  }
  examples::Svg svg(panel_width + 2 * gap, height + title + gap);
  std::size_t y = gap;
  for (const auto& [name, map] : models) {
    const Index columns = map.tokens().rows();
    if (columns == 0) continue;
    std::vector<std::string> colours;
    for (Index e = 0; e < map.experts(); ++e) {
      for (Index column = 0; column < columns; ++column) {
        colours.emplace_back(colour_of_load(map.load(column, e)).colour);
      }
    }
    const std::size_t cell_width = panel_width / static_cast<std::size_t>(columns);
    svg.add_text(gap, y + title - 6,
                 name + ": load of " + std::to_string(map.experts()) +
                     " experts (rows) over the mean, in " + std::to_string(map.updates()) +
                     " updates (columns of " + std::to_string(map.updates_per_column()) + ")");
    y += title;
    svg.add_cells(gap, y, static_cast<std::size_t>(columns), cell_width, cell_height(map), colours);
    y += static_cast<std::size_t>(map.experts()) * cell_height(map) + gap;
  }
  std::size_t x = gap;
  for (const LoadColour& colour : load_colours()) {
    svg.add_cells(x, y, 1, title - 6, title - 6, {colour.colour});
    svg.add_text(x + title, y + title - 9, colour.text);
    x += legend_step;
  }
  return svg;
}

}  // namespace language_model
