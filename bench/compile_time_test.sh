#!/bin/sh
# compile_time.sh with a compiler that compiles nothing: it prints its rows once, and goes on after Ctrl-C.
#     sh compile_time_test.sh FOLDER     the folder is made anew
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=examples/common/interrupt.sh
. "$here/../examples/common/interrupt.sh"
folder=$1
rm -rf "$folder"
mkdir -p "$folder/bench" "$folder/examples" "$folder/eigen/Eigen/src/Core/util"
cd "$folder"
# In a tree of its own, so that the rows of a real measurement stay.
cp "$here/compile_time.sh" bench
cp -R "$here/../examples/common" examples
cp -R "$here/../cmake" "$here/../include" "$here/../README.md" .
echo 'exit 0' >cmake/install_packages.sh
echo "#define EIGEN_MAJOR_VERSION 4" >eigen/Eigen/src/Core/util/Macros.h
export EIGEN="$folder/eigen"

fail() {
  echo "$1" >&2
  cat "$folder"/*.txt >&2
  exit 1
}

# Makes the file after -o, a precompiled header only where there is none, and at the tenth call waits to be interrupted
# once.
cat >compiler <<'COMPILER'
#!/bin/sh
set -eu
[ "$1" != --version ] || { echo "a compiler"; exit; }
echo "$*" >>calls.txt
while [ "$1" != -o ]; do shift; done
case $2 in
  *.gch) [ ! -e "$2" ] || { echo "a precompiled header is there already" >&2; exit 1; } ;;
esac
: >"$2"
if [ "$(wc -l <calls.txt)" -eq 10 ] && [ ! -f waiting ]; then
  : >waiting
  sleep 60
fi
COMPILER
chmod +x compiler
export CXX="$folder/compiler"

interrupt first.txt waiting sh bench/compile_time.sh 1
grep -q '^interrupted; --resume goes on' first.txt || fail "it does not say that it was interrupted"
[ "$(grep -c '^-std=' first.txt)" -eq 1 ] || fail "the interrupted row was printed"

# 7 for each of the three other rows, and 3.
: >calls.txt
sh bench/compile_time.sh --resume 1 >second.txt 2>&1
[ "$(grep -c '^-std=.* within$' second.txt)" -eq 4 ] || fail "not all rows were printed"
[ "$(wc -l <calls.txt)" -eq 24 ] || fail "a row was measured twice"

# Other headers.
echo "// other" >>include/moe/moe.hpp
: >calls.txt
sh bench/compile_time.sh --resume 1 >third.txt 2>&1
grep -q '^begins anew: ' third.txt || fail "rows of other headers were taken"
[ "$(wc -l <calls.txt)" -eq 31 ] || fail "not all rows were measured anew"

# Another version of Eigen, and the same one in another folder.
echo "#define EIGEN_MAJOR_VERSION 5" >eigen/Eigen/src/Core/util/Macros.h
sh bench/compile_time.sh --resume 1 >version.txt 2>&1
grep -q '^begins anew: ' version.txt || fail "rows of another Eigen were taken"
cp -R eigen other_eigen
EIGEN="$folder/other_eigen" sh bench/compile_time.sh --resume 1 >folder.txt 2>&1
grep -q '^begins anew: ' folder.txt || fail "rows of Eigen in another folder were taken"

# A number that is none.
if sh bench/compile_time.sh none >fourth.txt 2>&1; then fail "a number of runs was no number"; fi
grep -q "RUNS is none, and must be a number from 1 on" fourth.txt || fail "the error is another one"
