#!/bin/sh
# Builds and runs an example, installing what is missing:
#
#     sh examples/run.sh [EXAMPLE] [ARGUMENT...]
#     sh examples/run.sh cookbook RECIPE [ARGUMENT...], a recipe being a file of examples/cookbook
#     sh examples/run.sh expert_parallel [--ranks N] [ARGUMENT...]
#
# EXAMPLE is language_model (which it is without a name), adapt, pronounce, custom_gate, routing_map,
# inspect, pytorch or expert_parallel. `sh examples/run.sh language_model --help` builds it and lists
# its arguments; of custom_gate and a recipe --help shows the head of the source, and builds nothing.
# N, or RANKS in the environment, is the number of expert_parallel's processes, 2 without either.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
build="$root/build/release"

program=language_model
case ${1-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
  language_model | adapt | pronounce | custom_gate | routing_map | inspect | pytorch | expert_parallel)
    program=$1
    shift
    ;;
  cookbook | -* | '') ;;
  *)
    echo "$0: there is no example $1" >&2
    exit 2
    ;;
esac

folder=$program
if [ "${1-}" = cookbook ]; then
  folder=cookbook
  if [ $# -lt 2 ] || [ ! -f "$root/examples/cookbook/$2.cpp" ]; then
    echo "$0: cookbook and one of $(cd "$root/examples/cookbook" && echo *.cpp | sed 's/\.cpp//g')" >&2
    exit 1
  fi
  program=$2
  shift 2
fi
# These have no options.
source=
[ "$program" != custom_gate ] || source=custom_gate/main.cpp
[ "$folder" != cookbook ] || source=cookbook/$program.cpp
case $source,${1-} in
  ?*,-h | ?*,--help)
    sed -n '/^\/\/\/ /!q; s,^/// ,,p' "$root/examples/$source"
    words=$(echo "${source%.cpp}" | sed 's,/main$,,; s,/, ,')
    arguments=
    ! sed '/^\/\/\/ /!q' "$root/examples/$source" | grep -q 'Arguments\{0,1\}:' || arguments=' [ARGUMENT...]'
    printf '\nUsage: sh examples/run.sh %s%s\n' "$words" "$arguments"
    exit
    ;;
esac

target=$program
[ "$folder" != cookbook ] || target=cookbook_$program

ranks=
packages=
[ "$program" != pytorch ] || packages="$root/cmake/debian-packages-pytorch.txt"
if [ "$program" = expert_parallel ]; then
  ranks=${RANKS:-2}
  packages="$root/cmake/debian-packages-mpi.txt"
  case ${1-} in
    --ranks)
      [ $# -ge 2 ] || { echo "$0: --ranks without a number" >&2; exit 1; }
      ranks=$2
      shift 2
      ;;
    --ranks=*)
      ranks=${1#*=}
      shift
      ;;
  esac
fi

sh "$root/cmake/install_packages.sh" ${packages:+"$packages"}
echo "Building in $build"
(cd "$root" && cmake --preset release >/dev/null)
cmake --build "$build" --target "$target" --parallel "$(getconf _NPROCESSORS_ONLN)"

# Programs run in the caller's folder, so that paths are the caller's.
set -- "$build/examples/$folder/$program" "$@"

# exec, so that Ctrl-C reaches the program.
[ -n "$ranks" ] || exec "$@"

# Of Open MPI, 4 and 5: as root too, more ranks than cores if asked for, and each rank on any core, as
# its threads need them.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none
# The ranks write into pipes of mpirun's, so they cannot know of a terminal.
[ ! -t 2 ] || set -- "$@" --progress

# On Ctrl-C mpirun would kill the ranks. So it is kept from it, and gets a signal instead that it
# passes on to them; on the second Ctrl-C it may kill them.
separate=
if command -v setsid >/dev/null; then separate=setsid; fi
# shellcheck disable=SC2086  # nothing, or one word
$separate mpirun -n "$ranks" "$@" &
mpirun=$!
# shellcheck disable=SC2317  # the traps reach it
tell() { kill -s "$1" "$mpirun" 2>/dev/null || true; }
trap 'trap "tell TERM" INT; tell USR1' INT
trap 'tell TERM' HUP TERM
code=0
wait "$mpirun" || code=$?
# A signal ends `wait`, but not yet mpirun.
while kill -0 "$mpirun" 2>/dev/null; do
  code=0
  wait "$mpirun" || code=$?
done
exit "$code"
