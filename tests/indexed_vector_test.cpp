#include "moe/indexed_vector.hpp"

#include <cstdint>
#include <type_traits>
#include <utility>

#include "support.hpp"

using namespace moe;

TEST_CASE("indexed vector: an index of any integer type reaches the same element",
          "[indexed_vector]") {
  IndexedVector<double> values = {1, 2, 3};
  CHECK(&values[Index{1}] == values.data() + 1);
  CHECK(&values[1] == values.data() + 1);
  CHECK(&values[std::size_t{1}] == values.data() + 1);
  CHECK(&values[std::uint8_t{1}] == values.data() + 1);
  values[Index{2}] = 5;
  CHECK(std::as_const(values)[Index{2}] == 5);
  static_assert(std::is_same_v<decltype(std::as_const(values)[0]), const double&>);
}

TEST_CASE("indexed vector: it is made of a std::vector, compares and converts as one",
          "[indexed_vector]") {
  const std::vector<Index> plain = {4, 5};
  const IndexedVector<Index> copy = plain;
  CHECK(copy == plain);
  CHECK(IndexedVector<Index>(3, 7) == std::vector<Index>{7, 7, 7});
  const std::vector<Index>& as_vector = copy;
  CHECK(as_vector.data() == copy.data());
}
