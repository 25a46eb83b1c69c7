#!/bin/sh
# Measures how fast the library is: installs what is missing, builds, runs every benchmark, draws
# plots, and prints the tables. Results are in build/bench.
#     sh bench/run.sh [--resume] [--no-peers] [--small-pages] [NAME...]
# With names, those benchmarks only (layer, peers, ...; one a file of this folder). --no-peers does
# without oneDNN and libtorch, whose packages take half a gigabyte. --small-pages leaves memory in
# the pages that the system gives by itself; else all programs use large ones. Ctrl-C ends it; the
# same command with --resume goes on, and leaves out what is measured with this code, build and
# options.
set -eu
trap 'echo; echo "Stopped; with --resume it goes on."; exit 130' INT

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
build="$root/build/release"
out="$root/build/bench"
all='machine layer shrinking_batch few_tokens bfloat16 narrow adapt routing threads exchange experts scale memory peers'

resume=no
peers=ON
hugetlb=1
names=''
for argument in "$@"; do
  case $argument in
    --resume) resume=yes ;;
    --no-peers) peers=OFF ;;
    --small-pages) hugetlb=0 ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
    -*) echo "$0: what is $argument?" >&2; exit 2 ;;
    *)
      [ -f "$root/bench/$argument.cpp" ] || { echo "$0: there is no $argument" >&2; exit 2; }
      names="$names $argument"
      ;;
  esac
done
[ -n "$names" ] || names=$all

settings="peers $peers, hugetlb $hugetlb"
if [ $resume = yes ] && [ "$(cat "$out/settings" 2>/dev/null)" != "$settings" ]; then
  echo "$0: nothing in $out goes on with $settings" >&2
  exit 2
fi
# Before the build, which Ctrl-C may end too.
mkdir -p "$out"
if [ $resume = no ]; then
  for name in $names; do rm -f "$out/$name.json" "$out/$name.tsv"; done
  echo "$settings" >"$out/settings"
fi

if [ $peers = ON ]; then
  echo "Comparing with oneDNN and libtorch, of which apt-get installs what is missing (--no-peers does without)."
  sh "$root/cmake/install_packages.sh" "$root/cmake/debian-packages-bench.txt" \
    "$root/cmake/debian-packages-mpi.txt" "$root/cmake/debian-packages-peers.txt"
else
  sh "$root/cmake/install_packages.sh" "$root/cmake/debian-packages-bench.txt" \
    "$root/cmake/debian-packages-mpi.txt"
fi

echo "Building in $build"
(cd "$root" && cmake --preset release -DMOE_BENCH_PEERS=$peers >/dev/null)
# What each result depends on. Before the build, so that what is changed during it is measured anew.
settings="$settings, $(cd "$root" &&
  find CMakeLists.txt cmake include bench examples/common build/release/CMakeCache.txt -type f -exec cksum {} + | sort | cksum)"
cmake --build "$build" --target benchmarks --parallel "$(getconf _NPROCESSORS_ONLN)"

# bench_exchange runs on two ranks, as root too, and on one core if there is no other.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe

# Where malloc is the GNU C library's, for all parties alike: ours, the peers and the machine's limits.
# What it gives a mapping of its own gets large pages only where it fills them, so matrices of less than
# 32 MiB come from the heap, which keeps what is freed. The last setting counts.
GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=$hugetlb"
export GLIBC_TUNABLES="$GLIBC_TUNABLES:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296"
echo "With GLIBC_TUNABLES=$GLIBC_TUNABLES; the system gives large pages:" \
  "$(cat /sys/kernel/mm/transparent_hugepage/enabled 2>/dev/null || echo unknown)"

for name in $names; do
  if [ $resume = yes ] && [ -f "$out/$name.json" ]; then
    if [ "$(cat "$out/$name.settings" 2>/dev/null)" = "$settings" ]; then
      echo "Measured already: $name"
      continue
    fi
    echo "Measured with other code, another build or other options: $name"
  fi
  rm -f "$out/$name.json" "$out/$name.tsv"
  echo "$settings" >"$out/$name.settings"
  start=$(date +%s)
  printf 'Running %s' "$name"
  launcher=''
  [ "$name" != exchange ] || launcher='mpirun -n 2'
  [ -x "$build/bench/bench_$name" ] || { echo ": not built, there is no MPI"; continue; }
  # Written under another name first, so that a result is a whole one.
  # On a terminal the program draws a bar over this line.
  : >"$out/$name.log"
  errors="$out/$name.log"
  [ ! -t 2 ] || errors=/dev/tty
  # shellcheck disable=SC2086  # several words or none
  $launcher "$build/bench/bench_$name" --benchmark_out="$out/$name.part" --benchmark_out_format=json \
    >>"$out/$name.log" 2>>"$errors" || { echo; cat "$out/$name.log"; exit 1; }
  [ ! -t 2 ] || printf '\rRunning %s' "$name"
  # The JSON comes last: it says that all is there.
  awk -f "$root/bench/rows.awk" "$out/$name.part" >"$out/$name.tsv"
  mv "$out/$name.part" "$out/$name.json"
  echo ": $(($(date +%s) - start)) s"
done

# The plots need four of the results and the machine's.
plotted=no
if command -v gnuplot >/dev/null; then
  plotted=yes
  for name in machine layer shrinking_batch peers experts scale; do
    [ -f "$out/$name.tsv" ] || plotted=no
  done
fi
if [ $plotted = yes ]; then
  data() { awk -v what="$1" -v pass="$2" -f "$root/bench/plot_data.awk" "$out/$1.tsv"; }
  data machine '' >"$out/machine.gp"
  for pass in forward forward_backward; do
    data layer "$pass<float>" >"$out/layer_$pass.dat"
    data experts "$pass" >"$out/experts_$pass.dat"
  done
  for pass in step evaluate; do
    for gate in flat hierarchical; do data scale $pass/$gate >"$out/scale_${pass}_$gate.dat"; done
  done
  for pass in forward step; do
    data shrinking_batch $pass >"$out/shrinking_batch_$pass.dat"
    data peers $pass >"$out/peers_$pass.dat"
  done
  (cd "$out" && gnuplot "$root/bench/plots.gp")
fi

for name in $names; do
  [ -f "$out/$name.tsv" ] || continue
  is_peers=0
  [ "$name" != peers ] || is_peers=1
  printf '\n## %s: %s\n\n' "$name" "$(sed -n '1s,^/// *,,p' "$root/bench/$name.cpp")"
  awk -v peers=$is_peers -f "$root/bench/table.awk" "$out/$name.tsv"
done
printf '\nJSON%s: %s\n' "$([ $plotted = no ] || echo ' and plots')" "$out"
