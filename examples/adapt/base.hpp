#pragma once

#include <cstdio>
#include <filesystem>
#include <moe/io/safetensors.hpp>
#include <string>

#include "../language_model/checkpoint.hpp"
#include "../language_model/timetable.hpp"
#include "adaptation.hpp"

/// \file
/// The base: the sparse model of ../language_model, trained on the old text or read from a file.

namespace adapt {

/// The base as far as it is trained. Ctrl-C ends the training early; what was reached is then in the
/// checkpoint, from which the next call goes on.
inline Model<Base> train_base(const Options& o, const Corpus& corpus, const Text& text,
                              const language_model::Checkpoint& checkpoint) {
  language_model::Contestant<Base> contestant(language_model::sparse_config<Base>(
      o.base, language_model::frequencies_of(corpus.train, corpus.vocabulary.size())));
  language_model::Timetable timetable(o.base, text.training.count());
  double start = examples::seconds_now();
  if (checkpoint.exists()) {
    start -= checkpoint.read(
        timetable, [&](const moe::SafetensorsFile& file) { contestant.load(file, "base."); });
    std::printf("the base goes on from %s\n", checkpoint.path().c_str());
  }
  examples::ProgressBar progress;
  Batches::Batch batch;
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
  if (examples::interrupted && checkpoint.is_wanted()) {
    checkpoint.write(timetable, examples::seconds_now() - start,
                     [&](moe::SafetensorsWriter& writer) { contestant.save(writer, "base."); });
    std::printf("the same command goes on from %s\n", checkpoint.path().c_str());
  }
  return contestant.model();
}

/// The base of the options' file, or a new one, which is written there. What Ctrl-C leaves of its
/// training is beside it, in a file whose name ends with ".part". Throws std::runtime_error where a file
/// is that of another base.
inline Model<Base> make_base(const Options& o, const Corpus& corpus, const Text& text) {
  constexpr const char* key = "base";
  const language_model::Timetable timetable(o.base, text.training.count());
  const std::string settings = language_model::training_settings(o.base, corpus, timetable.total());
  if (o.base_file.empty()) return train_base(o, corpus, text, {});
  if (!std::filesystem::exists(o.base_file)) {
    const language_model::Checkpoint checkpoint(o.base_file + ".part", settings);
    Model<Base> model = train_base(o, corpus, text, checkpoint);
    if (examples::interrupted) return model;
    moe::SafetensorsWriter writer;
    writer.add_parameters(model);
    writer.set_metadata(key, settings);
    writer.write(o.base_file);
    std::filesystem::remove(checkpoint.path());
    std::printf("it is in %s\n", o.base_file.c_str());
    return model;
  }
  const moe::SafetensorsFile file = language_model::open_with_settings(o.base_file, key, settings);
  Model<Base> model(
      language_model::sparse_config<Base>(
          o.base, std::vector<double>(static_cast<std::size_t>(corpus.vocabulary.size())))
          .model);
  file.read_parameters(model);
  std::printf("the base is that of %s\n", o.base_file.c_str());
  return model;
}

}  // namespace adapt
