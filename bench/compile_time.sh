#!/bin/sh
# What including moe costs: compiles the README's complete program, and for comparison an empty
# program that includes <Eigen/Dense>, and fails if the first takes more than 1.5 times the second
# plus 4 s. Times are of the processor (user and system), the best of several runs in turn.
#
#     sh bench/compile_time.sh [RUNS]     (3)
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

# seconds FILE FLAG...: the processor time of one compilation. The second line that `times` prints
# is of the subshell's children: "0m1.23s 0m0.45s".
seconds() {
  file=$1
  shift
  (
    "$compiler" "$@" -I"$root/include" -isystem "$eigen" -c "$folder/$file.cpp" -o "$folder/$file.o"
    times
  ) | awk -F '[ms ]+' 'NR == 2 { printf "%.2f\n", 60 * $1 + $2 + 60 * $3 + $4 }
                       END { exit NR < 2 }'  # the compiler failed
}

"$compiler" --version | head -n 1
printf '%-42s %10s %10s %10s\n' flags Eigen/Dense program limit
status=0
for march in '' -march=native; do
  for openmp in '' -fopenmp; do
    set -- -std=c++20 -O2 ${march:+"$march"} ${openmp:+"$openmp"}
    : >"$folder/times"
    run=0
    while [ "$run" -lt "$runs" ]; do
      eigen_seconds=$(seconds eigen "$@")
      program_seconds=$(seconds program "$@")
      echo "$eigen_seconds $program_seconds" >>"$folder/times"
      run=$((run + 1))
    done
    awk -v flags="$*" '
      NR == 1 || $1 < eigen   { eigen = $1 }
      NR == 1 || $2 < program { program = $2 }
      END {
        limit = 1.5 * eigen + 4
        over = program > limit
        printf "%-42s %8.2f s %8.2f s %8.2f s  %s\n", flags, eigen, program, limit,
               over ? "OVER" : "within"
        exit over
      }' "$folder/times" || status=1
  done
done
exit $status
