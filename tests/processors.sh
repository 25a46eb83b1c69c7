#!/bin/sh
# Builds all tests for other processors than this machine's own, and runs them:
#
#     sh tests/processors.sh [sse2] [avx2] [avx512] [aarch64]     (none: all)
#
# The first three are x86-64; aarch64 is cross-compiled and run by qemu-user. Tests for a processor
# that has more than this one are compiled all the same, and the last lines say that nobody ran
# them.
set -eu

case ${1-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
esac
cd -- "$(dirname -- "$0")/.."

[ $# -gt 0 ] || set -- sse2 avx2 avx512 aarch64

lists=''
for processor; do
  case $processor in
    sse2 | avx2 | avx512) ;;
    aarch64) lists=cmake/debian-packages-aarch64.txt ;;
    *)
      echo "$0: $processor is none of sse2, avx2, avx512, aarch64" >&2
      exit 2
      ;;
  esac
done
# shellcheck disable=SC2086  # one word a list
sh cmake/install_packages.sh $lists

jobs=$(getconf _NPROCESSORS_ONLN)
test_one() {
  echo "Building in $PWD/build/$1"
  cmake --preset "$1" >/dev/null &&
    cmake --build --preset "$1" --parallel "$jobs" &&
    ctest --preset "$1" --parallel "$jobs"
}

summary=''
status=0
for processor; do
  if ! test_one "$processor"; then
    outcome=FAILED
    status=1
  elif grep -q '^MOE_TESTS_RUN_HERE:.*=1$' "build/$processor/CMakeCache.txt"; then
    outcome=passed
  else
    outcome='COMPILED, NOT RUN: this machine cannot'
  fi
  summary="$summary$(printf '%-8s %s' "$processor" "$outcome")
"
done
printf '\n%s' "$summary"
exit $status
