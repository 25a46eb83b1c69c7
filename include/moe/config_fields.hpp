#pragma once

#include <array>
#include <bit>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "moe/parameter.hpp"
#include "moe/random.hpp"

/// \file
/// The fields of a configuration with their names, which are compared between processes and stored in files.
/// A configuration names its fields in visit_fields, and remains an aggregate:
///
///     struct Config {
///       Index width = 0;
///       double dropout = 0.1;
///
///       template <class Self, class Visitor>
///       static constexpr void visit_fields(Self& self, Visitor visit) {
///         visit("width", self.width);  // a number, a flag, an enumerator, a Seed or a configuration
///         visit("dropout", self.dropout);
///       }
///     };
///
/// A field that is left out, or visited twice, does not compile. The names of enumerators, whose values
/// must be 0, 1, 2, ..., are returned by a function next to the enumeration, which is found by
/// argument-dependent lookup:
///
///     enum class Norm { none, layer };
///     constexpr std::array<std::string_view, 2> enumerator_names(Norm) { return {"none", "layer"}; }

namespace moe::detail {

/// Initialises a field of any type, in unevaluated expressions only.
struct AnyField {
  template <class Type>
  operator Type() const;  // NOLINT(google-explicit-constructor)
};

inline constexpr std::size_t most_fields = 24;

/// The number of fields of an aggregate, that is, the largest number of values that can initialise it;
/// counted up to most_fields + 1.
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

/// Calls call(field) for each field of an aggregate of at most most_fields. C++20 reaches fields
/// without their names only by a structured binding of exactly as many names.
template <class Type, class F>
void with_fields(const Type& value, F&& call) {
  constexpr std::size_t count = field_count<Type>();
  static_assert(count <= most_fields,
                "a configuration without visit_fields must have at most 24 fields");
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

/// Memory for an object that is never constructed. Its fields can be referred to all the same, so that they
/// can be counted in a constant expression.
template <class Type>
union Unmade {
  constexpr Unmade() : nothing() {}
  constexpr ~Unmade() {}  // NOLINT(modernize-use-equals-default)
  char nothing;
  Type value;
};

/// A visitor that takes any field, for the check whether a type has visit_fields.
struct AnyFieldVisitor {
  template <class Field>
  constexpr void operator()(std::string_view, Field&) const {}
};

template <class Type>
concept HasNamedFields = requires(Type& config) {
  Type::visit_fields(config, AnyFieldVisitor{});
};

/// Initialises a field of Type, but not a base class: the fields of a base are counted one by one.
template <class Type, std::size_t number>
struct AnyFieldOf {
  template <class Field, class = std::enable_if_t<!std::is_base_of_v<Field, Type>>>
  operator Field() const;  // NOLINT(google-explicit-constructor)
};

/// Whether an aggregate can be initialised with this number of values.
template <class Type, std::size_t... numbers>
constexpr bool takes_fields(std::index_sequence<numbers...>) {
  return requires { Type{AnyFieldOf<Type, numbers>{}...}; };
}

/// The number of fields that visit_fields visits, 0 if it visits one twice or more than 64.
template <HasNamedFields Type>
constexpr std::size_t visited_fields() {
  constexpr std::size_t most = 64;
  Unmade<Type> room;
  std::array<const void*, most> seen{};
  std::size_t count = 0;
  bool twice = false;
  Type::visit_fields(room.value, [&](std::string_view, const auto& field) {
    for (std::size_t i = 0; i < count && i < most; ++i) {
      twice = twice || seen[i] == std::addressof(field);
    }
    if (count < most) seen[count] = std::addressof(field);
    ++count;
  });
  return twice || count > most ? 0 : count;
}

/// Whether visit_fields visits every field of an aggregate once: then the number of visits is the largest
/// number of values that can initialise it.
template <HasNamedFields Type>
constexpr bool visits_every_field() {
  constexpr std::size_t count = visited_fields<Type>();
  return takes_fields<Type>(std::make_index_sequence<count>{}) &&
         !takes_fields<Type>(std::make_index_sequence<count + 1>{});
}

template <class Type>
inline constexpr bool is_plain_field =
    std::is_arithmetic_v<Type> || std::is_enum_v<Type> || std::is_same_v<Type, Seed>;

/// Whether visit_fields reaches everything in a configuration: it contains no configuration without names,
/// no string and no vector.
template <class Type>
constexpr bool is_all_named() {
  bool all = is_plain_field<Type>;
  if constexpr (HasNamedFields<Type>) {
    all = true;
    Unmade<Type> room;
    Type::visit_fields(room.value, [&]<class Field>(std::string_view, Field&) {
      all = all && is_all_named<Field>();
    });
  }
  return all;
}

/// What to do with a nested configuration that has no visit_fields.
enum class Unnamed { numbered, passed_by };

template <Unnamed unnamed, class Type, class F>
void walk_fields(Type& value, const ParameterName& name, F& f) {
  using Plain = std::remove_const_t<Type>;
  if constexpr (is_plain_field<Plain>) {
    f(name, value);
  } else if constexpr (HasNamedFields<Plain>) {
    static_assert(!std::is_aggregate_v<Plain> || visits_every_field<Plain>(),
                  "a configuration's visit_fields must visit each of its fields once");
    Plain::visit_fields(value, [&](std::string_view part, auto& field) {
      walk_fields<unnamed>(field, ParameterName(name, part), f);
    });
  } else if constexpr (unnamed == Unnamed::numbered && std::is_aggregate_v<Plain> &&
                       !std::is_array_v<Plain>) {
    Index number = 0;
    with_fields(
        value, [&](auto& field) { walk_fields<unnamed>(field, ParameterName(name, number++), f); });
  }
}

/// Calls f(name, field) for every number, flag, enumerator and seed of a configuration and of those nested
/// in it, in their order; a name is for example "gate.experts". Without visit_fields the names of fields are
/// 0, 1, 2, ... Fields of other types, such as strings and vectors, are left out.
template <class Config, class F>
void for_each_field(const Config& config, F&& f) {
  walk_fields<Unnamed::numbered>(config, ParameterName(), f);
}

/// The same for fields with names only. They can be changed if the configuration is not const.
template <class Config, class F>
void for_each_named_field(Config& config, F&& f) {
  walk_fields<Unnamed::passed_by>(config, ParameterName(), f);
}

/// A field as 64 bits (a floating-point number as the bits of a double), and back.
template <class Field>
std::int64_t field_bits(const Field& field) {
  if constexpr (std::is_floating_point_v<Field>) {
    return std::bit_cast<std::int64_t>(static_cast<double>(field));
  } else {
    return static_cast<std::int64_t>(field);
  }
}
template <class Field>
Field field_of_bits(std::int64_t bits) {
  if constexpr (std::is_floating_point_v<Field>) {
    return static_cast<Field>(std::bit_cast<double>(bits));
  } else if constexpr (std::is_same_v<Field, Seed>) {
    return static_cast<std::uint64_t>(bits);
  } else {
    return static_cast<Field>(bits);
  }
}

template <class Field>
concept HasEnumeratorNames = std::is_enum_v<Field> && requires(Field field) {
  enumerator_names(field);
};

/// A field as text: "64", "0.1", "true", "softmax". Numbers have the fewest digits that give the same number
/// when read, in any locale.
template <class Field>
std::string field_text(const Field& field) {
  if constexpr (std::is_same_v<Field, bool>) {
    return field ? "true" : "false";
  } else if constexpr (std::is_same_v<Field, Seed>) {
    return std::to_string(static_cast<std::uint64_t>(field));
  } else if constexpr (std::is_enum_v<Field>) {
    const auto number = static_cast<std::underlying_type_t<Field>>(field);
    if constexpr (HasEnumeratorNames<Field>) {
      const auto names = enumerator_names(field);
      const auto index = static_cast<std::size_t>(number);
      if (index < names.size()) return std::string(names[index]);
    }
    return std::to_string(number);
  } else if constexpr (std::is_integral_v<Field>) {
    return std::to_string(field);
  } else {
    std::array<char, 32> digits{};
    auto* const end =
        std::to_chars(digits.data(), digits.data() + digits.size(), static_cast<double>(field)).ptr;
    return {digits.data(), end};
  }
}

}  // namespace moe::detail
