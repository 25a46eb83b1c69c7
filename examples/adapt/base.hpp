#pragma once

#include <cstdio>
#include <filesystem>
#include <moe/io/safetensors.hpp>
#include <optional>
#include <string>

#include "../language_model/timetable.hpp"
#include "adaptation.hpp"

/// \file
/// The base: the sparse model of ../language_model, trained on the old text or read from a file.

namespace adapt {

/// The trained base. Nothing, if Ctrl-C came before the last update. What was reached is then in the
/// checkpoint, from which the next call goes on.
inline std::optional<Model<Base>> train_base(const Options& o, const Corpus& corpus,
                                             const Text& text,
                                             const language_model::Checkpoint& checkpoint) {
  language_model::Contestant<Base> contestant(language_model::sparse_config<Base>(
      o.base, language_model::frequencies_of(corpus.train, corpus.vocabulary.size())));
  language_model::Timetable timetable(o.base, text.training.count());
  const language_model::Place place =
      checkpoint.read([&](const moe::SafetensorsFile& file, const language_model::Place&) {
        contestant.load(file, "base.");
        std::printf("the base goes on from %s\n", checkpoint.path().c_str());
      });
  timetable.resume(place);
  const double start = examples::seconds_now() - place.seconds;
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
  // Not what the signal says by now, which may come after the last update.
  if (timetable.is_over()) return contestant.model();
  if (checkpoint.is_wanted()) {
    checkpoint.write(timetable.place(examples::seconds_now() - start),
                     [&](moe::SafetensorsWriter& writer) { contestant.save(writer, "base."); });
    std::printf("the same command goes on from %s\n", checkpoint.path().c_str());
  }
  return std::nullopt;
}

/// All that decides the weights of the base.
inline std::string base_settings(const Options& o, const Corpus& corpus, const Text& text) {
  return language_model::training_settings(
      o.base, corpus, language_model::Timetable(o.base, text.training.count()).total());
}

/// Whether the rank and alpha of the options matter to a way.
inline bool has_adapters(const std::string& name) { return name.starts_with("lora"); }

/// Where the training of a way is saved: beside the file of the base, if there is one. `settings` are
/// those of the base and of the new text.
inline language_model::Checkpoint checkpoint_of(const std::string& name, const Way& way,
                                                const Options& o, const std::string& settings) {
  if (o.base_file.empty()) return {};
  return {
      o.base_file + "." + name + ".part",
      settings +
          language_model::print(" way=%s rate=%g warm_up=%td updates=%td", name.c_str(),
                                way.learning_rate, o.warm_up, o.updates) +
          (has_adapters(name) ? language_model::print(" rank=%td alpha=%g", o.rank, o.alpha) : "")};
}

/// The base of the options' file, or a new one, which is written there. Nothing, if Ctrl-C came before it
/// was trained; what was reached is then beside it, in a file whose name ends with ".part". Throws
/// std::runtime_error where a file is that of another base.
inline std::optional<Model<Base>> make_base(const Options& o, const Corpus& corpus,
                                            const Text& text) {
  constexpr const char* key = "base";
  const std::string settings = base_settings(o, corpus, text);
  if (o.base_file.empty()) return train_base(o, corpus, text, {});
  if (!std::filesystem::exists(o.base_file)) {
    const language_model::Checkpoint checkpoint(o.base_file + ".part", settings);
    std::optional<Model<Base>> model = train_base(o, corpus, text, checkpoint);
    if (!model) return std::nullopt;
    moe::SafetensorsWriter writer;
    writer.add_parameters(*model);
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
