#!/bin/sh
# Makes a release of the tree as it is, new and changed files included, in build/packaging, builds and
# runs programs with its Conan package, and installs its vcpkg port:
#
#     sh packaging/test.sh
#
# Conan is the one of the system, else it is installed there from PyPI. The last line names what was
# not there. Eigen and nlohmann-json are the system's, in a package of each made here, so that Conan
# needs no network.
set -eu

case ${1-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
esac
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
work=$root/build/packaging
if [ ! -e "$root/.git" ]; then
  echo "The packages are not tried: without .git there is nothing to pack."
  exit 0
fi
mkdir -p "$work"

# A commit that no branch has, by an index of its own.
GIT_INDEX_FILE=$work/index
export GIT_INDEX_FILE
git -C "$root" read-tree HEAD
git -C "$root" add --all
tree=$(git -C "$root" write-tree)
unset GIT_INDEX_FILE
COMMIT=$(git -C "$root" -c user.name=moe -c user.email=moe@localhost commit-tree -m "The tree as it is" "$tree")
export COMMIT
# release.sh takes no spaces in an address.
address=file://$(printf %s "$work/release" | sed 's/ /%20/g')
rm -rf "$work/release"
sh "$root/packaging/release.sh" "$address" https://localhost/moe "$work/release"

fail() {
  echo "$0: $*" >&2
  exit 1
}

# What is in a folder already is left alone, and what is in the build folders of CMake's presets.
checkout=$work/checkout
rm -rf "$checkout"
mkdir -p "$checkout/packaging" "$checkout/build/release"
cp "$root/packaging/release.sh" "$checkout/packaging"
touch "$checkout/build/release/CMakeCache.txt"
release_again() {
  GIT_DIR=$(git -C "$root" rev-parse --absolute-git-dir) \
    sh "$checkout/packaging/release.sh" "$address" https://localhost/moe "$@" 2>&1
}
if said=$(release_again "$checkout/build/release"); then
  fail "release.sh took a folder that is not empty"
fi
case $said in
  *"$checkout/build/release is not empty") ;;
  *) fail "$said" ;;
esac
for time in first second; do
  release_again >"$work/again.log" || fail "release.sh, the $time time: $(cat "$work/again.log")"
done
[ "$(ls -A "$checkout/build/release")" = CMakeCache.txt ] || fail "release.sh changed build/release"
diff -r "$work/release" "$checkout/build/packages" || fail "the same commit gave something else"
echo "release.sh: the same commit gave the same twice, and no other folder was touched"

missing=''
conan=$(command -v conan || true)
if [ -z "$conan" ]; then
  conan=$work/venv/bin/conan
  # Where there is no Python, or no network, the package is not tried.
  [ -x "$conan" ] || { python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q 'conan>=2,<3'; } \
    >"$work/pip.log" 2>&1 || conan=''
fi
if [ -n "$conan" ]; then
  CONAN_HOME=$work/conan
  export CONAN_HOME
  "$conan" profile detect --force >/dev/null 2>&1
  "$conan" remote disable '*' >/dev/null 2>&1
  try_conan() {
    "$conan" create "$@" -s compiler.cppstd=20 >"$work/conan.log" 2>&1 || {
      tail -n 40 "$work/conan.log" >&2
      exit 1
    }
  }
  try_conan "$root/packaging/test/system" --name eigen --version 3.4.0
  try_conan "$root/packaging/test/system" --name nlohmann_json --version 3.11.3
  version=$(sed -n 's/^ *"\(.*\)":$/\1/p' "$work/release/conan/config.yml")
  try_conan "$work/release/conan/all" --version "$version"
  try_conan "$work/release/conan/all" --version "$version" -o 'moe/*:io=False' -o 'moe/*:openmp=False'
  echo "Conan: the package $version was made, and a program with it, with and without its options"
else
  missing="$missing conan"
fi

if command -v vcpkg >/dev/null; then
  vcpkg install 'moe[io]' --overlay-ports="$work/release/vcpkg" --x-install-root="$work/vcpkg" \
    --no-binarycaching
  test -e "$work/vcpkg"/*/share/moe/moe-config.cmake
  echo "vcpkg: the port was installed"
else
  missing="$missing vcpkg"
fi
[ -z "$missing" ] || echo "Not found, and so not tried:$missing"
