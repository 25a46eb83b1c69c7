# shellcheck shell=sh
# Ctrl-C for tests of scripts; to be sourced. Needs python3, and a function fail.
#
#     interrupt LOG "FILE..." COMMAND...     starts a script, presses Ctrl-C once the files are there, and
#                                            checks that it ends with code 130

interrupt() {
  log=$1
  files=$2
  shift 2
  # In a session of its own, so that Ctrl-C reaches all of it and nothing else. A shell's background would
  # not let it through.
  python3 -c 'import os, signal, sys
os.setsid()
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])' "$@" >"$log" 2>&1 &
  pid=$!
  for file in $files; do
    until [ -f "$file" ]; do
      kill -0 "$pid" 2>/dev/null || fail "it ended before it was interrupted"
      sleep 0.05
    done
  done
  kill -s INT -- "-$pid"
  code=0
  wait "$pid" || code=$?
  [ "$code" -eq 130 ] || fail "Ctrl-C ended it with $code"
}
