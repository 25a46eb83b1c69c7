#include "moe/nn/gather_rows.hpp"

#include <vector>

#include "../allocation.hpp"
#include "../support.hpp"

using namespace moe;

TEST_CASE("gather rows: in the order of the list, a row as often as it is named", "[nn]") {
  Matrix<double> from(4, 2);
  from << 0, 1, 10, 11, 20, 21, 30, 31;
  const std::vector<Index> rows{3, 0, 3};
  Matrix<double> to;
  gather_rows(from, rows, to);
  CHECK(to == (Matrix<double>(3, 2) << 30, 31, 0, 1, 30, 31).finished());
  gather_rows(from.rightCols(1), rows, to);
  CHECK(to == (Matrix<double>(3, 1) << 31, 1, 31).finished());
  std::vector<Index> labels;
  gather_rows(std::vector<Index>{5, 6, 7, 8}, rows, labels);
  CHECK(labels == std::vector<Index>{8, 5, 8});
}

TEST_CASE("gather rows: none", "[nn]") {
  Matrix<float> to(3, 3);
  gather_rows(Matrix<float>(0, 5), std::vector<Index>{}, to);
  CHECK(to.rows() == 0);
  CHECK(to.cols() == 5);
  std::vector<Index> labels{1, 2};
  gather_rows(IndexSpan(), std::vector<Index>{}, labels);
  CHECK(labels.empty());
}

TEST_CASE("gather rows: a batch of the same size takes no memory", "[nn]") {
  const Matrix<float> from = test::random_matrix<float>(20, 3, 1);
  const std::vector<Index> labels(20, 4);
  const std::vector<Index> rows{1, 19, 5};
  Matrix<float> to;
  std::vector<Index> of_rows;
  const auto gather = [&] {
    gather_rows(from, rows, to);
    gather_rows(labels, rows, of_rows);
  };
  gather();
  CHECK(test::allocations_in(gather) == 0);
}

TEST_CASE("gather rows: what is wrong is named and changes nothing", "[nn]") {
  const Matrix<float> from = Matrix<float>::Ones(4, 2);
  Matrix<float> to = Matrix<float>::Zero(1, 1);
  CHECK_THROWS_WITH(gather_rows(from, std::vector<Index>{0, 4}, to),
                    "moe: gather_rows: row = 4, must be in [0, 4)");
  CHECK_THROWS_WITH(gather_rows(from, std::vector<Index>{-1}, to),
                    "moe: gather_rows: row = -1, must be in [0, 4)");
  CHECK(to == Matrix<float>::Zero(1, 1));
  std::vector<Index> labels{7};
  CHECK_THROWS_WITH(gather_rows(std::vector<Index>{1, 2}, std::vector<Index>{2}, labels),
                    "moe: gather_rows: row = 2, must be in [0, 2)");
  CHECK(labels == std::vector<Index>{7});

  to = from;
  using Catch::Matchers::Contains;
  CHECK_THROWS_WITH(
      gather_rows(to.bottomRows(2), std::vector<Index>{0}, to),
      Contains("gather_rows: from overlaps memory that this call writes to; pass a copy, or "
               "use another tape or another matrix for the result"));
  labels = {0, 1, 2};
  CHECK_THROWS_WITH(gather_rows(labels, std::vector<Index>{0}, labels),
                    Contains("gather_rows: from overlaps"));
  CHECK_THROWS_WITH(gather_rows(std::vector<Index>{1, 2, 3}, labels, labels),
                    Contains("gather_rows: rows overlaps"));
}
