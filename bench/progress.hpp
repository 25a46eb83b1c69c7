#pragma once

#include <benchmark/benchmark.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstddef>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "../examples/common/terminal.hpp"

/// \file
/// How far a benchmark is, on a terminal, while it measures.

namespace bench {

/// Prints nothing.
class Silent : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>&) override {}
};

/// What the options say the rows are printed by, above a bar with the number of rows.
class ProgressReporter : public benchmark::BenchmarkReporter {
 public:
  explicit ProgressReporter(std::size_t rows)
      : rows_(rows), printer_(benchmark::CreateDefaultDisplayReporter()) {}

  bool ReportContext(const Context& context) override {
    const bool goes_on = printer_->ReportContext(context);
    draw();
    return goes_on;
  }
  void ReportRuns(const std::vector<Run>& report) override {
    bar_.clear();
    printer_->ReportRuns(report);
    // The statistics over repetitions are no row of their own.
    if (!report.empty() && report.front().run_type == Run::RT_Iteration) ++done_;
    if (done_ < rows_) draw();
  }
  void Finalize() override {
    bar_.clear();
    printer_->Finalize();
  }

 private:
  void draw() {
    bar_.draw(static_cast<double>(done_) / static_cast<double>(std::max<std::size_t>(1, rows_)),
              std::to_string(done_) + "/" + std::to_string(rows_) + " rows");
  }

  std::size_t rows_;
  std::size_t done_ = 0;
  std::unique_ptr<benchmark::BenchmarkReporter> printer_;
  examples::ProgressBar bar_;
};

/// How many rows the arguments choose. Prints the help and ends the program if they say so. Says
/// that there are none unless `is_silent`.
inline std::size_t count_rows(std::vector<char*> arguments, bool is_silent) {
  std::string list = "--benchmark_list_tests=true";
  arguments.push_back(list.data());
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());
  std::ostream nowhere(nullptr);
  Silent silent;
  silent.SetOutputStream(&nowhere);
  if (is_silent) silent.SetErrorStream(&nowhere);
  return benchmark::RunSpecifiedBenchmarks(&silent);
}

/// Each row is printed when it is done, so there is nothing more to say than that.
extern "C" inline void on_bench_interrupt(int) {
  constexpr char text[] = "\r\x1b[Kinterrupted; the rows that are printed are whole\n";
  [[maybe_unused]] const auto written = write(STDERR_FILENO, text, sizeof text - 1);
  _exit(130);
}

/// Runs the benchmarks that the arguments choose, as benchmark's own main program does. Ctrl-C ends the
/// program with code 130. With `is_silent` the same benchmarks run, and nothing is printed or written to a
/// file: for all ranks but one, where ranks measure together.
inline int run(int argc, char** argv, bool is_silent = false) {
  std::vector<char*> arguments(argv, argv + argc);
  std::string no_file = "--benchmark_out=";  // whatever the arguments and the environment say
  if (is_silent) arguments.push_back(no_file.data());
  const std::size_t rows = count_rows(arguments, is_silent);
  if (rows == 0) return 0;  // which count_rows() has said
  // Before the user's, which may be to list the rows.
  std::string measure = "--benchmark_list_tests=false";
  arguments.insert(arguments.begin() + 1, measure.data());
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());
  if (is_silent) {
    if (count > 1) return 0;  // unknown ones: another rank reports them and fails
    Silent silent;
    benchmark::RunSpecifiedBenchmarks(&silent);
  } else {
    if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 1;
    std::signal(SIGINT, on_bench_interrupt);
    ProgressReporter reporter(rows);
    benchmark::RunSpecifiedBenchmarks(&reporter);
  }
  benchmark::Shutdown();
  return 0;
}

}  // namespace bench
