#!/bin/sh
# What including moe costs: compiles the README's complete program, and for comparison an empty
# program that includes <Eigen/Dense>, and fails if the first takes more than 1.5 times the second
# plus 4 s. Times are of the processor (user and system), the best of several runs in turn.
#
#     sh bench/compile_time.sh [RUNS]     (3)
#
# Besides `program`, which has nothing but the headers: `header` has them from a precompiled header,
# `compiled` leaves to the library moe::compiled what is in there, `both` does both. What is made once
# for these three is timed in the last lines, with the last flags.
#
# CXX is the compiler (c++), EIGEN the folder of Eigen's headers (/usr/include/eigen3).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
runs=${1:-3}
compiler=${CXX:-c++}
eigen=${EIGEN:-/usr/include/eigen3}

sh "$root/cmake/install_packages.sh"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM

printf '#include <Eigen/Dense>\n\nint main() {}\n' >"$folder/eigen.cpp"

# The README's C++ block that has a main function.
awk '/^```cpp$/ { block = ""; inside = 1; next }
     /^```$/    { if (inside && block ~ /int main\(/) printf "%s", block; inside = 0 }
     inside     { block = block $0 "\n" }' "$root/README.md" >"$folder/program.cpp"
[ -s "$folder/program.cpp" ] || {
  echo "$0: README.md has no C++ block with a main function" >&2
  exit 2
}

# As CMake's target_precompile_headers() does it: GCC forgets the pragmas of a precompiled header that
# silence warnings, so all of it is made a system header, which no main file can be.
printf '#pragma GCC system_header\n#include <moe/moe.hpp>\n' >"$folder/header.hpp"
: >"$folder/header.hpp.cxx"
cp "$root"/cmake/instantiations_*.cpp "$folder"

# seconds FILE FLAG...: the processor time of one compilation, to FILE.gch or FILE.o. The second line that `times` prints
# is of the subshell's children: "0m1.23s 0m0.45s".
seconds() {
  file=$1
  shift
  output=${file%.cpp}.o
  [ "$file" != header.hpp.cxx ] || output=header.hpp.gch
  (
    "$compiler" "$@" -I"$root/include" -isystem "$eigen" -c "$folder/$file" -o "$folder/$output"
    times
  ) | awk -F '[ms ]+' 'NR == 2 { printf "%.2f\n", 60 * $1 + $2 + 60 * $3 + $4 }
                       END { exit NR < 2 }'  # the compiler failed
}

"$compiler" --version | head -n 1
printf '%-38s %11s %9s %9s %9s %9s %9s\n' flags Eigen/Dense program limit header compiled both
status=0
extern=-DMOE_EXTERN_TEMPLATES
for march in '' -march=native; do
  for openmp in '' -fopenmp; do
    set -- -std=c++20 -O2 ${march:+"$march"} ${openmp:+"$openmp"}
    : >"$folder/times"
    run=0
    while [ "$run" -lt "$runs" ]; do
      eigen_seconds=$(seconds eigen.cpp "$@")
      program_seconds=$(seconds program.cpp "$@")
      rm -f "$folder/header.hpp.gch"
      made_header=$(seconds header.hpp.cxx -x c++-header "$@" -include "$folder/header.hpp")
      header_seconds=$(seconds program.cpp "$@" -include "$folder/header.hpp")
      compiled_seconds=$(seconds program.cpp "$@" $extern)
      rm "$folder/header.hpp.gch"
      seconds header.hpp.cxx -x c++-header "$@" $extern -include "$folder/header.hpp" >/dev/null
      both_seconds=$(seconds program.cpp "$@" $extern -include "$folder/header.hpp")
      echo "$eigen_seconds $program_seconds $header_seconds $compiled_seconds $both_seconds" \
        >>"$folder/times"
      run=$((run + 1))
    done
    awk -v flags="$*" '
      { for (i = 1; i <= NF; ++i) if (NR == 1 || $i < best[i]) best[i] = $i }
      END {
        limit = 1.5 * best[1] + 4
        over = best[2] > limit
        printf "%-38s %9.2f s %7.2f s %7.2f s %7.2f s %7.2f s %7.2f s  %s\n", flags, best[1], best[2],
               limit, best[3], best[4], best[5], over ? "OVER" : "within"
        exit over
      }' "$folder/times" || status=1
  done
done
printf '\nMade once: the precompiled header %s s, the two files of the library %s s and %s s\n' "$made_header" \
  "$(seconds instantiations_float.cpp "$@")" "$(seconds instantiations_double.cpp "$@")"
exit $status
