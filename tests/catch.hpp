#pragma once

/// @file
/// Catch2, version 2 or 3, under one name.

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#include <concepts>
#include <string>

namespace Catch::Matchers {

/// Of a text, as in version 2. Version 3's own function looks for an element, a character.
template <class Text>
requires std::convertible_to<Text, std::string>
auto Contains(Text&& text) { return ContainsSubstring(text); }

}  // namespace Catch::Matchers
#else
#include <catch2/catch.hpp>
#endif
