#include "study_training.hpp"

namespace language_model {

std::optional<Result> train_recurrent(const Run& run, const Options& o, const Texts& texts,
                                      Progress& progress) {
  return train_as<RecurrentStack<>>(run, o, texts, progress);
}

}  // namespace language_model
