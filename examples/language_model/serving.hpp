#pragma once

#include <cstdio>
#include <moe/moe.hpp>
#include <moe/weights/serving_layer.hpp>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "../common/terminal.hpp"
#include "contestant.hpp"
#include "corpus.hpp"
#include "report.hpp"

/// \file
/// What a trained model loses when it is served with narrow weights.

namespace language_model {

/// A model with its experts and linear maps in a narrow format. Embedding, gate, norms and LSTMs stay
/// as they are.
template <class Middle, class Format>
using ServedModel = Model<typename Middle::template Served<Format>, moe::NarrowLinear<Format>>;

/// A way to serve: the format of the weights, and what their products round activations to.
struct Serving {
  std::string format;
  moe::Activations activations = moe::Activations::float32;
};

/// As they were trained.
inline const char* const trained_format = "float32";

/// Calls f with a value of each narrow format.
template <class F>
void for_each_format(F&& f) {
  std::apply([&](auto... format) { (f(format), ...); },
             std::tuple<moe::BFloat16, moe::Float16, moe::Int8, moe::Int4>());
}

/// What --serve takes.
inline std::vector<std::string> serving_choices() {
  std::vector<std::string> choices;
  for_each_format([&](auto format) { choices.emplace_back(format.name); });
  choices.emplace_back("all");
  return choices;
}

/// The rows of the table for a choice: the trained model, then every way to serve in that format.
inline std::vector<Serving> servings_of(std::string_view choice) {
  std::vector<Serving> servings{{trained_format}};
  for_each_format([&](auto format) {
    if (choice != "all" && choice != format.name) return;
    servings.push_back({format.name});
    if (format.scaled) servings.push_back({format.name, moe::Activations::int8});
  });
  return servings;
}

inline std::string name_of(moe::Activations activations) {
  return activations == moe::Activations::int8 ? "int8" : "float32";
}

/// A model that is served so.
struct Served {
  Serving serving;
  Index weight_bytes = 0;  ///< of the experts
  Evaluation validation{}, test{};
  double tokens_per_second = 0;  ///< of both evaluations
};

/// `sequences` are those of a batch. Throws std::invalid_argument, which names the weight, where one
/// cannot be rounded.
template <class Middle>
Served serve(const Model<Middle>& trained, const Serving& serving, const Batches& validation,
             const Batches& test, Index sequences) {
  Served served{.serving = serving};
  const auto evaluate_both = [&](const auto& model) {
    const double start = examples::seconds_now();
    served.validation = evaluate(model, validation, sequences);
    served.test = evaluate(model, test, sequences);
    const Index tokens = validation.tokens() + test.tokens();
    served.tokens_per_second = static_cast<double>(tokens) / (examples::seconds_now() - start);
  };
  if (serving.format == trained_format) {
    trained.for_each_mixture([&](const Middle& mixture) {
      for (const auto& expert : mixture.layer().experts()) {
        moe::for_each_parameter(expert, [&](const std::string& name, const auto& parameter) {
          if (!name.ends_with("weight")) return;
          served.weight_bytes += parameter.size() * static_cast<Index>(sizeof(float));
        });
      }
    });
    evaluate_both(trained);
  }
  for_each_format([&](auto format) {
    if (serving.format != format.name) return;
    const ServedModel<Middle, decltype(format)> model(trained,
                                                      {.activations = serving.activations});
    model.for_each_mixture(
        [&](const auto& mixture) { served.weight_bytes += mixture.layer().weight_bytes(); });
    evaluate_both(model);
  });
  return served;
}

/// The lines of a table in Markdown.
inline const char* const served_header =
    "| weights  | activations | bytes of experts | validation |   ratio |    test |   ratio | "
    "tokens/s |\n"
    "| -------- | ----------- | ---------------: | ---------: | ------: | ------: | ------: | "
    "-------: |";
/// Ratios are to the perplexities of `trained`, the first row.
inline std::string served_row(const Served& served, const Served& trained) {
  return print("| %-8s | %-11s | %16td | %10.4f | %7.5f | %7.4f | %7.5f | %8.0f |",
               served.serving.format.c_str(), name_of(served.serving.activations).c_str(),
               served.weight_bytes, served.validation.perplexity,
               served.validation.perplexity / trained.validation.perplexity, served.test.perplexity,
               served.test.perplexity / trained.test.perplexity, served.tokens_per_second);
}

}  // namespace language_model
