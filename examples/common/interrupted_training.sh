# shellcheck shell=sh
# For tests of trainings that are interrupted; to be sourced.

# begin_in FOLDER: makes the folder anew and enters it.
begin_in() {
  folder=$1
  rm -rf "$folder"
  mkdir -p "$folder"
  cd "$folder" || exit
}

fail() {
  echo "$1" >&2
  cat "$folder"/*.log >&2
  exit 1
}

# In the background a shell keeps Ctrl-C from its programs, but these catch it themselves. So a program itself
# is what the shell starts there.

# interrupt_while_reading PIPE LOG PROGRAM...: Ctrl-C while the program reads what it learns from a pipe of that
# name, which gets the standard input: then there is nothing to evaluate or to save.
interrupt_while_reading() {
  pipe=$1
  log=$2
  shift 2
  mkfifo "$pipe"
  "$@" >"$log" &
  program=$!
  exec 3>"$pipe" # when the program opens it, which by then catches signals
  kill -s INT "$program"
  cat >&3
  exec 3>&-
  wait "$program" || fail "the signal before the first update ended the program with $?"
  grep -q "^interrupted before the first update" "$log" ||
    fail "it was not interrupted before the first update"
}

# interrupt_training SIGNAL LOG FILE PROGRAM...: the signal once the training is saved, in FILE or FILE.rank0.
interrupt_training() {
  signal=$1
  log=$2
  saved=$3
  shift 3
  "$@" >"$log" &
  program=$!
  until [ -s "$saved" ] || [ -s "$saved.rank0" ]; do
    kill -0 "$program" 2>/dev/null || fail "the training ended before it was interrupted"
    sleep 0.02
  done
  kill -s "$signal" "$program"
  wait "$program" || fail "the signal ended the program with $?"
}
