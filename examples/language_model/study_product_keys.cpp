#include "study_training.hpp"

namespace language_model {

std::optional<Result> train_product_keys(const Run& run, const Options& o, const Texts& texts,
                                         Progress& progress) {
  return train_as<Mixture<moe::ProductKeyGate<float>>>(run, o, texts, progress);
}

}  // namespace language_model
