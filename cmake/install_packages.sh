#!/bin/sh
# Installs what is missing of debian-packages.txt and of the lists that are named besides, and makes
# sure that a build can begin:
#     sh cmake/install_packages.sh [LIST...]
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

fail() {
  echo "$0: $*" >&2
  exit 1
}

packages=$(cat "$here/debian-packages.txt" "$@")

missing=''
if command -v apt-get >/dev/null; then
  for package in $packages; do
    # dpkg-query fails where it has never heard of the package.
    { dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null || true; } |
      grep -qx installed || missing="$missing $package"
  done

  as_root=''
  [ "$(id -u)" -eq 0 ] || as_root=sudo
  if [ -n "$missing" ] && [ -n "$as_root" ] && ! command -v sudo >/dev/null; then
    echo "Only root can install these, and there is no sudo:$missing"
    echo "CMake downloads the libraries among them."
  elif [ -n "$missing" ]; then
    echo "Installing with apt-get:$missing"
    # One broken source among many is no reason to stop: the installation says what it really lacks.
    $as_root apt-get update -qq || true
    # shellcheck disable=SC2086  # one word a package
    $as_root env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends $missing >/dev/null
  fi
else
  echo "There is no apt-get here: CMake takes the libraries it finds and downloads the others."
fi

command -v "${CXX:-c++}" >/dev/null || fail "a C++20 compiler is needed (${CXX:-c++} is not here)"
for tool in cmake ninja; do
  command -v "$tool" >/dev/null || fail "$tool is needed, and not here"
done

# "cmake version 3.25.1" -> 3 25
version=$(cmake --version | sed -n '1s/.* \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
major=${version% *}
minor=${version#* }
[ "$major" -gt 3 ] || [ "$minor" -ge 25 ] ||
  fail "CMake 3.25 or newer is needed, and this is $major.$minor." \
    "Debian 12 and Ubuntu 24.04 are the oldest releases whose own will do;" \
    "https://cmake.org/download has it for others."
