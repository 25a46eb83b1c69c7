#!/bin/sh
# Installs a build and takes it away again by the commands that docs/install.md has for that: what was
# there before must be left, and nothing else.
#
#     sh uninstall.sh CMAKE BUILD INSTALL.MD FOLDER
set -eu

cmake=$1
build=$2
document=$3
folder=$4

rm -rf "$folder"
mkdir -p "$folder/prefix/include/moe"
ln -s "$build" "$folder/build"
echo mine >"$folder/prefix/include/moe/mine.hpp"
awk '/^```sh$/ { block = ""; inside = 1; next }
     /^```$/    { if (inside && block ~ /install_manifest/) printf "%s", block; inside = 0 }
     inside     { block = block $0 "\n" }' "$document" >"$folder/uninstall.sh"
[ -s "$folder/uninstall.sh" ] || {
  echo "$document has no commands with install_manifest" >&2
  exit 1
}

"$cmake" --install "$build" --prefix "$folder/prefix" >/dev/null
cd "$folder"
[ "$(find prefix -type f | wc -l)" -gt 1 ]
sh uninstall.sh || true # of rmdir, which says that a folder is not empty
left=$(find prefix | LC_ALL=C sort | tr '\n' ' ')
[ "$left" = 'prefix prefix/include prefix/include/moe prefix/include/moe/mine.hpp ' ] || {
  echo "left: $left" >&2
  exit 1
}
