#!/bin/sh
# Stops or kills a rank of a training program at some moments, one run each, and sees that all other
# ranks end and say why:
#
#     sh stops.sh COUNT TIMEOUT ALLOWED MPIRUN ARGUMENTS... PROGRAM
#
# PROGRAM is moe_mpi_stops, which is given a folder, the numbers 1 to COUNT as seeds, and the timeout in
# seconds. What it prints is shown for a run that fails. The ranks may live for ALLOWED whole seconds after the
# timeout; how long they lived at most is printed. On a quiet machine it is a fraction of one second: by hand
# let 1 be allowed. (Of a rank that is killed the launcher ends the others, so nobody says a thing.)
# On a busy machine the others can time out before a rank stops: such a run is made again with a longer
# timeout.
set -eu

count=$1
timeout=$2
allowed=$((100 * $3))
shift 3

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# Sets `now`, in hundredths of a second.
set_now() {
  read -r now rest </proc/uptime
  now=$(hundredths "$now")
}
hundredths() {
  whole=${1%%.*}
  part=$(printf '%s00' "$(echo "$1." | cut -d . -f 2)" | cut -c 1-2)
  echo $((whole * 100 + ${part#0}))
}
# Whether a process runs, or is stopped: what has ended is a zombie while mpirun is busy.
lives() {
  read -r stat 2>/dev/null <"/proc/$1/stat" || return 1
  case ${stat##*) } in
    Z* | X*) return 1 ;;
  esac
}

# run_once TIMEOUT COMMAND... sets `problem`, and `elapsed` after the stop; both times in hundredths of a
# second.
run_once() {
  patience=$1
  shift
  rm -f "$folder"/*
  "$@" "$folder" $seed "$((patience / 100)).$(printf '%02d' $((patience % 100)))" >"$folder/output" 2>&1 &
  launcher=$!

  set_now
  start=$now
  while [ ! -e "$folder/stopped" ] && [ $((now - start)) -lt 6000 ] && kill -0 $launcher 2>/dev/null; do
    sleep 0.02
    set_now
  done
  problem=
  elapsed=0
  if [ -e "$folder/stopped" ]; then
    stopped=$(hundredths "$(cat "$folder/stopped")")
    victim=$(sed -n 's/^seed [0-9]*: rank \([0-9]*\),.*/\1/p' "$folder/output")
    others=
    for rank in "$folder"/[0-9]*; do
      [ "${rank##*/}" = "$victim" ] || others="$others $(cat "$rank")"
    done
    while :; do
      alive=
      for process in $others; do
        if lives "$process"; then alive="$alive $process"; fi
      done
      set_now
      elapsed=$((now - stopped))
      [ -n "$alive" ] && [ $elapsed -lt $((patience + allowed)) ] || break
      sleep 0.02
    done
    if [ -n "$alive" ]; then
      problem="still live:$alive"
    elif grep -q ', stopped, ' "$folder/output" && ! grep -q 'for a rank that never came' "$folder/output"; then
      problem="nobody said why"
    fi
  elif grep -q 'for a rank that never came' "$folder/output"; then
    problem="a rank waited in vain before one stopped"
  else
    problem="no rank stopped"
  fi
  # Open MPI's mpirun may hang after such an end, see ends.sh.
  for process in $(cat "$folder"/[0-9]* 2>/dev/null) $launcher; do
    kill -KILL "$process" 2>/dev/null || true
  done
  wait $launcher 2>/dev/null || true
}

longest=0
status=0
seed=0
while [ $seed -lt "$count" ]; do
  seed=$((seed + 1))
  run_once "$(hundredths "$timeout")" "$@"
  while [ "$problem" = "a rank waited in vain before one stopped" ] && [ "$patience" -lt 1600 ]; do
    run_once $((2 * patience)) "$@"
  done
  late=$((elapsed - patience))
  if [ $late -gt $longest ]; then longest=$late; fi
  if [ -n "$problem" ]; then
    echo "seed $seed: $problem, $elapsed hundredths of a second after the stop"
    cat "$folder/output"
    status=1
    # Ten of them would take longer than CTest allows.
    case $problem in "still live"*) break ;; esac
  fi
done
echo "$seed stops, the others ended within $longest hundredths of a second after the timeout, allowed were $allowed"
exit $status
