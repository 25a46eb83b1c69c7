#include "moe/kernels/packet.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "../support.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)
using test::random_matrix;

namespace {

template <class Scalar>
inline constexpr Scalar guard = Scalar{-1234.5};

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

TEMPLATE_TEST_CASE("packet: the first elements are loaded and stored alone", "[packet]", float,
                   double) {
  constexpr Index size = packet_size<TestType>;
  for (Index count = 0; count < size; ++count) {
    // A vector of just `count` values, so a sanitizer sees a read beyond it.
    std::vector<TestType> from(to_size(count));
    for (Index i = 0; i < count; ++i) from[to_size(i)] = static_cast<TestType>(i + 1);
    const Packet<TestType> packet = load_first(from.data(), count);
    TestType lanes[to_size(size)];
    store(lanes, packet);
    for (Index i = 0; i < size; ++i) {
      CHECK(lanes[i] == (i < count ? static_cast<TestType>(i + 1) : TestType{0}));
    }

    std::vector<TestType> to(to_size(size + 2), guard<TestType>);
    store_first(to.data() + 1, count, broadcast(TestType{7}));
    for (Index i = 0; i < size + 2; ++i) {
      const bool written = i >= 1 && i <= count;
      CHECK(to[to_size(i)] == (written ? TestType{7} : guard<TestType>));
    }
  }
}

TEMPLATE_TEST_CASE("packet: map, dot, sum and add_scaled of every length at every address",
                   "[packet]", float, double) {
  constexpr Index size = packet_size<TestType>;
  const double epsilon = static_cast<double>(std::numeric_limits<TestType>::epsilon());
  const Matrix<TestType> values = random_matrix<TestType>(2, 12 * size, 1);
  for (Index count = 0; count <= 9 * size + 1; ++count) {
    double exact_dot = 0.0;
    double exact_sum = 0.0;
    double dot_scale = 0.0;
    double sum_scale = 0.0;
    for (Index i = 0; i < count; ++i) {
      const double a = static_cast<double>(values(0, i));
      const double b = static_cast<double>(values(1, i));
      exact_dot += a * b;
      dot_scale += std::abs(a * b);
      exact_sum += a;
      sum_scale += std::abs(a);
    }
    TestType first_dot{};
    TestType first_sum{};
    for (Index offset = 0; offset <= size; ++offset) {
      INFO("count " << count << ", offset " << offset);
      // Around the values are NaNs, so one that is read by mistake shows in every result.
      const TestType nan = std::numeric_limits<TestType>::quiet_NaN();
      std::vector<TestType> a(to_size(count + 2 * size), nan);
      std::vector<TestType> b = a;
      std::vector<TestType> y(a.size(), guard<TestType>);
      const TestType* pa = a.data() + offset;
      const TestType* pb = b.data() + size - offset;
      TestType* py = y.data() + (offset * 3) % size + 1;
      std::copy_n(&values(0, 0), count, a.data() + offset);
      std::copy_n(&values(1, 0), count, b.data() + size - offset);
      const auto check_guards = [&] {
        const auto first = static_cast<std::size_t>(py - y.data());
        for (std::size_t i = 0; i < y.size(); ++i) {
          if (i < first || i >= first + to_size(count)) REQUIRE(y[i] == guard<TestType>);
        }
      };

      const TestType d = dot(count, pa, pb);
      const TestType s = sum(count, pa);
      REQUIRE(std::abs(static_cast<double>(d) - exact_dot) <=
              epsilon * static_cast<double>(count) * dot_scale);
      REQUIRE(std::abs(static_cast<double>(s) - exact_sum) <=
              epsilon * static_cast<double>(count) * sum_scale);
      if (offset == 0) {
        first_dot = d;
        first_sum = s;
      }
      REQUIRE(std::memcmp(&d, &first_dot, sizeof(d)) == 0);
      REQUIRE(std::memcmp(&s, &first_sum, sizeof(s)) == 0);

      map(
          count, py,
          [](const Packet<TestType>& p, const Packet<TestType>& q) {
            return Eigen::internal::psub(p, q);
          },
          pa, pb);
      for (Index i = 0; i < count; ++i) REQUIRE(py[i] == values(0, i) - values(1, i));
      check_guards();

      add_scaled(count, TestType{0.5}, pa, py);
      for (Index i = 0; i < count; ++i) {
        const TestType difference = values(0, i) - values(1, i);
        REQUIRE(py[i] == difference + TestType{0.5} * values(0, i));  // 0.5·x is exact
      }
      check_guards();
    }
  }
}

TEMPLATE_TEST_CASE("packet: add_scaled_rows adds row after row", "[packet]", float, double) {
  constexpr Index size = packet_size<TestType>;
  for (const Index width :
       {Index{1}, size - 1, size, size + 1, 8 * size - 1, 8 * size, 8 * size + 1, 19 * size + 3}) {
    for (const Index count : {0, 1, 2, 9}) {
      INFO("width " << width << ", rows " << count);
      const Matrix<TestType> matrix = random_matrix<TestType>(11, width + 3, 1);
      const Matrix<TestType> factors = random_matrix<TestType>(11, 2, 2);
      const std::vector<Index> list = {4, 4, 0, 10, 7, 2, 9, 1, 4};
      const GatheredRows<TestType> rows =
          GatheredRows<TestType>(matrix, list.data(), count).columns(1, width);
      const Matrix<TestType> before = random_matrix<TestType>(1, width + 1, 3);
      Matrix<TestType> y = before;
      Matrix<TestType> by_rows = Matrix<TestType>::Zero(1, width + 1);  // a block begins at zero
      Matrix<TestType> unscaled = before;
      Matrix<TestType> sums = by_rows;
      add_scaled_rows(rows, {factors.data(), 2}, y.data());
      add_scaled_rows(rows, {}, unscaled.data());
      for (Index i = 0; i < count; ++i) {
        add_scaled(width, factors(i, 0), rows.row(i), by_rows.data());
        sums.leftCols(width) += matrix.row(list[to_size(i)]).segment(1, width);
      }
      CHECK(test::same_bits(y, Matrix<TestType>(before + by_rows)));
      CHECK(test::same_bits(unscaled, Matrix<TestType>(before + sums)));
    }
  }
}

TEMPLATE_TEST_CASE("packet: the same value gives the same bits anywhere in a row", "[packet]",
                   float, double) {
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

TEMPLATE_TEST_CASE("packet: a function of lanes is called for each lane", "[packet]", float,
                   double) {
  constexpr Index size = packet_size<TestType>;
  TestType lanes[to_size(size)];
  for (Index i = 0; i < size; ++i) lanes[i] = static_cast<TestType>(i);
  store(lanes, for_each_lane<TestType>(load(lanes), [](TestType v) { return 2 * v + 1; }));
  for (Index i = 0; i < size; ++i) CHECK(lanes[i] == static_cast<TestType>(2 * i + 1));
}

TEMPLATE_TEST_CASE("packet: functions are exact to a few units in the last place", "[packet]",
                   float, double) {
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

TEMPLATE_TEST_CASE("packet: functions have their values at zero", "[packet]", float, double) {
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

TEMPLATE_TEST_CASE("packet: functions keep their limits at large and infinite values", "[packet]",
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

TEMPLATE_TEST_CASE("packet: NaN goes in and NaN comes out, in its own place", "[packet]", float,
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
