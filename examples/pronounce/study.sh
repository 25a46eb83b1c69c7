#!/bin/sh
# The studies in README.md beside this file.
#
#     sh examples/pronounce/study.sh [PART [FOLDER]]
#
# PART   reinforce   what REINFORCE is worth after cross-entropy: five ways to go on (the default)
#        experts     what experts are worth at equal operations: 4 of 4, of 16 and of 64
#        full        what REINFORCE is worth after the cross-entropy of --full, at equal time
# FOLDER             by default build/study for the first, build/study_PART for the others
#
# Three seeds; two trainings at a time, a thread each. Ctrl-C ends the study and saves what is being
# trained; the same command goes on from there, and does not train again what is in the folder
# already.
#
# PRONOUNCE, in the environment, is a program that is there already; without it one is built.
set -eu

case ${1-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
esac
part=${1:-reinforce}
case $part in
  reinforce) default=study ;;
  experts | full) default=study_$part ;;
  *)
    echo "study.sh: no part $part; there are reinforce, experts and full" >&2
    exit 1
    ;;
esac
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
folder=${2:-$root/build/$default}
mkdir -p "$folder"
folder=$(CDPATH='' cd -- "$folder" && pwd)
# Is there once Ctrl-C was pressed: a training in its last phase ends as if it had not been.
stop="$folder/stop"
rm -f "$stop"

program=${PRONOUNCE:-}
if [ -z "$program" ]; then
  sh "$root/cmake/install_packages.sh"
  (cd "$root" && cmake --preset release >/dev/null)
  cmake --build "$root/build/release" --target pronounce --parallel "$(getconf _NPROCESSORS_ONLN)"
  program="$root/build/release/examples/pronounce/pronounce"
fi
# shellcheck source=examples/common/bar.sh
. "$root/examples/common/bar.sh"

seeds='1 2 3'

# Trainings of the part that are done, and all of them.
count_done() { find "$folder" -name '*.log' | wc -l; }
count_all() { for way in $ways; do for seed in $seeds; do echo "$way-$seed"; done; done | wc -l; }

# run NAME EVERY arguments...: prints the command that makes NAME.log, unless it is there, with an evaluation
# EVERY updates. The model of a training that was stopped has the other arguments in it. Where the training does not
# come to its end, or would begin after Ctrl-C, 255 keeps xargs from beginning another.
run() {
  name=$1
  every=$2
  shift 2
  [ ! -f "$folder/$name.log" ] || return 0
  [ ! -s "$folder/$name.safetensors" ] || set -- --resume "'$folder/$name.safetensors'"
  printf '%s ' "[ ! -e '$stop' ] || exit 255;" \
    "OMP_NUM_THREADS=1 '$program' --threads 1 --model '$folder/$name.safetensors'" \
    "--csv '$folder/$name.csv' --evaluate-every $every $* >'$folder/$name.part' 2>&1" \
    "&& grep -q '^the model is in ' '$folder/$name.part'" \
    "&& mv '$folder/$name.part' '$folder/$name.log' || exit 255"
  echo
}

