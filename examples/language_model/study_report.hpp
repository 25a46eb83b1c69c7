#pragma once

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "report.hpp"
#include "study_file.hpp"
#include "study_runs.hpp"

/// \file
/// The study's tables in Markdown, and the same numbers for study.gp to draw.

namespace language_model {

/// The results of a row's runs, in the order of the seeds; those that are missing are left out.
inline std::vector<Result> results_of(const Row& row, const Options& o, const std::string& suffix,
                                      const StudyFile& file) {
  std::vector<Result> results;
  for (std::uint64_t seed = 1; seed <= static_cast<std::uint64_t>(o.seeds); ++seed) {
    Run run = row.run;
    run.seed = seed;
    if (const auto result = file.find(configuration_of(run, o) + suffix)) {
      results.push_back(*result);
    }
  }
  return results;
}

inline double mean_of(const std::vector<Result>& results, double Result::*figure) {
  double sum = 0;
  for (const Result& result : results) sum += result.*figure;
  return sum / static_cast<double>(results.size());
}

/// The root of the unbiased variance; 0 for one result.
inline double deviation_of(const std::vector<Result>& results, double Result::*figure) {
  if (results.size() < 2) return 0;
  const double mean = mean_of(results, figure);
  double squares = 0;
  for (const Result& result : results) squares += std::pow(result.*figure - mean, 2);
  return std::sqrt(squares / static_cast<double>(results.size() - 1));
}

/// "0.12 (0.11-0.14)": the mean, the lowest and the highest.
inline std::string spread_of(const std::vector<Result>& results, double Result::*figure) {
  const auto less = [&](const Result& a, const Result& b) { return a.*figure < b.*figure; };
  const auto [lowest, highest] = std::minmax_element(results.begin(), results.end(), less);
  return print("%.2f (%.2f-%.2f)", mean_of(results, figure), (*lowest).*figure, (*highest).*figure);
}

/// With a third decimal for characters, whose perplexities are small.
inline std::string perplexity_text(double perplexity, const Options& o) {
  return print("%.*f", o.unit == Unit::word ? 2 : 3, perplexity);
}

/// In Markdown. Cells of rows without a result, and the balance of a model without experts to
/// choose from, stay empty.
inline std::string text_of(const Table& table, const Options& o, const std::string& suffix,
                           const StudyFile& file) {
  std::string text = "| " + table.label +
                     " | operations | parameters | seconds | validation | test, each seed | mean | "
                     "deviation | CV(imp.) | CV(load) | max/mean |";
  std::string rule = "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |";
  for (const std::string& head : table.paper) {
    text += " " + head + " |";
    rule += " ---: |";
  }
  text += "\n" + rule + "\n";
  for (const Row& row : table.rows) {
    const std::vector<Result> results = results_of(row, o, suffix, file);
    text += "| " + row.label + " |";
    if (results.empty()) {
      for (int i = 0; i < 10; ++i) text += " |";
    } else {
      std::string each;
      for (const Result& result : results) {
        each += (each.empty() ? "" : " / ") + perplexity_text(result.test, o);
      }
      text += print(" %.0f | %s | %.0f | ", results.front().operations,
                    in_millions(static_cast<Index>(results.front().parameters)).c_str(),
                    mean_of(results, &Result::seconds));
      text += perplexity_text(mean_of(results, &Result::validation), o) + " | " + each + " | ";
      text += perplexity_text(mean_of(results, &Result::test), o) + " | ";
      text += perplexity_text(deviation_of(results, &Result::test), o) + " |";
      const bool chooses = row.run.experts > 1;
      for (const auto figure :
           {&Result::cv_importance, &Result::cv_load, &Result::max_over_mean_load}) {
        text += " " + (chooses ? spread_of(results, figure) : "") + (chooses ? " |" : "|");
      }
    }
    for (const std::string& figure : row.paper)
      text += " " + figure + (figure.empty() ? "|" : " |");
    text += "\n";
  }
  return text;
}

/// For gnuplot: a block for each series, headed by its name, with a line for every run: row of the
/// table, its label, experts, seed's place, test perplexity, CV(importance), CV(load), max/mean.
inline std::string points_of(const Table& table, const Options& o, const std::string& suffix,
                             const StudyFile& file) {
  std::vector<std::string> series;
  for (const Row& row : table.rows) {
    if (std::find(series.begin(), series.end(), row.series) == series.end()) {
      series.push_back(row.series);
    }
  }
  std::string text;
  for (const std::string& name : series) {
    std::string points;
    for (std::size_t r = 0; r < table.rows.size(); ++r) {
      const Row& row = table.rows[r];
      if (row.series != name) continue;
      int place = 0;
      for (const Result& result : results_of(row, o, suffix, file)) {
        points += print("%zu \"%s\" %td %d %.4f %.5f %.5f %.5f\n", r, row.label.c_str(),
                        std::max<Index>(1, row.run.experts), ++place, result.test,
                        result.cv_importance, result.cv_load, result.max_over_mean_load);
      }
    }
    if (points.empty()) continue;
    text += (text.empty() ? "\"" : "\n\n\"") + name + "\"\n" + points;
  }
  return text;
}

/// Writes a file as a whole: under another name at first, so that nobody ever finds half of it.
inline void write_file(const std::filesystem::path& path, const std::string& text) {
  const std::filesystem::path part = path.string() + ".part";
  std::ofstream file(part, std::ios::binary);
  file << text << std::flush;
  if (!file) throw std::runtime_error("cannot write " + part.string());
  file.close();
  std::filesystem::rename(part, path);
}

/// Prints the tables and leaves them in the folder as tables.md, and NAME.dat of each for study.gp.
inline void report(const std::vector<Table>& tables, const Options& o, const std::string& suffix,
                   const StudyFile& file, const std::filesystem::path& folder) {
  std::string all;
  for (const Table& table : tables) {
    all += (all.empty() ? "" : "\n") + text_of(table, o, suffix, file);
    write_file(folder / (table.name + ".dat"), points_of(table, o, suffix, file));
  }
  write_file(folder / "tables.md", all);
  std::fputs(all.c_str(), stdout);
}

}  // namespace language_model
