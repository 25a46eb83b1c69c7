#!/bin/sh
# Installs what is missing, builds all tests and runs them:
#
#     sh tests/run.sh [ARGUMENT...]
#
# Arguments go to ctest: -R "gates:" runs some of them.
set -eu

case ${1-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
esac
cd -- "$(dirname -- "$0")/.."

sh cmake/install_packages.sh cmake/debian-packages-mpi.txt
echo "Building in $PWD/build/tests"
cmake --preset tests >/dev/null
cmake --build --preset tests --parallel "$(getconf _NPROCESSORS_ONLN)"
ctest --preset tests "$@"
