#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../common/terminal.hpp"
#include "../common/threads.hpp"
#include "report.hpp"
#include "study_file.hpp"
#include "study_runs.hpp"

/// \file
/// Trains what is not trained yet, several runs at a time.

namespace language_model {

/// What a run and whoever waits for it tell each other.
struct Progress {
  std::atomic<Index> update = 0;            ///< the last one that was made
  const std::atomic<bool>* stop = nullptr;  ///< the run is to end, without a result
};

/// "noisy_top_k, 64 experts, weights 0.1 0.1, seed 2"
inline std::string description_of(const Run& run) {
  std::string text = name_of(run.kind);
  if (run.kind == Kind::recurrent) {
    text += ", " + std::to_string(2 + run.layers) + " LSTMs";
  } else {
    text += ", " + std::to_string(run.experts) + (run.experts == 1 ? " expert" : " experts");
    text += ", weights " + digits(run.importance_weight) + " " + digits(run.load_weight);
  }
  if (run.updates > 0) text += ", " + std::to_string(run.updates) + " updates";
  return text + ", seed " + std::to_string(run.seed);
}

/// Calls train(run, progress) for every run that the file does not know, `workers` at a time with a
/// thread each, and adds what it returns to the file. `suffix` completes a run's configuration.
/// Ends early on Ctrl-C, and with the exception of a run that throws; true if all are done.
template <class Train>
bool train_missing(const std::vector<Run>& runs, const Options& o, const std::string& suffix,
                   int workers, StudyFile& file, Train train) {
  std::vector<Run> missing;
  for (const Run& run : runs) {
    if (!file.find(configuration_of(run, o) + suffix)) missing.push_back(run);
  }
  std::printf("%zu runs of %td updates, %zu of them done already\n", runs.size(), o.updates,
              runs.size() - missing.size());
  std::fflush(stdout);

  const double start = seconds_now();
  std::atomic<bool> stop = false;
  std::mutex mutex;  // over what follows, and the file and the terminal
  std::size_t next = 0;
  std::size_t done = 0;
  std::exception_ptr error;
  examples::ProgressBar bar;
  std::vector<Progress> progress(static_cast<std::size_t>(workers));
  std::vector<const Run*> current(progress.size(), nullptr);
  std::atomic<int> at_work = workers;
  const auto work = [&](std::size_t worker) {
    const moe::FlushDenormals flush;
    examples::use_threads(1);
    for (;;) {
      const Run* run = nullptr;
      {
        const std::lock_guard lock(mutex);
        progress[worker].update = 0;
        current[worker] = run = next < missing.size() && !stop ? &missing[next++] : nullptr;
      }
      if (run == nullptr) break;
      try {
        const std::optional<Result> result = train(*run, progress[worker]);
        const std::lock_guard lock(mutex);
        if (!result) continue;
        file.add(configuration_of(*run, o) + suffix, *result);
        ++done;
        bar.clear();
        std::printf("%3zu/%zu  %-52s  validation %8.3f  test %8.3f  %5.0f s\n",
                    runs.size() - missing.size() + done, runs.size(), description_of(*run).c_str(),
                    result->validation, result->test, result->seconds);
        std::fflush(stdout);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        stop = true;
      }
    }
    --at_work;
  };
  std::vector<std::thread> threads;
  for (std::size_t worker = 0; worker < progress.size(); ++worker) {
    progress[worker].stop = &stop;
    threads.emplace_back(work, worker);
  }
  while (at_work > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (examples::interrupted) stop = true;
    if (!bar.is_due()) continue;
    const std::lock_guard lock(mutex);
    double updates = static_cast<double>(done);
    std::string text;
    for (std::size_t worker = 0; worker < progress.size(); ++worker) {
      if (current[worker] == nullptr) continue;
      const Index update = progress[worker].update;
      const Index total = updates_of(*current[worker], o);
      updates += static_cast<double>(update) / static_cast<double>(total);
      text += print("  %s %td/%td", description_of(*current[worker]).c_str(), update, total);
    }
    const double fraction = updates / static_cast<double>(missing.size());
    bar.draw(fraction, print("%zu/%zu", runs.size() - missing.size() + done, runs.size()) + text);
  }
  for (std::thread& thread : threads) thread.join();
  bar.clear();
  if (error) std::rethrow_exception(error);
  std::printf("%zu runs trained in %.0f s%s\n\n", done, seconds_now() - start,
              done < missing.size() ? ", interrupted" : "");
  return done == missing.size();
}

}  // namespace language_model
