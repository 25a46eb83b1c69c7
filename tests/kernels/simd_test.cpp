#include "moe/kernels/simd.hpp"

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

}  // namespace

TEMPLATE_TEST_CASE("simd: the first elements are loaded and stored alone", "[simd]", float,
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

TEMPLATE_TEST_CASE("simd: map, dot, sum and add_scaled of every length at every address", "[simd]",
                   float, double) {
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
