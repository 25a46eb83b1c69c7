#include "moe/function_ref.hpp"

#include "catch.hpp"

using moe::detail::FunctionRef;

namespace {

int last = 0;
void set_last(int value) { last = value; }

void call_twice(FunctionRef<void(int)> f) {
  f(1);
  f(2);
}

}  // namespace

TEST_CASE("function reference: calls what it refers to, with its state", "[function_ref]") {
  int sum = 0;
  call_twice([&](int value) { sum += value; });
  CHECK(sum == 3);

  struct Counter {
    int calls = 0;
    void operator()(int) { ++calls; }
  } counter;
  call_twice(counter);  // not a copy
  CHECK(counter.calls == 2);

  call_twice(set_last);
  CHECK(last == 2);
}

TEST_CASE("function reference: of nothing to return, takes what returns something",
          "[function_ref]") {
  int last_value = 0;
  call_twice([&](int value) { return last_value = value; });
  CHECK(last_value == 2);
}

TEST_CASE("function reference: returns what it refers to returns", "[function_ref]") {
  const int base = 40;
  const auto add = [&](int value) { return base + value; };
  const FunctionRef<long(int)> reference = add;
  CHECK(reference(2) == 42);
  const auto name = [](int) { return "not a number"; };
  STATIC_REQUIRE_FALSE(std::is_constructible_v<FunctionRef<long(int)>, decltype(name)&>);
}

TEST_CASE("function reference: a copy refers to the same, an empty one to nothing",
          "[function_ref]") {
  int calls = 0;
  const auto count = [&](int) { ++calls; };
  const FunctionRef<void(int)> reference = count;
  const FunctionRef<void(int)> copy = reference;  // NOLINT: of the reference, not a reference to it
  copy(0);
  CHECK(calls == 1);
  CHECK(static_cast<bool>(copy));
  CHECK_FALSE(static_cast<bool>(FunctionRef<void(int)>{}));
}

TEST_CASE("function reference: arguments that are references stay references", "[function_ref]") {
  int value = 0;
  const auto add = [](int& x) { x += 5; };
  const FunctionRef<void(int&)> reference = add;
  reference(value);
  CHECK(value == 5);
}
