#!/bin/sh
# The study of REINFORCE, with a program in place of the trainings that does nothing: it goes on where it was
# interrupted, and reports a training that fails.
#     sh study_test.sh FOLDER     the folder is made anew
set -eu

study=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/study.sh
# shellcheck source=examples/common/interrupt.sh
. "${study%/*}/../common/interrupt.sh"
folder=$1
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder"

fail() {
  echo "$1" >&2
  cat "$folder"/*.txt >&2
  exit 1
}

# Notes its arguments and saves its model: two of them half, on Ctrl-C, for which they wait. In the
# folder `late` the first ones are in their last phase, and come to their end after Ctrl-C.
cat >program <<'PROGRAM'
#!/bin/sh
set -eu
echo "$*" >>calls.txt
resume=no
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=$2 ;;
    --csv) csv=$2 ;;
    --resume) resume=$2 ;;
  esac
  shift
done
[ ! -f broken ] || { echo "pronounce: broken" >&2; exit 1; }
case $model in
  */late/start-*)
    if [ ! -f "$model.waiting" ]; then
      : >"$model.waiting"
      # What tells the study of Ctrl-C, which this does not look at any more.
      polls=0
      until [ -e "${model%/*}/stop" ] || [ "$polls" -ge 600 ]; do
        sleep 0.1
        polls=$((polls + 1))
      done
    fi
    ;;
  */study/cross_entropy-1.* | */study/annealed-1.*)
    # Not by a trap: a shell cannot catch what it was started without.
    [ "$resume" = "$model" ] || [ -f "$model.waiting" ] || exec python3 -c 'import signal, sys
signal.signal(signal.SIGINT, lambda *_: None)
open(sys.argv[1] + ".waiting", "w").close()
signal.pause()
open(sys.argv[1], "w").write("half\n")
print("interrupted after update 1 of 2")' "$model"
    ;;
esac
echo whole >"$model"
{ echo 1,none,none,16000,10; echo 1,none,none,19000,20; } >>"$csv"
echo "Error rates in percent after 19000 updates, 20 s of training"
for row in training validation test; do echo "| $row | 1 | 2 | 3 | 4 |"; done
echo "the model is in $model"
PROGRAM
chmod +x program
export PRONOUNCE="$folder/program"

touch broken
if sh "$study" reinforce broken_study >broken.txt 2>&1; then fail "a training failed, and the study did not"; fi
grep -q "start-1.part:pronounce: broken" broken.txt || fail "the study does not say what failed"
rm broken calls.txt

half='cross_entropy-1 annealed-1'
interrupt first.txt "study/cross_entropy-1.safetensors.waiting study/annealed-1.safetensors.waiting" \
  sh "$study" reinforce study
grep -q "^interrupted; the same command goes on" first.txt || fail "it was not interrupted"
[ "$(wc -l <calls.txt)" -eq 5 ] || fail "it began more trainings after it was interrupted"
for name in $half; do
  [ "$(cat "study/$name.safetensors")" = half ] || fail "it ended before $name was saved"
  [ ! -f "study/$name.log" ] || fail "$name, which was interrupted, counts as done"
done

sh "$study" reinforce study >second.txt 2>&1
for name in $half; do
  grep -q -- "--model $folder/study/$name.safetensors .*--resume $folder/study/$name.safetensors" calls.txt ||
    fail "$name began anew"
done
[ "$(wc -l <calls.txt)" -eq 23 ] || fail "trainings were made twice"
[ "$(grep -c '| 3 / 3 / 3 | ' study/table.md)" -eq 7 ] || fail "not all ways are in the table"

# Ctrl-C in the last phase of two trainings, then in that of the one that is left.
: >calls.txt
interrupt third.txt "late/start-1.safetensors.waiting late/start-2.safetensors.waiting" sh "$study" reinforce late
grep -q "^interrupted; the same command goes on" third.txt || fail "Ctrl-C in the last phase was swallowed"
[ "$(wc -l <calls.txt)" -eq 2 ] || fail "it began more trainings after Ctrl-C in the last phase"
for name in start-1 start-2; do [ -f "late/$name.log" ] || fail "$name came to its end, and does not count"; done
interrupt fourth.txt late/start-3.safetensors.waiting sh "$study" reinforce late
grep -q "^interrupted; the same command goes on" fourth.txt || fail "Ctrl-C in the very last phase was swallowed"
[ "$(wc -l <calls.txt)" -eq 3 ] || fail "it began more trainings after Ctrl-C in the very last phase"
sh "$study" reinforce late >fifth.txt 2>&1
[ "$(wc -l <calls.txt)" -eq 21 ] || fail "trainings were made twice, or not all"
