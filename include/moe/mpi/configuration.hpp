#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moe/config_fields.hpp"
#include "moe/mpi/communicator.hpp"

/// \file
/// Checks that all ranks construct a layer with the same configuration.

namespace moe::mpi {

/// Throws Error on all ranks, with the field, if the configurations of a layer differ. Collective.
template <class Config>
void check_same_configuration(const Config& config, Index experts,
                              const Communicator& communicator) {
  std::vector<std::int64_t> fields;
  std::vector<std::int64_t> root;
  communicator.attempt("ExpertParallel: the fields of Config", [&] {
    moe::detail::for_each_field(config, [&](const ParameterName&, const auto& field) {
      fields.push_back(moe::detail::field_bits(field));
    });
    root = fields;
  });
  communicator.agree("ExpertParallel::ExpertParallel",
                     {{"Config.width", config.width},
                      {"the number of experts", experts},
                      {"Config.seed", static_cast<std::int64_t>(config.seed)},
                      {"the number of fields of Config", static_cast<Index>(fields.size())}});
  communicator.broadcast(std::span<std::int64_t>(root), 0);
  communicator.attempt("ExpertParallel: Config", [&] {
    auto there = root.begin();
    moe::detail::for_each_field(
        config, [&]<class Field>(const ParameterName& name, const Field& field) {
          const std::int64_t bits = *there++;
          if (moe::detail::field_bits(field) == bits) return;
          moe::detail::require(false, "ExpertParallel: Config.", name.string(),
                               " differs: ", moe::detail::field_text(field), " here, ",
                               moe::detail::field_text(moe::detail::field_of_bits<Field>(bits)),
                               " on rank 0");
        });
  });
}

}  // namespace moe::mpi
