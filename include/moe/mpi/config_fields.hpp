#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "moe/random.hpp"

/// \file
/// The fields of a configuration, one by one, so that ranks can compare theirs.

namespace moe::detail {

/// Initialises a field of any type; only in what is never evaluated.
struct AnyField {
  template <class Type>
  operator Type() const;  // NOLINT(google-explicit-constructor)
};

inline constexpr std::size_t most_fields = 24;

/// How many fields an aggregate has, up to one more than most_fields: the largest number that it can
/// be initialised with. With fewer it can be too, unless one of those left out must be given.
template <class Type, class... Fields>
constexpr std::size_t field_count() {
  if constexpr (sizeof...(Fields) <= most_fields) {
    constexpr std::size_t more = field_count<Type, Fields..., AnyField>();
    if constexpr (more > 0) return more;
  }
  if constexpr (requires { Type{Fields{}...}; }) {
    return sizeof...(Fields);
  } else {
    return 0;
  }
}

/// Calls call(field) for each field of an aggregate of at most most_fields. C++20 has no other way to reach
/// fields without their names than to bind as many as there are.
template <class Type, class F>
void with_fields(const Type& value, F&& call) {
  constexpr std::size_t count = field_count<Type>();
  static_assert(count <= most_fields, "a configuration of more than 24 fields");
  const auto each = [&](const auto&... field) { (call(field), ...); };
  if constexpr (count == 1) {
    const auto& [a] = value;
    each(a);
  } else if constexpr (count == 2) {
    const auto& [a, b] = value;
    each(a, b);
  } else if constexpr (count == 3) {
    const auto& [a, b, c] = value;
    each(a, b, c);
  } else if constexpr (count == 4) {
    const auto& [a, b, c, d] = value;
    each(a, b, c, d);
  } else if constexpr (count == 5) {
    const auto& [a, b, c, d, e] = value;
    each(a, b, c, d, e);
  } else if constexpr (count == 6) {
    const auto& [a, b, c, d, e, f] = value;
    each(a, b, c, d, e, f);
  } else if constexpr (count == 7) {
    const auto& [a, b, c, d, e, f, g] = value;
    each(a, b, c, d, e, f, g);
  } else if constexpr (count == 8) {
    const auto& [a, b, c, d, e, f, g, h] = value;
    each(a, b, c, d, e, f, g, h);
  } else if constexpr (count == 9) {
    const auto& [a, b, c, d, e, f, g, h, i] = value;
    each(a, b, c, d, e, f, g, h, i);
  } else if constexpr (count == 10) {
    const auto& [a, b, c, d, e, f, g, h, i, j] = value;
    each(a, b, c, d, e, f, g, h, i, j);
  } else if constexpr (count == 11) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k] = value;
    each(a, b, c, d, e, f, g, h, i, j, k);
  } else if constexpr (count == 12) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l);
  } else if constexpr (count == 13) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m);
  } else if constexpr (count == 14) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n);
  } else if constexpr (count == 15) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o);
  } else if constexpr (count == 16) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p);
  } else if constexpr (count == 17) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q);
  } else if constexpr (count == 18) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r);
  } else if constexpr (count == 19) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s);
  } else if constexpr (count == 20) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t);
  } else if constexpr (count == 21) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u);
  } else if constexpr (count == 22) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v);
  } else if constexpr (count == 23) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w);
  } else if constexpr (count == 24) {
    const auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x] = value;
    each(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x);
  }
}

/// Calls f(number) for every number, flag, enumerator and seed of a configuration and of those inside
/// of it, in their order, as 64 bits. What is none of these, a string or a vector for example, is
/// passed by.
template <class Type, class F>
void for_each_field(const Type& value, F& f) {
  if constexpr (std::is_floating_point_v<Type>) {
    f(std::bit_cast<std::int64_t>(static_cast<double>(value)));
  } else if constexpr (std::is_integral_v<Type> || std::is_enum_v<Type> ||
                       std::is_same_v<Type, Seed>) {
    f(static_cast<std::int64_t>(value));
  } else if constexpr (std::is_aggregate_v<Type> && !std::is_array_v<Type>) {
    with_fields(value, [&](const auto& field) { for_each_field(field, f); });
  }
}

}  // namespace moe::detail
