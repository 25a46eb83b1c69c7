#include "moe/kernels/math.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "../support.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)

namespace {

/// f of a single value, by way of map().
template <class Scalar, class F>
Scalar apply(F f, Scalar x) {
  Scalar y{};
  map(1, &y, f, &x);
  return y;
}

template <class Scalar>
struct Exp {
  Packet<Scalar> operator()(const Packet<Scalar>& x) const { return detail::exp<Scalar>(x); }
};
template <class Scalar>
struct Sigmoid {
  Packet<Scalar> operator()(const Packet<Scalar>& x) const { return sigmoid<Scalar>(x); }
};
template <class Scalar>
struct Tanh {
  Packet<Scalar> operator()(const Packet<Scalar>& x) const { return detail::tanh<Scalar>(x); }
};
template <class Scalar>
struct Softplus {
  Packet<Scalar> operator()(const Packet<Scalar>& x) const { return softplus<Scalar>(x); }
};
template <class Scalar>
struct NormalDensity {
  Packet<Scalar> operator()(const Packet<Scalar>& x) const { return normal_density<Scalar>(x); }
};
template <class Scalar>
struct NormalCdf {
  Packet<Scalar> operator()(const Packet<Scalar>& x) const { return normal_cdf<Scalar>(x); }
};

/// Values from the smallest to `largest` in size on both sides, twenty to a power of two.
template <class Scalar>
std::vector<Scalar> points(double largest) {
  std::vector<Scalar> x = {Scalar{0}};
  for (double size = 1e-30; size <= largest; size *= 1.0353) {
    x.push_back(static_cast<Scalar>(size));
    x.push_back(static_cast<Scalar>(-size));
  }
  return x;
}

/// Largest error of f against `expected` (in long double), relative to the expected value but not
/// to less than `floor`, in units of epsilon.
template <class Scalar, class F, class Expected>
double worst_error(F f, Expected expected, double largest, long double floor) {
  const std::vector<Scalar> x = points<Scalar>(largest);
  std::vector<Scalar> y(x.size());
  map(static_cast<Index>(x.size()), y.data(), f, x.data());
  long double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double exact = expected(static_cast<long double>(x[i]));
    const long double scale = std::max(std::abs(exact), floor);
    const long double error = std::abs(static_cast<long double>(y[i]) - exact) / scale;
    if (!(error <= worst)) worst = error;  // a NaN stays
  }
  return static_cast<double>(worst / std::numeric_limits<Scalar>::epsilon());
}

long double exact_sigmoid(long double x) { return 1 / (1 + std::exp(-x)); }
long double exact_softplus(long double x) {
  return std::max(x, 0.0L) + std::log1p(std::exp(-std::abs(x)));
}
long double exact_density(long double x) {
  return std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0L));
}
long double exact_cdf(long double x) { return std::erfc(-x / std::sqrt(2.0L)) / 2; }

}  // namespace

TEMPLATE_TEST_CASE("math: the same value gives the same bits anywhere in a row", "[math]", float,
                   double) {
  constexpr Index size = packet_size<TestType>;
  const auto check = [&](auto f) {
    for (const TestType x : {TestType{0.375}, TestType{-1.75}, TestType{2.875}, TestType{-11}}) {
      const TestType alone = apply(f, x);
      for (Index count = 1; count <= 3 * size + 1; ++count) {
        for (Index offset = 0; offset < size; ++offset) {
          std::vector<TestType> row(to_size(count + offset), x);
          map(count, row.data() + offset, f, row.data() + offset);  // in place
          for (Index i = 0; i < count; ++i) {
            REQUIRE(std::memcmp(&row[to_size(offset + i)], &alone, sizeof(alone)) == 0);
          }
          for (Index i = 0; i < offset; ++i) REQUIRE(row[to_size(i)] == x);
        }
      }
    }
  };
  check(Exp<TestType>{});
  check(Sigmoid<TestType>{});
  check(Tanh<TestType>{});
  check(Softplus<TestType>{});
  check(NormalDensity<TestType>{});
  check(NormalCdf<TestType>{});
}

TEMPLATE_TEST_CASE("math: a function of lanes is called for each lane", "[math]", float, double) {
  constexpr Index size = packet_size<TestType>;
  TestType lanes[to_size(size)];
  for (Index i = 0; i < size; ++i) lanes[i] = static_cast<TestType>(i);
  store(lanes, for_each_lane<TestType>(load(lanes), [](TestType v) { return 2 * v + 1; }));
  for (Index i = 0; i < size; ++i) CHECK(lanes[i] == static_cast<TestType>(2 * i + 1));
}

