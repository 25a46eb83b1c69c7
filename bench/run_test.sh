#!/bin/sh
# run.sh with programs that measure nothing: what is measured before Ctrl-C is left out afterwards.
#     sh run_test.sh FOLDER     the folder is made anew
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=examples/common/interrupt.sh
. "$here/../examples/common/interrupt.sh"
folder=$1
rm -rf "$folder"
mkdir -p "$folder/bench" "$folder/include" "$folder/cmake" "$folder/examples/common" "$folder/tools" \
  "$folder/build/release/bench"
cd "$folder"
# In a tree of its own, so that real results stay, and with nothing to install or to build.
cp "$here"/*.sh "$here"/*.awk "$here"/layer.cpp "$here"/routing.cpp bench
echo 'exit 0' >cmake/install_packages.sh
echo "// code" >include/code.hpp
echo "// code" >examples/common/bar.hpp
echo "# code" >CMakeLists.txt
: >option
# Where the build is to be interrupted, it waits; and so do the rows of a result.
cat >tools/cmake <<'CMAKE'
#!/bin/sh
[ "$1" = --build ] || { cat option >build/release/CMakeCache.txt; exit; }
[ ! -f slow_build ] || { : >building; sleep 60; }
CMAKE
cat >tools/awk <<AWK
#!/bin/sh
case \$* in
  *rows.awk*) [ ! -f slow_rows ] || { : >making_rows; sleep 60; } ;;
esac
exec $(command -v awk) "\$@"
AWK
chmod +x tools/cmake tools/awk
PATH="$folder/tools:$PATH"
export PATH

fail() {
  echo "$1" >&2
  cat "$folder"/*.txt >&2
  exit 1
}

# routing waits to be interrupted once.
cat >build/release/bench/bench_layer <<'PROGRAM'
#!/bin/sh
echo "${0##*/}" >>calls.txt
if [ "${0##*/}" = bench_routing ] && [ ! -f waiting ]; then
  : >waiting
  sleep 60
fi
for argument in "$@"; do
  case $argument in
    --benchmark_out=*) echo '{ "benchmarks": [] }' >"${argument#*=}" ;;
  esac
done
PROGRAM
chmod +x build/release/bench/bench_layer
cp build/release/bench/bench_layer build/release/bench/bench_routing

# Of an earlier measurement, which nothing goes on from.
mkdir -p build/bench
echo '{ "benchmarks": [] }' >build/bench/routing.json

interrupt first.txt waiting sh bench/run.sh --no-peers layer routing
grep -q '^Stopped; with --resume it goes on' first.txt || fail "it does not say that it was interrupted"

if sh bench/run.sh --resume --no-peers --small-pages layer routing >other.txt 2>&1; then
  fail "it went on with other pages"
fi
grep -q 'goes on with peers OFF, hugetlb 0' other.txt || fail "the error is another one"

sh bench/run.sh --resume --no-peers layer routing >second.txt 2>&1 || fail "it did not go on"
grep -q '^Measured already: layer' second.txt || fail "it does not say what it leaves out"
[ "$(cat calls.txt)" = "$(printf 'bench_layer\nbench_routing\nbench_routing')" ] || fail "layer was measured twice"
[ -f build/bench/routing.json ] || fail "routing has no result"

# Without --resume everything is measured anew.
sh bench/run.sh --no-peers layer routing >third.txt 2>&1
[ "$(wc -l <calls.txt)" -eq 5 ] || fail "not everything was measured anew"

# A complete measurement; then the code is changed, and Ctrl-C comes during the build.
: >calls.txt
echo "// other code" >include/code.hpp
: >slow_build
interrupt build.txt building sh bench/run.sh --no-peers layer routing
rm slow_build
sh bench/run.sh --resume --no-peers layer routing >built.txt 2>&1
[ "$(cat calls.txt)" = "$(printf 'bench_layer\nbench_routing')" ] || fail "results of before the build were taken"

# Code, then an option of the build, then nothing is changed before --resume.
for change in include/code.hpp bench/layer.cpp examples/common/bar.hpp cmake/install_packages.sh CMakeLists.txt; do
  : >calls.txt
  echo "# changed" >>"$change"
  sh bench/run.sh --resume --no-peers layer >changed.txt 2>&1
  grep -q '^Measured with other code, another build or other options: layer' changed.txt ||
    fail "it does not say why layer is measured anew"
  [ "$(wc -l <calls.txt)" -eq 1 ] || fail "a result of another $change was taken"
done
: >calls.txt
echo '-DMOE_BENCH_GGML=ggml' >option
sh bench/run.sh --resume --no-peers layer >option.txt 2>&1
[ "$(wc -l <calls.txt)" -eq 1 ] || fail "a result of another build was taken"
sh bench/run.sh --resume --no-peers layer >same.txt 2>&1
[ "$(wc -l <calls.txt)" -eq 1 ] || fail "a result of this build was not taken"

# One benchmark with large pages, another one without, and then both without.
sh bench/run.sh --no-peers layer >large.txt 2>&1
sh bench/run.sh --no-peers --small-pages routing >small.txt 2>&1
: >calls.txt
sh bench/run.sh --resume --no-peers --small-pages layer routing >both.txt 2>&1
[ "$(cat calls.txt)" = bench_layer ] || fail "a result with large pages was taken, or one without was not"

# Ctrl-C between a program's end and its rows: there is no result without rows.
: >slow_rows
interrupt rows.txt making_rows sh bench/run.sh --no-peers layer
rm slow_rows
: >calls.txt
sh bench/run.sh --resume --no-peers layer >made.txt 2>&1 || fail "it does not go on from a result without rows"
[ "$(cat calls.txt)" = bench_layer ] || fail "a result without rows was taken"
[ -f build/bench/layer.tsv ] || fail "layer has no rows"
