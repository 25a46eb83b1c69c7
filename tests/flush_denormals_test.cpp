#include "moe/flush_denormals.hpp"

#include <cfenv>
#include <cmath>
#include <limits>
#include <vector>

#include "moe/parallel.hpp"
#include "support.hpp"

using namespace moe;

namespace {

/// Half of the smallest normal number, calculated when it is called.
template <class Scalar>
Scalar half_of_the_smallest() {
  volatile Scalar smallest = std::numeric_limits<Scalar>::min();
  return smallest / 2;
}

/// Whether a denormal operand counts.
template <class Scalar>
bool twice_a_denormal_is_normal() {
  volatile Scalar denormal = std::numeric_limits<Scalar>::denorm_min();
  const Scalar large = std::ldexp(Scalar{1}, std::numeric_limits<Scalar>::digits + 2);
  return denormal * large > 0;
}

}  // namespace

TEMPLATE_TEST_CASE("flush denormals: results and operands, for as long as it lives",
                   "[flush_denormals]", float, double) {
  CHECK(half_of_the_smallest<TestType>() > 0);
  CHECK(twice_a_denormal_is_normal<TestType>());
  // To be compared afterwards: within, a denormal is 0 for a comparison too.
  volatile TestType half = 1;
  {
    const FlushDenormals flush;
    half = half_of_the_smallest<TestType>();
    CHECK(twice_a_denormal_is_normal<TestType>() != FlushDenormals::supported);
    {
      const FlushDenormals again;
      CHECK(twice_a_denormal_is_normal<TestType>() != FlushDenormals::supported);
    }
    CHECK(twice_a_denormal_is_normal<TestType>() != FlushDenormals::supported);
  }
  CHECK((half > 0) != FlushDenormals::supported);
  CHECK(half_of_the_smallest<TestType>() > 0);
  CHECK(twice_a_denormal_is_normal<TestType>());
}

TEST_CASE("flush denormals: workers do as the calling thread does", "[flush_denormals]") {
  const test::Threads scope(4);
  const auto flushed = [] {
    std::vector<int> zero(64, -1);
    parallel_for(
        64, [&](Index i, Index) { zero[detail::to_size(i)] = half_of_the_smallest<float>() == 0; });
    int count = 0;
    for (const int z : zero) count += z;
    return count;
  };
  CHECK(flushed() == 0);
  {
    const FlushDenormals flush;
    CHECK(flushed() == (FlushDenormals::supported ? 64 : 0));
  }
  CHECK(flushed() == 0);
}

TEST_CASE("flush denormals: workers round as the calling thread does", "[flush_denormals]") {
  const test::Threads scope(4);
  const auto thirds = [] {
    std::vector<float> result(64);
    parallel_for(64, [&](Index i, Index) {
      volatile float one = 1;
      result[detail::to_size(i)] = one / 3;
    });
    return result;
  };
  const std::vector<float> nearest = thirds();
  CHECK(nearest == std::vector<float>(64, 0x1.555556p-2f));
  REQUIRE(std::fesetround(FE_DOWNWARD) == 0);
  const std::vector<float> downward = thirds();
  REQUIRE(std::fesetround(FE_TONEAREST) == 0);
  if constexpr (FlushDenormals::supported) {
    CHECK(downward == std::vector<float>(64, 0x1.555554p-2f));
  }
}

TEST_CASE("flush denormals: exceptions that have happened stay noted", "[flush_denormals]") {
  std::feclearexcept(FE_ALL_EXCEPT);
  std::feraiseexcept(FE_DIVBYZERO);
  { const FlushDenormals flush; }
  CHECK(std::fetestexcept(FE_DIVBYZERO) != 0);
  std::feclearexcept(FE_ALL_EXCEPT);
}
