#!/bin/sh
# A training that is interrupted and goes on ends with the numbers of one that is not.
#     sh interrupt_test.sh FOLDER PROGRAM [arguments]     the folder is made anew; two evaluations or more
# SIGNAL is the one that interrupts (INT); with PICTURE=no the program draws none.
set -eu

folder=$1
shift
# shellcheck source=examples/common/interrupted_training.sh
. "$(dirname -- "$0")/../common/interrupted_training.sh"
begin_in "$folder"

# Perplexities and the balance of a model in a CSV, without what depends on time.
figures() { awk -F, '{ print $1, $2, $3, $6, $7, $10, $11, $12, $13 }' "$1" | sort -u; }

signal=${SIGNAL:-INT}
picture=${PICTURE:-yes}

# train NAME PROGRAM [arguments]: with files of that name.
train() {
  name=$1
  shift
  if [ "$picture" = yes ]; then set -- "$@" --picture "$name.svg"; fi
  "$@" --csv "$name.csv"
}

train whole "$@" >whole.log

# Several ranks cannot share a pipe.
if [ "$signal" = INT ]; then
  echo "the last words" >words
  interrupt_while_reading text none.log "$@" --data text --csv none.csv <words
  ! grep -q "| sparse" none.log || fail "untrained models were evaluated"
  [ "$(wc -l <none.csv)" -eq 1 ] || fail "there are rows of untrained models"
fi

set -- "$@" --checkpoint training.safetensors
if [ "$picture" = yes ]; then
  interrupt_training "$signal" first.log training.safetensors "$@" --csv parts.csv --picture parts.svg
else
  interrupt_training "$signal" first.log training.safetensors "$@" --csv parts.csv
fi
grep -q "^interrupted after update [1-9][0-9]* of " first.log || fail "it was not interrupted"
! grep -q "| sparse" first.log || fail "the test part was read before the end"

# Options that change the outcome are refused.
if "$@" --seed 77 --csv other.csv >other.log 2>&1; then
  fail "another seed went on from the training"
fi
grep -q "is another training" other.log || fail "another seed has another error"

train parts "$@" >second.log
grep -q "^goes on from training.safetensors[.rank0]*, after update [1-9]" second.log || fail "it began anew"

# The row at the interruption is one that the whole training has not.
figures whole.csv >whole.figures
figures parts.csv >parts.figures
missing=$(comm -23 whole.figures parts.figures)
[ -z "$missing" ] || fail "other numbers: $missing"
more=$(comm -13 whole.figures parts.figures | wc -l)
[ "$more" -le 2 ] || fail "$more rows that the whole training has not"
[ "$picture" = no ] || cmp whole.svg parts.svg || fail "another picture"
