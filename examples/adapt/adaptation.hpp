#pragma once

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <moe/moe.hpp>
#include <optional>
#include <string>
#include <utility>

#include "../common/terminal.hpp"
#include "../language_model/checkpoint.hpp"
#include "../language_model/contestant.hpp"
#include "../language_model/corpus.hpp"
#include "../language_model/mixture.hpp"
#include "../language_model/model.hpp"
#include "../language_model/report.hpp"
#include "options.hpp"

/// \file
/// The training of a model on the new text, in one of the ways.

namespace adapt {

using language_model::Batches;
using language_model::Corpus;
using language_model::Model;

using Gate = moe::NoisyTopKGate<float>;
using Base = language_model::Mixture<Gate>;

/// The parts of a text as batches of the options' size.
struct Text {
  Text(const Corpus& corpus, const language_model::Options& o)
      : training(corpus.train, o.sequences, o.steps),
        validation(corpus.validation, o.sequences, o.steps),
        test(corpus.test, o.sequences, o.steps) {}

  Batches training, validation, test;
};

/// Perplexities; the test part is read only where the options say so.
struct Perplexities {
  double new_validation = 0;
  std::optional<double> new_test{}, old_test{};
};

template <class Middle>
Perplexities evaluate(const Model<Middle>& model, const Options& o, const Text& old_text,
                      const Text& new_text) {
  const auto perplexity = [&](const Batches& text) {
    return language_model::evaluate(model, text, o.base.sequences).perplexity;
  };
  Perplexities result{.new_validation = perplexity(new_text.validation)};
  if (o.test) {
    result.new_test = perplexity(new_text.test);
    result.old_test = perplexity(old_text.test);
  }
  return result;
}

struct Way {
  std::string name;
  double learning_rate = 0;  ///< the highest
  bool factored = false;     ///< FactoredAdam for the experts; else Adam for everything
};

struct Adapted {
  Index trained = 0;             ///< scalars
  Index bytes = 0;               ///< of the gradients and of what the optimizers remember
  double seconds = 0;            ///< of the updates
  double processor_seconds = 0;  ///< of all threads in them
  Perplexities perplexities{};
};

/// Trains what is not frozen of a model on the new text. Nothing, if Ctrl-C came before the last
/// update. What was reached is then in the checkpoint, from which the next call goes on; at the end the
/// whole training is.
template <class Middle>
std::optional<Adapted> train(const Way& way, Model<Middle> model, const Options& o,
                             const Text& old_text, const Text& new_text,
                             const language_model::Checkpoint& checkpoint = {}) {
  auto config = language_model::sparse_config<Middle>(o.base, {});
  config.factored = way.factored;
  language_model::Contestant<Middle> contestant(std::move(config), std::move(model));
  const moe::WarmUpLinearDecay learning_rate{
      .peak = way.learning_rate, .warm_up = std::min(o.warm_up, o.updates), .total = o.updates + 1};
  examples::ProgressBar progress;
  Batches::Batch batch;
  const language_model::Place place =
      checkpoint.read([&](const moe::SafetensorsFile& file, const language_model::Place&) {
        contestant.load(file, "adapted.");
      });
  double processor_seconds = place.seconds;
  const auto save = [&](Index update) {
    checkpoint.write({update, processor_seconds},
                     [&](moe::SafetensorsWriter& writer) { contestant.save(writer, "adapted."); });
  };
  for (Index update = place.update + 1; update <= o.updates; ++update) {
    if (examples::interrupted) {
      save(update - 1);
      return std::nullopt;
    }
    const Index index = (update - 1) % new_text.training.count();
    new_text.training.get(index, batch);
    if (index == 0) contestant.start_epoch();
    const std::clock_t start = std::clock();
    contestant.update(batch, static_cast<std::uint64_t>(update), learning_rate(update));
    processor_seconds += static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    if (!progress.is_due()) continue;
    progress.draw(static_cast<double>(update) / static_cast<double>(o.updates),
                  language_model::print("%s  %td/%td  loss %.3f", way.name.c_str(), update,
                                        o.updates, contestant.figures().loss));
  }
  progress.clear();
  if (place.update < o.updates) save(o.updates);
  return Adapted{.trained = contestant.figures().parameters,
                 .bytes = contestant.training_bytes(),
                 .seconds = contestant.seconds(),
                 .processor_seconds = processor_seconds,
                 .perplexities = evaluate(contestant.model(), o, old_text, new_text)};
}

}  // namespace adapt
