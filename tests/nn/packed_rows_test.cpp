#include "moe/nn/packed_rows.hpp"

#include <limits>

#include "../support.hpp"

using namespace moe;

TEST_CASE("packed rows: padding is neither read nor written but as zero", "[nn]") {
  const std::vector<Index> numbers{4, -1, 0, -7, 2};
  PackedRows real;
  real.assign(numbers);
  CHECK(real.rows == std::vector<Index>{0, 2, 4});
  Matrix<double> padded = test::random_matrix(5, 3, 1);
  padded.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  padded.row(3).setConstant(std::numeric_limits<double>::quiet_NaN());
  Matrix<double> packed;
  real.pack(padded, packed);
  REQUIRE(packed.rows() == 3);
  CHECK(packed.allFinite());
  CHECK(packed.row(1) == padded.row(2));
  Matrix<double> back;
  real.unpack(packed, 5, back);
  CHECK(back.row(0) == padded.row(0));
  CHECK(back.row(1).isZero(0));
  CHECK(back.row(2) == padded.row(2));
  CHECK(back.row(3).isZero(0));
  CHECK(back.row(4) == padded.row(4));
}

TEST_CASE("packed rows: rows that do not fit", "[nn]") {
  using Catch::Matchers::Contains;
  PackedRows real;
  real.assign(std::vector<Index>{1, -1, 1});
  Matrix<double> three = Matrix<double>::Zero(3, 2);
  Matrix<double> two = Matrix<double>::Zero(2, 2);
  Matrix<double> out;
  CHECK_THROWS_WITH(real.pack(two, out), Contains("row = 2, must be in [0, 2)"));
  CHECK_THROWS_WITH(real.unpack(two, 2, out), Contains("row = 2, must be in [0, 2)"));
  CHECK_THROWS_WITH(real.unpack(three, 3, out), Contains("packed has 3 rows, must have 2"));
  CHECK_THROWS_WITH(real.pack(three, three), Contains("packed into itself"));
  CHECK_THROWS_WITH(real.unpack(two, 3, two),
                    Contains("PackedRows::unpack: a matrix cannot be unpacked into itself"));
  CHECK(two.rows() == 2);
  real.rows = {-1, 1};
  CHECK_THROWS_WITH(real.pack(two, out), "moe: PackedRows: row = -1, must be in [0, 2)");
  CHECK_THROWS_WITH(real.unpack(two, 2, out), "moe: PackedRows: row = -1, must be in [0, 2)");
}

TEST_CASE("packed rows: none is real", "[nn]") {
  PackedRows real;
  real.assign(std::vector<Index>{-1, -1});
  CHECK(real.count() == 0);
  Matrix<double> packed;
  const Matrix<double> padding = Matrix<double>::Ones(2, 3);
  real.pack(padding, packed);
  CHECK(packed.rows() == 0);
  CHECK(packed.cols() == 3);
  Matrix<double> back;
  real.unpack(packed, 2, back);
  CHECK(back == Matrix<double>::Zero(2, 3));
}
