# shellcheck shell=sh
# Ctrl-C for tests of scripts; to be sourced. Needs python3, and a function fail.
#
#     interrupt LOG "FILE..." COMMAND...     starts a script, presses Ctrl-C once the files are there, and
#                                            checks that it ends with code 130. It waits a minute for each file.

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
    polls=0
    until [ -f "$file" ]; do
      kill -0 "$pid" 2>/dev/null || fail_and_end "it ended before it was interrupted"
      [ "$polls" -lt 600 ] || fail_and_end "$file did not come"
      polls=$((polls + 1))
      sleep 0.1
    done
  done
  kill -s INT -- "-$pid"
  code=0
  wait "$pid" || code=$?
  [ "$code" -eq 130 ] || fail_and_end "Ctrl-C ended it with $code"
}

# Leaves nothing of the session behind, in which there may be nothing any more.
fail_and_end() {
  kill -s KILL -- "-$pid" 2>/dev/null || true
  fail "$1"
}