# Runs the commands on standard input, two at a time, under a bar.
two_at_a_time() {
  commands=$(mktemp)
  cat >"$commands"
  trap ': >"$stop"' INT
  # In the background a shell keeps Ctrl-C from its programs, but the trainings catch it themselves.
  tr '\n' '\0' <"$commands" | xargs -0 -r -n 1 -P 2 sh -c 2>/dev/null &
  trainings=$!
  while kill -0 "$trainings" 2>/dev/null; do
    { draw_bar "$(count_done)" "$(count_all)" "$(count_done)/$(count_all) trainings" && sleep 1; } || true
  done
  clear_bar
  rm "$commands"
  if wait "$trainings" && [ ! -e "$stop" ]; then return 0; fi
  if [ -e "$stop" ]; then
    echo "interrupted; the same command goes on" >&2
    exit 130
  fi
  # What they say of it.
  for part in "$folder"/*.part; do
    ! grep -H '^pronounce: ' "$part" >&2 || failed=yes
  done
  [ -n "${failed-}" ] || echo "study.sh: a training did not come to its end; $folder/*.part has what it said" >&2
  exit 1
}

# Seconds of training of NAME from update FROM on, and a second's updates.
seconds() {
  awk -F, -v from="$2" '$4 >= from { if (!start) start = $5 + 0; end = $5 }
                        END { printf "%.1f", end - start }' "$folder/$1.csv"
}

# What REINFORCE is worth.
reinforce() {
  ways='start cross_entropy cross_entropy_as_long annealed constant shuffled from_scratch'
  first=16000   # updates of cross-entropy that all but (e) have behind them
  more=3000     # updates after that
  last=$((first + more))
  scratch=8000  # updates of REINFORCE alone: about as long as all of the annealed training

  for seed in $seeds; do
    run "start-$seed" 2000 --seed "$seed" --schedule none --cross-entropy "$first" --updates "$first"
  done | two_at_a_time

  for seed in $seeds; do
    go_on="--resume '$folder/start-$seed.safetensors' --updates $last"
    run "cross_entropy-$seed" 500 "$go_on"
    run "annealed-$seed" 500 "$go_on --schedule alternation"
    run "constant-$seed" 500 "$go_on --schedule alternation --reward constant"
    run "shuffled-$seed" 500 "$go_on --schedule alternation --reward shuffled"
  done | two_at_a_time

  # Cross-entropy for as long as the annealed training took.
  for seed in $seeds; do
    updates=$(awk -v annealed="$(seconds "annealed-$seed" "$first")" \
      -v cross_entropy="$(seconds "cross_entropy-$seed" "$first")" -v first="$first" -v more="$more" \
      'BEGIN { printf "%d", first + more * annealed / cross_entropy }')
    run "cross_entropy_as_long-$seed" 5000 --resume "'$folder/start-$seed.safetensors'" \
      --updates "$updates"
    run "from_scratch-$seed" 1000 --seed "$seed" --cross-entropy 0 --rise 1 --share 1 \
      --late-rate 0.005 --updates "$scratch"
  done | two_at_a_time
}

# What experts are worth: the same multiply-adds a letter, since those of a larger gate are taken from
# the hidden width.
experts() {
  ways='4_of_4 4_of_16 4_of_64'
  for seed in $seeds; do
    alone="--seed $seed --schedule none --cross-entropy 16000 --updates 16000"
    run "4_of_4-$seed" 2000 "$alone --top_k 4 --experts 4 --hidden 47"
    run "4_of_16-$seed" 2000 "$alone --top_k 4 --experts 16 --hidden 44"
    run "4_of_64-$seed" 2000 "$alone --top_k 4 --experts 64 --hidden 32"
  done | two_at_a_time
}

# What REINFORCE is worth in --full, against cross-entropy for as long, with dropout and without.
full() {
  ways='start cross_entropy_as_long without_dropout alternation'
  first=24000  # updates of cross-entropy in --full
  more=8500    # updates after that
  for seed in $seeds; do
    run "start-$seed" 1000 --full --seed "$seed" --schedule none --updates "$first"
  done | two_at_a_time

  for seed in $seeds; do
    run "alternation-$seed" 1000 --resume "'$folder/start-$seed.safetensors'" --schedule alternation \
      --updates "$((first + more))"
  done | two_at_a_time

  for seed in $seeds; do
    # Both rates without their first thousand updates, whose start no row of the CSV has.
    updates=$(awk -v alternation="$(seconds "alternation-$seed" "$((first + 1000))")" \
      -v start="$(seconds "start-$seed" 1000)" -v first="$first" -v more="$more" \
      'BEGIN { print int(first + more * alternation / (more - 1000) * (first - 1000) / start) }')
    go_on="--resume '$folder/start-$seed.safetensors' --updates $updates --late-rate 4e-4"
    run "cross_entropy_as_long-$seed" 5000 "$go_on"
    run "without_dropout-$seed" 5000 "$go_on --dropout 0"
  done | two_at_a_time
}

begin_bar "$(count_done)"
trap ': >"$stop"' INT  # two_at_a_time() ends when the trainings are saved
"$part"
trap - INT

# The last rows of the logs, and their means.
for way in $ways; do
  for seed in $seeds; do
    awk -v way="$way" -v seed="$seed" '
      /^\| (training|validation|test)/ { per[$2] = $6; wer[$2] = $8; first[$2] = $10 }
      /^Error rates in percent after/ { updates = $6; seconds = $8 }
      END { print way, seed, updates, seconds, wer["training"] + 0, wer["validation"], wer["test"],
                  first["test"], per["test"] }' "$folder/$way-$seed.log"
  done
done | awk '
  { n[$1]++; if (n[$1] == 1) order[++ways] = $1
    updates[$1] += $3; seconds[$1] += $4; training[$1] += $5; validation[$1] += $6
    test[$1] += $7; squares[$1] += $7 * $7; first[$1] += $8; per[$1] += $9
    each[$1] = each[$1] (n[$1] > 1 ? " / " : "") $7 }
  END {
    print "| way | updates | seconds | training WER | validation WER | test WER, each seed | mean | deviation | first listed | PER |"
    print "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
    for (i = 1; i <= ways; ++i) {
      w = order[i]; k = n[w]; mean = test[w] / k
      variance = k > 1 ? (squares[w] - k * mean * mean) / (k - 1) : 0
      printf "| %s | %d | %d | %.2f | %.2f | %s | %.2f | %.2f | %.2f | %.2f |\n", w, updates[w] / k,
        seconds[w] / k, training[w] / k, validation[w] / k, each[w], mean,
        sqrt(variance > 0 ? variance : 0), first[w] / k, per[w] / k
    }
  }' | tee "$folder/table.md"
