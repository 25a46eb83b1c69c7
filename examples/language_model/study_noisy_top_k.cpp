#include "study_training.hpp"

namespace language_model {

std::optional<Result> train_noisy_top_k(const Run& run, const Options& o, const Texts& texts,
                                        Progress& progress) {
  return train_as<Mixture<moe::NoisyTopKGate<float>>>(run, o, texts, progress);
}

}  // namespace language_model
