#!/bin/sh
# A training that is interrupted and goes on ends with the figures of one that is not.
#     sh interrupt_test.sh FOLDER DICTIONARY PROGRAM [arguments]     the folder is made anew
set -eu

folder=$1
dictionary=$2
shift 2
# shellcheck source=examples/common/interrupted_training.sh
. "$(dirname -- "$0")/../common/interrupted_training.sh"
begin_in "$folder"

# Rows and tables of a log, without seconds, nor the blanks before them, of which 10 seconds have fewer than 9.
figures() { sed -n 's/^\( *[0-9]*  .*[^ ]\)  *[0-9]*$/\1/p; /^|/p' "$1"; }

"$@" --dictionary "$dictionary" --model whole.safetensors >whole.log

interrupt_while_reading words none.log "$@" --dictionary words --model none.safetensors <"$dictionary"
[ ! -e none.safetensors ] || fail "an untrained model was saved"

interrupt_training INT first.log parts.safetensors "$@" --dictionary "$dictionary" --model parts.safetensors
grep -q "^interrupted after update [1-9][0-9]* of .*--resume parts.safetensors goes on" first.log ||
  fail "it was not interrupted"
! grep -q "^| test" first.log || fail "the test part was read before the end"

"$@" --dictionary "$dictionary" --model parts.safetensors --resume parts.safetensors >second.log
figures whole.log >whole.figures
cat first.log second.log >parts.log
figures parts.log >parts.figures
cmp whole.figures parts.figures || fail "other figures"
