#pragma once

#include <cstdio>
#include <filesystem>
#include <moe/io/safetensors.hpp>
#include <stdexcept>
#include <string>

#include "../language_model/study_runs.hpp"
#include "../language_model/timetable.hpp"
#include "adaptation.hpp"

/// \file
/// The base: the sparse model of ../language_model, trained on the old text or read from a file.

namespace adapt {

/// All that decides the weights of the base.
inline std::string base_settings(const language_model::Options& o, const Corpus& corpus,
                                 Index updates) {
  return language_model::configuration_of({.experts = o.experts,
                                           .top_k = o.top_k,
                                           .hidden = o.hidden,
                                           .importance_weight = o.importance_weight,
                                           .load_weight = o.load_weight,
                                           .seed = o.seed,
                                           .updates = updates},
                                          o) +
         language_model::name_of(corpus);
}

/// Ctrl-C ends the training early; then nothing is written.
inline Model<Base> train_base(const Options& o, const Corpus& corpus, const Text& text) {
  language_model::Contestant<Base> contestant(language_model::sparse_config<Base>(
      o.base, language_model::frequencies_of(corpus.train, corpus.vocabulary.size())));
  language_model::Timetable timetable(o.base, text.training.count());
  examples::ProgressBar progress;
  Batches::Batch batch;
  const double start = examples::seconds_now();
  while (!timetable.is_over() && !examples::interrupted) {
    timetable.next(examples::seconds_now() - start);
    text.training.get(timetable.batch(), batch);
    contestant.update(batch, timetable);
    if (progress.is_due()) {
      progress.draw(timetable.fraction(),
                    language_model::progress_text(timetable, {contestant.figures()}));
    }
  }
  progress.clear();
  std::printf("the base: %td updates on the old text in %.0f s\n", timetable.update(),
              contestant.seconds());
  return contestant.model();
}

/// The base of the options' file, or a new one, which is written there. Throws std::runtime_error
/// where the file is that of another base.
inline Model<Base> make_base(const Options& o, const Corpus& corpus, const Text& text) {
  constexpr const char* key = "base";
  const language_model::Timetable timetable(o.base, text.training.count());
  const std::string settings = base_settings(o.base, corpus, timetable.total());
  if (o.base_file.empty() || !std::filesystem::exists(o.base_file)) {
    Model<Base> model = train_base(o, corpus, text);
    if (o.base_file.empty() || examples::interrupted) return model;
    moe::SafetensorsWriter writer;
    writer.add_parameters(model);
    writer.set_metadata(key, settings);
    writer.write(o.base_file);
    std::printf("it is in %s\n", o.base_file.c_str());
    return model;
  }
  const moe::SafetensorsFile file(o.base_file);
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end() || found->second != settings) {
    throw std::runtime_error(o.base_file + " is another base. It has\n  " +
                             (found == file.metadata().end() ? "no settings" : found->second) +
                             "\nand the options say\n  " + settings);
  }
  Model<Base> model(
      language_model::sparse_config<Base>(
          o.base, std::vector<double>(static_cast<std::size_t>(corpus.vocabulary.size())))
          .model);
  file.read_parameters(model);
  std::printf("the base is that of %s\n", o.base_file.c_str());
  return model;
}

}  // namespace adapt
