#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "moe/io/safetensors/header.hpp"

/// \file
/// Explicit instantiations of most of what the headers of moe/io use of nlohmann-json. The precompiled headers of
/// tests have this file, so that no test instantiates them, and json.cpp does.

#ifdef MOE_TEST_INSTANTIATE
#define MOE_TEST_EXTERN
#else
#define MOE_TEST_EXTERN extern
#endif

MOE_TEST_EXTERN template class nlohmann::basic_json<>;
// Later versions may have more arguments.
#if NLOHMANN_JSON_VERSION_MAJOR == 3 && NLOHMANN_JSON_VERSION_MINOR < 12
MOE_TEST_EXTERN template nlohmann::json nlohmann::json::parse<std::string&>(
    std::string&, nlohmann::json::parser_callback_t, bool, bool);
MOE_TEST_EXTERN template bool
nlohmann::json::sax_parse<const std::string&, moe::detail::SafetensorsHeader>(
    const std::string&, moe::detail::SafetensorsHeader*, nlohmann::json::input_format_t, bool,
    bool);
#endif

#undef MOE_TEST_EXTERN
