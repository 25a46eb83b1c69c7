#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <optional>
#include <string>

/// \file
/// What programs that run for more than a few seconds need of a terminal.

namespace examples {

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Set by the first Ctrl-C after catch_interrupts(); the second ends the program.
inline volatile std::sig_atomic_t interrupted = 0;

extern "C" inline void on_interrupt(int) {
  interrupted = 1;
  std::signal(SIGINT, SIG_DFL);  // whoever presses twice means it
}
inline void catch_interrupts() { std::signal(SIGINT, on_interrupt); }

/// 3725 seconds as "1:02:05", 65.4 as "1:05".
inline std::string clock_time(double seconds) {
  const long long all = std::llround(std::clamp(seconds, 0.0, 1e9));
  char text[32];
  if (all < 3600) {
    std::snprintf(text, sizeof text, "%lld:%02lld", all / 60, all % 60);
  } else {
    std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", all / 3600, all / 60 % 60, all % 60);
  }
  return text;
}

/// An estimate of the time that is left, from how far the work has come since the first call. So
/// work that went on from a file is not taken for work that was done in no time.
class TimeLeft {
 public:
  /// "1:05 left" when `fraction` of the work is done at `now`, in seconds; nothing before there is
  /// anything to judge by.
  std::string text(double fraction, double now = seconds_now()) {
    if (!first_) first_ = Point{fraction, now};
    const double done = fraction - first_->fraction;
    if (!(done > 0) || fraction > 1) return "";
    return clock_time((now - first_->time) / done * (1 - fraction)) + " left";
  }

 private:
  struct Point {
    double fraction;
    double time;
  };
  std::optional<Point> first_;
};

/// A bar on the terminal, drawn over itself, with the time that is left; nothing where the output is
/// no terminal.
class ProgressBar {
 public:
  explicit ProgressBar(bool visible = isatty(STDERR_FILENO) != 0) : visible_(visible) {}
  ~ProgressBar() { clear(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  /// Whether the last bar is old enough for another.
  bool is_due() const { return visible_ && seconds_now() - drawn_ >= 0.1; }

  /// `fraction` is that of the work that is done.
  void draw(double fraction, const std::string& text) {
    if (!visible_) return;
    drawn_ = seconds_now();
    constexpr int width = 24;
    const int full = std::clamp(static_cast<int>(fraction * width), 0, width);
    const std::string left = time_left_.text(fraction);
    const std::string line = "\r[" + std::string(static_cast<std::size_t>(full), '#') +
                             std::string(static_cast<std::size_t>(width - full), '.') + "] " +
                             left + (left.empty() ? "" : "  ") + text;
    std::fputs((line + "\x1b[K").c_str(), stderr);
  }

  void clear() {
    if (visible_) std::fputs("\r\x1b[K", stderr);
    drawn_ = 0;
  }

 private:
  bool visible_;
  double drawn_ = 0;
  TimeLeft time_left_;
};

}  // namespace examples
