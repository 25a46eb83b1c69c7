#!/bin/sh
# Builds and runs an example, installing what is missing:
#
#     sh examples/run.sh [language_model | pronounce | custom_gate] [arguments for the program]
#
# Without a name it is language_model. `sh examples/run.sh pronounce --help` lists that program's
# arguments.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
build="$root/build/release"

program=language_model
case ${1-} in
  language_model | pronounce | custom_gate)
    program=$1
    shift
    ;;
esac

sh "$root/cmake/install_packages.sh"
echo "Building in $build"
(cd "$root" && cmake --preset release >/dev/null)
cmake --build "$build" --target "$program" --parallel "$(getconf _NPROCESSORS_ONLN)"

# exec, so that Ctrl-C reaches the program; in the caller's folder, so that paths are the caller's.
exec "$build/examples/$program/$program" "$@"