TEMPLATE_TEST_CASE("math: functions are exact to a few units in the last place", "[math]", float,
                   double) {
  using Scalar = TestType;
  constexpr bool single = sizeof(Scalar) == sizeof(float);
  const long double smallest = static_cast<long double>(std::numeric_limits<Scalar>::min());
  const double exp_range = single ? 87.0 : 708.0;  // normal results on both sides
  const auto exact_exp = [](long double x) { return std::exp(x); };
  const auto exact_tanh = [](long double x) { return std::tanh(x); };
  const double cdf_range = single ? 12.9 : 37.0;
  // Error is relative to the true value, however small that is.
  CHECK(worst_error<Scalar>(Exp<Scalar>{}, exact_exp, exp_range, smallest) < 3);
  CHECK(worst_error<Scalar>(Sigmoid<Scalar>{}, exact_sigmoid, exp_range, smallest) < 4);
  CHECK(worst_error<Scalar>(Tanh<Scalar>{}, exact_tanh, 1e4, smallest) < 8);
  CHECK(worst_error<Scalar>(Softplus<Scalar>{}, exact_softplus, exp_range, smallest) < 4);
  // The square in the exponent of the density carries its own rounding: x²/2 units.
  CHECK(worst_error<Scalar>(NormalDensity<Scalar>{}, exact_density, 6.5, smallest) < 30);
  CHECK(worst_error<Scalar>(NormalDensity<Scalar>{}, exact_density, cdf_range, smallest) <
        cdf_range * cdf_range);
  CHECK(worst_error<Scalar>(NormalCdf<Scalar>{}, exact_cdf, 6.5, smallest) < 40);
  CHECK(worst_error<Scalar>(NormalCdf<Scalar>{}, exact_cdf, cdf_range, smallest) <
        cdf_range * cdf_range);
}

TEMPLATE_TEST_CASE("math: functions have their values at zero", "[math]", float, double) {
  using Scalar = TestType;
  const auto tiny = std::numeric_limits<Scalar>::min();
  const Scalar log2 = std::log(Scalar{2});
  for (const Scalar x : {Scalar{0}, -Scalar{0}, tiny, -tiny}) {
    CAPTURE(x);
    CHECK(apply(Exp<Scalar>{}, x) == Scalar{1});
    CHECK(apply(Sigmoid<Scalar>{}, x) == Scalar{0.5});
    CHECK(std::abs(apply(Tanh<Scalar>{}, x) - x) <= tiny);
    CHECK(std::abs(apply(Softplus<Scalar>{}, x) - log2) <=
          2 * std::numeric_limits<Scalar>::epsilon());
    CHECK(std::abs(apply(NormalCdf<Scalar>{}, x) - Scalar{0.5}) <=
          2 * std::numeric_limits<Scalar>::epsilon());
  }
}

TEMPLATE_TEST_CASE("math: functions keep their limits at large and infinite values", "[math]",
                   float, double) {
  using Scalar = TestType;
  const Scalar infinity = std::numeric_limits<Scalar>::infinity();
  const Scalar tiny = std::numeric_limits<Scalar>::min();
  for (const Scalar x :
       {Scalar{1000}, Scalar{1e30f}, std::numeric_limits<Scalar>::max(), infinity}) {
    CAPTURE(x);
    CHECK(apply(Exp<Scalar>{}, x) == infinity);
    CHECK(apply(Exp<Scalar>{}, -x) >= 0);
    CHECK(apply(Exp<Scalar>{}, -x) <= tiny);
    CHECK(apply(Sigmoid<Scalar>{}, x) == 1);
    CHECK(apply(Sigmoid<Scalar>{}, -x) >= 0);
    CHECK(apply(Sigmoid<Scalar>{}, -x) <= tiny);
    CHECK(apply(Tanh<Scalar>{}, x) == 1);
    CHECK(apply(Tanh<Scalar>{}, -x) == -1);
    CHECK(apply(Softplus<Scalar>{}, x) == x);
    CHECK(apply(Softplus<Scalar>{}, -x) >= 0);
    CHECK(apply(Softplus<Scalar>{}, -x) <= tiny);
    CHECK(apply(NormalDensity<Scalar>{}, x) <= tiny);
    CHECK(apply(NormalDensity<Scalar>{}, -x) <= tiny);
    CHECK(apply(NormalCdf<Scalar>{}, x) == 1);
    CHECK(apply(NormalCdf<Scalar>{}, -x) >= 0);
    CHECK(apply(NormalCdf<Scalar>{}, -x) <= tiny);
  }
}

TEMPLATE_TEST_CASE("math: NaN goes in and NaN comes out, in its own place", "[math]", float,
                   double) {
  using Scalar = TestType;
  constexpr Index size = packet_size<Scalar>;
  const Scalar nan = std::numeric_limits<Scalar>::quiet_NaN();
  const auto check = [&](const char* name, auto f) {
    INFO(name);
    for (Index place = 0; place < 2 * size + 1; ++place) {
      std::vector<Scalar> row(to_size(2 * size + 1), Scalar{0.5});
      row[to_size(place)] = nan;
      map(2 * size + 1, row.data(), f, row.data());
      for (Index i = 0; i < 2 * size + 1; ++i) {
        REQUIRE(std::isnan(row[to_size(i)]) == (i == place));
      }
    }
  };
  check("exp", Exp<Scalar>{});
  check("sigmoid", Sigmoid<Scalar>{});
  check("tanh", Tanh<Scalar>{});
  check("softplus", Softplus<Scalar>{});
  check("normal density", NormalDensity<Scalar>{});
  check("normal cdf", NormalCdf<Scalar>{});
}
