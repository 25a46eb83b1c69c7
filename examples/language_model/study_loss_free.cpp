#include "study_training.hpp"

namespace language_model {

std::optional<Result> train_loss_free(const Run& run, const Options& o, const Texts& texts,
                                      Progress& progress) {
  return train_as<Mixture<moe::TopKGate<float>>>(run, o, texts, progress);
}

}  // namespace language_model
