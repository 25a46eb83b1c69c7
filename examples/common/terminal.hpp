#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <string>

/// \file
/// What programs that train for minutes need of a terminal.

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

/// A bar on the terminal, drawn over itself; nothing where the output is no terminal.
class ProgressBar {
 public:
  explicit ProgressBar(bool visible = isatty(STDERR_FILENO) != 0) : visible_(visible) {}
  ~ProgressBar() { clear(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  /// Whether the last bar is old enough for another.
  bool is_due() const { return visible_ && seconds_now() - drawn_ >= 0.1; }

  void draw(double fraction, const std::string& text) {
    drawn_ = seconds_now();
    constexpr int width = 24;
    const int full = std::clamp(static_cast<int>(fraction * width), 0, width);
    const std::string line = "\r[" + std::string(static_cast<std::size_t>(full), '#') +
                             std::string(static_cast<std::size_t>(width - full), '.') + "] " + text;
    std::fputs((line + "\x1b[K").c_str(), stderr);
  }

  void clear() {
    if (visible_) std::fputs("\r\x1b[K", stderr);
    drawn_ = 0;
  }

 private:
  bool visible_;
  double drawn_ = 0;
};

}  // namespace examples
