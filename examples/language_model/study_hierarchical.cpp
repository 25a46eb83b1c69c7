#include "study_training.hpp"

namespace language_model {

std::optional<Result> train_hierarchical(const Run& run, const Options& o, const Texts& texts,
                                         Progress& progress) {
  return train_as<Mixture<moe::HierarchicalGate<float>>>(run, o, texts, progress);
}

}  // namespace language_model
