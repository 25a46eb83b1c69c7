#!/bin/sh
# Runs a program that is to fail, under mpirun, and sees that all its ranks end:
#
#     sh ends.sh SECONDS MESSAGE MPIRUN ARGUMENTS... PROGRAM FAILURE
#
# PROGRAM is moe_mpi_failures; a timeout in seconds, at first 1, is added to its arguments. Prints what the ranks said.
# Fails if a rank still lives after SECONDS. On a busy machine a rank that is only slow can time out first: where a
# timeout was said, and not MESSAGE, an extended regular expression, the run is made again with a timeout of 4, then of
# 16. It watches the ranks and not mpirun, since that of Open MPI 4.1 on Debian 12 waits for ever, in about one of four
# such ends, for a thread of its own, when all ranks are gone (as in openpmix issue 1244); then it is killed.
set -eu

seconds=$1
message=$2
shift 2

output=$(mktemp)
trap 'rm -f "$output"' EXIT

# The states of the launcher's children, a letter each: R, S, Z for one that has ended, ...
ranks() {
  for child in $(cat "/proc/$launcher/task/"*/children 2>/dev/null || true); do
    # The name in brackets may have spaces.
    sed -n 's/.*) \([A-Z]\) .*/\1/p' "/proc/$child/stat" 2>/dev/null || true
  done
}

status=0
for timeout in 1 4 16; do
  "$@" $timeout >"$output" 2>&1 &
  launcher=$!
  turns=$((5 * seconds))
  started=no
  while kill -0 "$launcher" 2>/dev/null; do
    if ranks | grep -qv Z; then
      started=yes
    elif [ $started = yes ] && ranks | grep -q Z; then
      sleep 2 # that mpirun may end by itself
      kill -KILL "$launcher" 2>/dev/null || true
      break
    fi
    turns=$((turns - 1))
    if [ $turns -lt 0 ]; then
      echo "a rank still lives after $seconds s"
      status=1
      kill -KILL "$launcher"
      break
    fi
    sleep 0.2
  done
  wait "$launcher" 2>/dev/null || true
  cat "$output"
  if [ $status -ne 0 ] || grep -Eq "$message" "$output" ||
    ! grep -Eq 'for a rank that never came|was not over after' "$output"; then
    break
  fi
  echo "again, with more patience"
done
exit $status
