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
# Three seeds; two trainings at a time, a thread each. A training that is in the folder already is not
# run again, so a study that was stopped goes on where it was.
set -eu

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

sh "$root/cmake/install_packages.sh"
(cd "$root" && cmake --preset release >/dev/null)
cmake --build "$root/build/release" --target pronounce --parallel "$(getconf _NPROCESSORS_ONLN)"
program="$root/build/release/examples/pronounce/pronounce"

seeds='1 2 3'

# run NAME arguments...: prints the command that makes NAME.log, unless it is there.
run() {
  name=$1
  shift
  [ -f "$folder/$name.log" ] ||
    printf '%s\n' "OMP_NUM_THREADS=1 '$program' --threads 1 --model '$folder/$name.safetensors' \
--csv '$folder/$name.csv' $* >'$folder/$name.part' && mv '$folder/$name.part' '$folder/$name.log'"
}

# Runs the commands on standard input, two at a time.
two_at_a_time() {
  tr '\n' '\0' | xargs -0 -r -n 1 -P 2 sh -c
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
    run "start-$seed" --seed "$seed" --schedule none --cross-entropy "$first" \
      --updates "$first" --evaluate-every 2000
  done | two_at_a_time

  for seed in $seeds; do
    go_on="--resume '$folder/start-$seed.safetensors' --updates $last --evaluate-every 500"
    run "cross_entropy-$seed" "$go_on"
    run "annealed-$seed" "$go_on --schedule alternation"
    run "constant-$seed" "$go_on --schedule alternation --reward constant"
    run "shuffled-$seed" "$go_on --schedule alternation --reward shuffled"
  done | two_at_a_time

  # Cross-entropy for as long as the annealed training took.
  for seed in $seeds; do
    updates=$(awk -v annealed="$(seconds "annealed-$seed" "$first")" \
      -v cross_entropy="$(seconds "cross_entropy-$seed" "$first")" -v first="$first" -v more="$more" \
      'BEGIN { printf "%d", first + more * annealed / cross_entropy }')
    run "cross_entropy_as_long-$seed" --resume "'$folder/start-$seed.safetensors'" \
      --updates "$updates" --evaluate-every 5000
    run "from_scratch-$seed" --seed "$seed" --cross-entropy 0 --rise 1 --share 1 \
      --late-rate 0.005 --updates "$scratch" --evaluate-every 1000
  done | two_at_a_time
}

# What experts are worth: the same multiply-adds a letter, since those of a larger gate are taken from
# the hidden width.
experts() {
  ways='4_of_4 4_of_16 4_of_64'
  for seed in $seeds; do
    alone="--seed $seed --schedule none --cross-entropy 16000 --updates 16000 --evaluate-every 2000"
    run "4_of_4-$seed" "$alone --top_k 4 --experts 4 --hidden 47"
    run "4_of_16-$seed" "$alone --top_k 4 --experts 16 --hidden 44"
    run "4_of_64-$seed" "$alone --top_k 4 --experts 64 --hidden 32"
  done | two_at_a_time
}

# What REINFORCE is worth in --full, against cross-entropy for as long, with dropout and without.
full() {
  ways='start cross_entropy_as_long without_dropout alternation'
  first=24000  # updates of cross-entropy in --full
  more=8500    # updates after that
  for seed in $seeds; do
    run "start-$seed" --full --seed "$seed" --schedule none --updates "$first"
  done | two_at_a_time

  for seed in $seeds; do
    run "alternation-$seed" --resume "'$folder/start-$seed.safetensors'" --schedule alternation \
      --updates "$((first + more))"
  done | two_at_a_time

  for seed in $seeds; do
    # Both rates without their first thousand updates, whose start no row of the CSV has.
    updates=$(awk -v alternation="$(seconds "alternation-$seed" "$((first + 1000))")" \
      -v start="$(seconds "start-$seed" 1000)" -v first="$first" -v more="$more" \
      'BEGIN { print int(first + more * alternation / (more - 1000) * (first - 1000) / start) }')
    go_on="--resume '$folder/start-$seed.safetensors' --updates $updates --evaluate-every 5000 \
--late-rate 4e-4"
    run "cross_entropy_as_long-$seed" "$go_on"
    run "without_dropout-$seed" "$go_on --dropout 0"
  done | two_at_a_time
}

"$part"

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
