#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

/// \file
/// A --help that fits a screen of 24 lines of 100 characters, and --help-all for the other options.

namespace examples {

/// Two columns, options and what they do, no line longer than 100 characters. Of options that are no
/// common ones the short form tells how many there are.
class HelpFormatter : public CLI::FormatterBase {
 public:
  static constexpr const char* more = "More options";

  HelpFormatter() = default;

  std::string make_help(const CLI::App* app, std::string name,
                        CLI::AppFormatMode mode) const override {
    const bool all = mode != CLI::AppFormatMode::Normal;
    std::string text;
    append(text, "", app->get_description());
    std::string usage = "Usage: " + name + " [OPTIONS]";
    std::string options;
    std::size_t hidden = 0;
    for (const CLI::Option* option : app->get_options({})) {
      if (option->get_positional()) usage += " " + option->get_name(true);
      if (!all && option->get_group() == more) {
        ++hidden;
        continue;
      }
      append(options, left_of(*option), right_of(*option, all));
    }
    text += "\n" + usage + "\n" + options;
    if (hidden > 0) {
      append(text, "", "\n--help-all lists " + std::to_string(hidden) + " more.");
    }
    if (!app->get_footer().empty()) append(text, "", "\n" + app->get_footer());
    return text;
  }

 private:
  static constexpr std::size_t width = 100;
  static constexpr std::size_t indent = 31;  // of the second column

  /// "  --seed=1", or "  --data TEXT" where there is no default.
  static std::string left_of(const CLI::Option& option) {
    std::string text = "  " + option.get_name(option.get_positional(), !option.get_positional());
    // Of a flag that clears what it is for, CLI11 tells what it sets: "--no-test{false}".
    text.resize(std::min(text.find('{'), text.size()));
    if (option.get_type_size() == 0) return text;  // a flag
    const std::string type = option.get_type_name();
    const std::string value = option.get_default_str();
    text += value.empty() ? " " + type.substr(0, type.find(':')) : "=" + value;
    return text + (option.get_expected_max() > 1 ? " ..." : "");
  }

  /// What it does; where all is told, with its type or range and the options that it needs or cannot be
  /// with.
  static std::string right_of(const CLI::Option& option, bool all) {
    if (!all) return option.get_description();
    const std::string type = option.get_type_size() == 0 ? "" : option.get_type_name();
    std::string details = type.substr(type.find(':') + 1);
    const auto add = [&](const char* what, const std::string& name) {
      details += (details.empty() ? "" : ", ") + std::string(what) + name;
    };
    for (const CLI::Option* other : option.get_needs()) add("needs ", other->get_name());
    for (const CLI::Option* other : option.get_excludes()) add("not with ", other->get_name());
    return option.get_description() + (details.empty() ? "" : " (" + details + ")");
  }

  /// Adds `right` in lines that begin in the column after `left`, or below where that is too long.
  static void append(std::string& text, const std::string& left, const std::string& right) {
    const std::size_t margin = left.empty() ? 0 : indent;
    std::string line = left;
    if (line.size() + 1 > margin && margin > 0) {
      text += line + "\n";
      line.clear();
    }
    line.resize(margin, ' ');
    const auto finish = [&] {
      text += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
      line.assign(margin, ' ');
    };
    std::string_view rest = right;
    while (!rest.empty()) {
      if (rest.front() == '\n') finish();
      const bool is_gap = rest.front() == '\n' || rest.front() == ' ';
      const std::size_t end = is_gap ? 1 : std::min(rest.find_first_of(" \n"), rest.size());
      const std::string_view word = rest.substr(0, end);
      rest.remove_prefix(end);
      if (word == "\n") continue;
      if (word != " " && line.size() + word.size() > width) finish();
      // Blanks at the beginning of a line of the caller's are an indentation; where we broke it, they
      // are none.
      line += word;
    }
    finish();
  }
};

/// Leaves the options of these names, and the positional ones, in --help, and moves all others to
/// --help-all. To be called when all options have been added. Throws CLI::OptionNotFound for a name
/// that is none.
inline void set_help(CLI::App& app, const std::vector<std::string>& common) {
  app.formatter(std::make_shared<HelpFormatter>());
  app.set_help_flag("-h,--help", "the most common options");
  app.set_help_all_flag("--help-all", "all options");
  for (CLI::Option* option : app.get_options({})) {
    const bool is_help = option == app.get_help_ptr() || option == app.get_help_all_ptr();
    if (!is_help && !option->get_positional()) option->group(HelpFormatter::more);
  }
  for (const std::string& name : common) app.get_option(name)->group("Options");
}

}  // namespace examples
