#!/bin/sh
# Makes the archive of a release out of the last commit, and fills its address and hashes into the Conan
# recipe and the vcpkg port:
#
#     sh packaging/release.sh ARCHIVES HOMEPAGE [FOLDER]     (build/packages)
#
# ARCHIVES is the address of the folder in which the archive will be found, HOMEPAGE that of the project.
# build/packages is emptied first; a FOLDER must be empty or new. COMMIT is another commit than HEAD. The same
# commit gives the same archive.
set -eu

fail() {
  echo "$0: $*" >&2
  exit 1
}

[ $# -ge 2 ] || fail "usage: sh packaging/release.sh ARCHIVES HOMEPAGE [FOLDER]"
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
archives=$1
homepage=$2
folder=${3:-$root/build/packages}
commit=${COMMIT:-HEAD}
# They go into sed's replacements and into quoted strings of Python, JSON and CMake.
case $archives$homepage in
  *[!A-Za-z0-9:/._~%+-]*) fail "an address has an unusual character: $archives $homepage" ;;
esac

# All that is released is of the commit, so that nothing of a changed tree gets into it.
version=$(git -C "$root" show "$commit:include/moe/version.hpp" |
  sed -n 's/^#define MOE_VERSION_[A-Z]* //p' | paste -s -d . -)
case $version in
  [0-9]*.[0-9]*.[0-9]*) ;;
  *) fail "version.hpp has no version of three numbers: $version" ;;
esac
git -C "$root" show "$commit:CITATION.cff" | grep -qx "version: $version" ||
  fail "CITATION.cff has another version than version.hpp, $version"
changes=$(git -C "$root" show "$commit:CHANGELOG.md" | grep "^## \[$version\]") ||
  fail "CHANGELOG.md has no section [$version]"
case $changes in
  *Unreleased*) echo "CHANGELOG.md still says: $changes" >&2 ;;
esac

name=moe-$version
# Only the script's own folder is emptied: a user may name any.
[ $# -ge 3 ] || rm -rf "$folder"
mkdir -p "$folder"
[ -z "$(ls -A "$folder")" ] || fail "$folder is not empty"
mkdir "$folder/conan" "$folder/vcpkg"
# Without -n the time of compressing would be part of the archive.
git -C "$root" archive --format=tar --prefix="$name/" "$commit" >"$folder/$name.tar"
gzip -n -9 "$folder/$name.tar"
sha256=$(sha256sum "$folder/$name.tar.gz" | cut -d ' ' -f 1)
sha512=$(sha512sum "$folder/$name.tar.gz" | cut -d ' ' -f 1)

tar -xzf "$folder/$name.tar.gz" -C "$folder" --strip-components=2 "$name/packaging/conan" "$name/packaging/vcpkg"
find "$folder/conan" "$folder/vcpkg" -type f | while IFS= read -r file; do
  sed -e "s|@version@|$version|g" -e "s|@homepage@|$homepage|g" -e "s|@sha256@|$sha256|g" \
    -e "s|@sha512@|$sha512|g" -e "s|@archive@|$archives/$name.tar.gz|g" "$file" >"$folder/filled"
  cat "$folder/filled" >"$file"
done
rm "$folder/filled"
if grep -rn '@[a-z0-9]*@' "$folder/conan" "$folder/vcpkg"; then
  fail "nothing was filled in there"
fi
echo "$folder/$name.tar.gz"
