#include "../../examples/common/terminal.hpp"

#include <filesystem>
#include <string>

#include "../../examples/common/csv_file.hpp"
#include "../../examples/common/svg.hpp"
#include "../catch.hpp"
#include "../io/files.hpp"
#include "../temporary_folder.hpp"

/// \file
/// What the examples share: the time that is left, CSV files and pictures.

using Catch::Matchers::Contains;
using moe::test::read_all;
using moe::test::TemporaryFolder;

TEST_CASE("examples: times as a clock has them", "[examples]") {
  CHECK(examples::clock_time(0) == "0:00");
  CHECK(examples::clock_time(9.4) == "0:09");
  CHECK(examples::clock_time(59.6) == "1:00");
  CHECK(examples::clock_time(65.4) == "1:05");
  CHECK(examples::clock_time(3599) == "59:59");
  CHECK(examples::clock_time(3600) == "1:00:00");
  CHECK(examples::clock_time(3725) == "1:02:05");
  CHECK(examples::clock_time(-3) == "0:00");
}

TEST_CASE("examples: the time that is left is that of the rest at the speed so far", "[examples]") {
  examples::TimeLeft left;
  CHECK(left.text(0, 100).empty());            // nothing to judge by
  CHECK(left.text(0.25, 120) == "1:00 left");  // 20 s for a quarter
  CHECK(left.text(0.5, 160) == "1:00 left");
  CHECK(left.text(1, 200) == "0:00 left");
  CHECK(left.text(1.5, 200).empty());
  // A training that went on from a half: the first half took no time here.
  examples::TimeLeft resumed;
  CHECK(resumed.text(0.5, 1000).empty());
  CHECK(resumed.text(0.6, 1010) == "0:40 left");
}

TEST_CASE("examples: a CSV goes on below its rows", "[examples]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.csv");
  { examples::CsvFile(path, "a,b").add("1,2"); }
  { examples::CsvFile(path, "a,b", true).add("3,4"); }
  CHECK(read_all(path) == "a,b\n1,2\n3,4\n");
  { examples::CsvFile(path, "a,b").add("5,6"); }
  CHECK(read_all(path) == "a,b\n5,6\n");
  // Where it has gone, it begins anew.
  std::filesystem::remove(path);
  { examples::CsvFile(path, "a,b", true).add("7,8"); }
  CHECK(read_all(path) == "a,b\n7,8\n");
  CHECK_THROWS_AS(examples::CsvFile(folder.file("none/a.csv"), "a"), std::runtime_error);
  CHECK_THROWS_AS(examples::CsvFile(folder.file("none/a.csv"), "a", true), std::runtime_error);
}

TEST_CASE("examples: neighbouring cells of a colour are one rectangle", "[examples]") {
  examples::Svg svg(40, 30);
  svg.add_text(1, 2, "title");
  // a a b
  // b a a
  svg.add_cells(10, 20, 3, 4, 5, {"#a", "#a", "#b", "#b", "#a", "#a"});
  CHECK_THAT(svg.text(), Contains("width=\"40\" height=\"30\""));
  CHECK_THAT(svg.text(), Contains("<text x=\"1\" y=\"2\" fill=\"#303030\">title</text>\n"));
  CHECK_THAT(svg.text(),
             Contains("<path fill=\"#a\" d=\"M10 20h8v5h-8zM14 25h8v5h-8z\"/>\n"
                      "<path fill=\"#b\" d=\"M18 20h4v5h-4zM10 25h4v5h-4z\"/>\n</svg>\n"));
  CHECK_THROWS_WITH(svg.write("/nowhere/a.svg"), Contains("/nowhere/a.svg"));
}
