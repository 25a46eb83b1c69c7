#!/bin/sh
# run.sh with programs that measure nothing: what is measured before Ctrl-C is left out afterwards.
#     sh run_test.sh FOLDER     the folder is made anew
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=examples/common/interrupt.sh
. "$here/../examples/common/interrupt.sh"
folder=$1
rm -rf "$folder"
mkdir -p "$folder/bench" "$folder/cmake" "$folder/tools" "$folder/build/release/bench"
cd "$folder"
# In a tree of its own, so that real results stay, and with nothing to install or to build.
cp "$here"/*.sh "$here"/*.awk "$here"/layer.cpp "$here"/routing.cpp bench
echo 'exit 0' >cmake/install_packages.sh
printf '#!/bin/sh\nexit 0\n' >tools/cmake
chmod +x tools/cmake
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
