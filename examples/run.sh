#!/bin/sh
# Trains the language model of examples/language_model: installs what is missing, builds, runs.
# Arguments go to the program; `sh examples/run.sh --help` lists them.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
build="$root/build/release"

sh "$root/cmake/install_packages.sh"
echo "Building in $build"
(cd "$root" && cmake --preset release >/dev/null)
cmake --build "$build" --target language_model --parallel "$(getconf _NPROCESSORS_ONLN)"

# exec, so that Ctrl-C reaches the program; in the caller's folder, so that paths are the caller's.
exec "$build/examples/language_model/language_model" "$@"
