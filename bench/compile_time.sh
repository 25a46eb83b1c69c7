#!/bin/sh
# What including moe costs: compiles the README's complete program, and for comparison an empty
# program that includes <Eigen/Dense>, and fails if the first takes more than 1.5 times the second
# plus 4 s. Times are of the processor (user and system), the best of several runs in turn.
#
#     sh bench/compile_time.sh [--resume] [RUNS]     (3)
#
# Ctrl-C ends it; --resume then goes on after the rows that are printed, which
# build/bench/compile_time.rows keeps, where headers, Eigen (its folder and its version), compiler and
# RUNS are the same.
#
# Besides `program`, which has nothing but the headers: `header` has them from a precompiled header,
# `compiled` leaves to the library moe::compiled what is in there, `both` does both. What is made once
# for these three is timed in the last lines, with the last flags.
#
# CXX is the compiler (c++), EIGEN the folder of Eigen's headers (/usr/include/eigen3).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
case ${1-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
esac
resume=no
if [ "${1-}" = --resume ]; then
  resume=yes
  shift
fi
runs=${1:-3}
case $runs in
  *[!0-9]* | 0)
    echo "$0: RUNS is $runs, and must be a number from 1 on" >&2
    exit 2
    ;;
esac
compiler=${CXX:-c++}
eigen=${EIGEN:-/usr/include/eigen3}

sh "$root/cmake/install_packages.sh"
# shellcheck source=examples/common/bar.sh
. "$root/examples/common/bar.sh"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP TERM
trap 'clear_bar; echo "interrupted; --resume goes on after the last row" >&2; exit 130' INT

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

version=$("$compiler" --version | head -n 1)
rows="$root/build/bench/compile_time.rows"
mkdir -p "$root/build/bench"
# What the rows depend on.
key="$version, $runs runs, $eigen $(cksum <"$eigen/Eigen/src/Core/util/Macros.h"),"
key="$key $(find "$root/include/moe" "$folder" -name '*.[ch]pp' -exec cksum {} + |
  awk '{ print $1, $2 }' | sort | cksum)"
if [ $resume = yes ] && [ "$(head -n 1 "$rows" 2>/dev/null)" != "$key" ]; then
  echo "begins anew: there are no rows of these headers, this Eigen, this compiler and $runs runs" >&2
  resume=no
fi
[ $resume = yes ] || echo "$key" >"$rows"

# Set by name, in timed().
eigen_seconds='' program_seconds='' header_seconds='' compiled_seconds='' both_seconds=''
made_header='' made_float='' made_double=''
step=0
steps=$((4 * 7 * runs + 3))
begin_bar $((7 * runs * ($(wc -l <"$rows") - 1)))
# timed NAME FILE FLAG...: the same into the variable NAME, under a bar.
timed() {
  name=$1
  shift
  draw_bar $step $steps "$step/$steps compilations"
  eval "$name=\$(seconds \"\$@\")"
  step=$((step + 1))
}

echo "$version"
printf '%-38s %11s %9s %9s %9s %9s %9s\n' flags Eigen/Dense program limit header compiled both
extern=-DMOE_EXTERN_TEMPLATES
for march in '' -march=native; do
  for openmp in '' -fopenmp; do
    set -- -std=c++20 -O2 ${march:+"$march"} ${openmp:+"$openmp"}
    flags=$*
    if grep "^$flags  " "$rows"; then
      step=$((step + 7 * runs))
      continue
    fi
    : >"$folder/times"
    run=0
    while [ "$run" -lt "$runs" ]; do
      timed eigen_seconds eigen.cpp "$@"
      timed program_seconds program.cpp "$@"
      rm -f "$folder/header.hpp.gch"
      timed made_header header.hpp.cxx -x c++-header "$@" -include "$folder/header.hpp"
      timed header_seconds program.cpp "$@" -include "$folder/header.hpp"
      timed compiled_seconds program.cpp "$@" $extern
      rm "$folder/header.hpp.gch"
      timed made_header header.hpp.cxx -x c++-header "$@" $extern -include "$folder/header.hpp"
      timed both_seconds program.cpp "$@" $extern -include "$folder/header.hpp"
      echo "$eigen_seconds $program_seconds $header_seconds $compiled_seconds $both_seconds" \
        >>"$folder/times"
      run=$((run + 1))
    done
    clear_bar
    awk -v flags="$flags" '
      { for (i = 1; i <= NF; ++i) if (NR == 1 || $i < best[i]) best[i] = $i }
      END {
        limit = 1.5 * best[1] + 4
        verdict = best[2] > limit ? "OVER" : "within"
        printf "%-38s %9.2f s %7.2f s %7.2f s %7.2f s %7.2f s %7.2f s  %s\n", flags, best[1], best[2],
               limit, best[3], best[4], best[5], verdict
      }' "$folder/times" >"$folder/row"
    cat "$folder/row"
    cat "$folder/row" >>"$rows"
  done
done
# clang would take that of the last `both`, and say nothing.
rm -f "$folder/header.hpp.gch"
timed made_header header.hpp.cxx -x c++-header "$@" -include "$folder/header.hpp"
timed made_float instantiations_float.cpp "$@"
timed made_double instantiations_double.cpp "$@"
clear_bar
printf '\nMade once: the precompiled header %s s, the two files of the library %s s and %s s\n' "$made_header" \
  "$made_float" "$made_double"
! grep -q ' OVER$' "$rows"
