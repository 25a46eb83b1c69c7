#!/bin/sh
# A training that is interrupted and goes on ends with the figures of one that is not.
#     sh interrupt_test.sh FOLDER DICTIONARY PROGRAM [arguments]     the folder is made anew
set -eu

folder=$1
dictionary=$2
shift 2
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder"

fail() {
  echo "$1" >&2
  cat "$folder"/*.log >&2
  exit 1
}

# Rows and tables of a log, without seconds.
figures() { sed -n 's/^\( *[0-9]*  .*\)  *[0-9]*$/\1/p; /^|/p' "$1"; }

"$@" --dictionary "$dictionary" --model whole.safetensors >whole.log

# While the dictionary is read: then there is nothing to evaluate or to save.
mkfifo words
"$@" --dictionary words --model none.safetensors >none.log &
program=$!
exec 3>words # when the program opens it, which by then catches signals
kill -s INT "$program"
cat "$dictionary" >&3
exec 3>&-
wait "$program" || fail "the signal before the first update ended the program with $?"
grep -q "^interrupted before the first update" none.log || fail "it was not interrupted before the first update"
[ ! -e none.safetensors ] || fail "an untrained model was saved"

# In the background a shell keeps Ctrl-C from its programs, but this one catches it itself.
"$@" --dictionary "$dictionary" --model parts.safetensors >first.log &
program=$!
# It is saved with the first row.
until [ -s parts.safetensors ]; do
  kill -0 "$program" 2>/dev/null || fail "the training ended before it was interrupted"
  sleep 0.02
done
kill -s INT "$program"
wait "$program" || fail "the signal ended the program with $?"
grep -q "^interrupted after update [1-9][0-9]* of .*--resume parts.safetensors goes on" first.log ||
  fail "it was not interrupted"
! grep -q "^| test" first.log || fail "the test part was read before the end"

"$@" --dictionary "$dictionary" --model parts.safetensors --resume parts.safetensors >second.log
figures whole.log >whole.figures
cat first.log second.log >parts.log
figures parts.log >parts.figures
cmp whole.figures parts.figures || fail "other figures"
