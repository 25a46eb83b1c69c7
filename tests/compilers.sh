#!/bin/sh
# Tries the headers as a user's own compiler sees them: found by -I, so that they must stand the
# user's warnings, without CMake, and in the dialects that people use:
#
#     sh tests/compilers.sh [COMPILER...]     (g++-12 clang++-14 clang++-19)
#
# With each of them, and with libc++ where a clang has it, in C++20 and C++23, the latter without
# RTTI: all headers, and a program of tests/consumer, which is also run; the products that need
# AVX512-BF16, which other processors only compile; then that -fno-exceptions gets an error that says
# so. The last line names what was not there. EIGEN is the folder of Eigen's headers
# (/usr/include/eigen3).
set -eu

case ${1-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
esac
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
eigen=${EIGEN:-/usr/include/eigen3}
[ $# -gt 0 ] || set -- g++-12 clang++-14 clang++-19

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM

# All but mpi/, for which MPI's own headers would be needed.
missing=''
kept='^moe/'
if ! printf '#include <nlohmann/json.hpp>\n' | c++ -x c++ -E - >/dev/null 2>&1; then
  missing="$missing nlohmann-json"
  kept='^moe/\([^i]\|i[^o]\)'
fi
(cd "$root/include" && find moe -name '*.hpp' ! -path 'moe/mpi/*') | LC_ALL=C sort | grep "$kept" |
  sed 's/.*/#include <&>/' >"$folder/headers.cpp"
# What is instantiated is compiled, too.
cat "$root/cmake/instantiations_float.cpp" >>"$folder/headers.cpp"

cat >"$folder/pairs.cpp" <<'END'
#include <moe/kernels/gemm_bfloat16.hpp>
namespace moe::detail {
template void gemm_bfloat16<PairWords>(const GemmNN<float>&);
template void gemm_bfloat16<PairWords>(const GemmNT<float>&);
template void gemm_bfloat16<PairWords>(const GemmTN<float>&);
}  // namespace moe::detail
END

warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast -Wcast-qual
  -Wdouble-promotion -Wformat=2 -Wnon-virtual-dtor -Woverloaded-virtual -Wextra-semi -Wnull-dereference
  -Wcast-align -Wunused -Werror"

# try WHAT COMPILER FLAG...
try() {
  what=$1
  shift
  # shellcheck disable=SC2086  # one word a flag
  "$@" $warnings "-I$root/include" -isystem "$eigen" || {
    echo "$0: $what: FAILED: $*" >&2
    exit 1
  }
}

try_all() {
  name=$1
  shift
  for dialect in -std=c++20 '-std=c++2b -fno-rtti'; do
    # shellcheck disable=SC2086
    try "$name, all headers" "$@" $dialect -fsyntax-only "$folder/headers.cpp"
  done
  # What is for processors that this one is not. Code is made too: some errors of clang come with that.
  case $(uname -m) in
    x86_64)
      for march in x86-64-v3 x86-64-v4; do
        try "$name, products, $march" "$@" "-march=$march" -std=c++20 -c "$root/tests/compiled/products.cpp" \
          -o "$folder/products.o"
      done
      ;;
  esac
  # shellcheck disable=SC2086
  try "$name, a program" "$@" $dialect -O1 "$root/tests/consumer/main.cpp" -o "$folder/program"
  printf '%s: all headers in C++20 and C++23; without RTTI: ' "$name"
  "$folder/program"
}

# The instructions for pairs of bfloat16 need not be there to be compiled, only known.
try_pairs() {
  name=$1
  shift
  set -- "$@" -march=x86-64-v4 -mavx512bf16
  if printf '' | "$1" -march=x86-64-v4 -mavx512bf16 -x c++ -fsyntax-only - 2>/dev/null; then
    try "$name, pairs of bfloat16" "$@" -std=c++20 -fsyntax-only "$folder/pairs.cpp"
  else
    missing="$missing AVX512-BF16($1)"
  fi
}

# -fno-exceptions is refused, and the first thing said is why.
try_without_exceptions() {
  "$1" -std=c++20 -fno-exceptions "-I$root/include" -isystem "$eigen" -fsyntax-only \
    "$root/tests/consumer/main.cpp" >"$folder/errors" 2>&1 && {
    echo "$0: $1 takes -fno-exceptions" >&2
    exit 1
  }
  grep -m 1 'error' "$folder/errors" | grep -q 'moe reports errors by exceptions' || {
    cat "$folder/errors" >&2
    echo "$0: $1 -fno-exceptions: the first error does not say what is wrong" >&2
    exit 1
  }
}

for compiler; do
  if ! command -v "$compiler" >/dev/null; then
    missing="$missing $compiler"
    continue
  fi
  version=$("$compiler" --version)
  name=$(echo "$version" | head -n 1)
  set -- "$compiler"
  case $version in
    *clang*) set -- "$@" -Wused-but-marked-unused ;;
    *) set -- "$@" -Wuseless-cast -Wlogical-op -Wduplicated-cond -Wduplicated-branches ;;
  esac
  try_all "$name" "$@"
  try_pairs "$name" "$@"
  try_without_exceptions "$compiler"
  case $version in
    *clang*)
      # An older clang may find a libc++ that is too new for it, and only warn.
      if printf '#include <cmath>\nint main() {}\n' |
        "$compiler" -std=c++20 -Werror -stdlib=libc++ -x c++ - -o "$folder/program" 2>/dev/null; then
        try_all "$name with libc++" "$@" -stdlib=libc++
      else
        missing="$missing libc++($compiler)"
      fi
      ;;
  esac
done
[ -z "$missing" ] || echo "Not found, and so not tried:$missing"
