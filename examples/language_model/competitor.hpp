#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <moe/io/safetensors.hpp>
#include <string>
#include <utility>
#include <vector>

#include "contestant.hpp"
#include "contexts.hpp"
#include "corpus.hpp"
#include "serving.hpp"
#include "timetable.hpp"

/// \file
/// The models of a comparison, whatever their gates.

namespace language_model {

class Competitor {
 public:
  virtual ~Competitor() = default;

  virtual Figures figures() const = 0;
  virtual void update(const Batches::Batch& batch, const Timetable& timetable) = 0;
  virtual Evaluation evaluate(const Batches& text, Index sequences) const = 0;
  /// Of the last update's batch.
  virtual const moe::Balance<float>& balance() const = 0;
  /// See Contestant.
  virtual void save(moe::SafetensorsWriter& writer, const std::string& prefix) = 0;
  virtual void load(const moe::SafetensorsFile& file, const std::string& prefix) = 0;
  /// See serve() in serving.hpp.
  virtual Served serve(const Serving& serving, const Batches& validation, const Batches& test,
                       Index sequences) const = 0;
  virtual std::string sample(const Vocabulary& vocabulary, Index count,
                             std::uint64_t seed) const = 0;
  /// See typical_contexts().
  virtual std::vector<Contexts> contexts(const Batches& text, const Vocabulary& vocabulary,
                                         Index sequences, Index batches,
                                         std::size_t count) const = 0;
};

template <class Middle>
class CompetitorOf final : public Competitor {
 public:
  explicit CompetitorOf(ContestantConfig<Middle> config) : contestant_(std::move(config)) {}

  Figures figures() const override { return contestant_.figures(); }
  void update(const Batches::Batch& batch, const Timetable& timetable) override {
    contestant_.update(batch, timetable);
  }
  const moe::Balance<float>& balance() const override { return contestant_.balance(); }
  void save(moe::SafetensorsWriter& writer, const std::string& prefix) override {
    contestant_.save(writer, prefix);
  }
  void load(const moe::SafetensorsFile& file, const std::string& prefix) override {
    contestant_.load(file, prefix);
  }
  Evaluation evaluate(const Batches& text, Index sequences) const override {
    return language_model::evaluate(contestant_.model(), text, sequences);
  }
  Served serve(const Serving& serving, const Batches& validation, const Batches& test,
               Index sequences) const override {
    return language_model::serve(contestant_.model(), serving, validation, test, sequences);
  }
  std::string sample(const Vocabulary& vocabulary, Index count, std::uint64_t seed) const override {
    return language_model::sample(contestant_.model(), vocabulary, count, seed);
  }
  std::vector<Contexts> contexts(const Batches& text, const Vocabulary& vocabulary, Index sequences,
                                 Index batches, std::size_t count) const override {
    return typical_contexts(contestant_.model(), text, vocabulary, sequences, batches, count);
  }

 private:
  Contestant<Middle> contestant_;
};

template <class Middle>
std::unique_ptr<Competitor> make_competitor(ContestantConfig<Middle> config) {
  return std::make_unique<CompetitorOf<Middle>>(std::move(config));
}

}  // namespace language_model
