#!/bin/sh
# Feeds the readers of other people's files with what libFuzzer makes of the corpus, under Address-
# and UndefinedBehaviorSanitizer:
#
#     sh tests/fuzz/run.sh [SECONDS]     (60)
#
# Needs clang and its sanitizers' runtime: sh cmake/install_packages.sh cmake/debian-packages-clang.txt.
# An input that fails is left in build/fuzz; put it into corpus/read or corpus/refused with its fix.
set -eu

cd -- "$(dirname -- "$0")/../.."
seconds=${1:-60}
case $seconds in
  '' | *[!0-9]*)
    echo "usage: $0 [SECONDS]" >&2
    exit 2
    ;;
esac

folder=build/fuzz
mkdir -p "$folder/found"
clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
  -Iinclude -isystem /usr/include/eigen3 tests/fuzz/safetensors.cpp -o "$folder/safetensors"
# What is found goes into the first folder. Keys are in the format's words.
exec "$folder/safetensors" "$folder/found" tests/fuzz/corpus/read tests/fuzz/corpus/refused \
  -dict=tests/fuzz/safetensors.dict -max_total_time="$seconds" -timeout=5 -rss_limit_mb=1024 \
  -max_len=4096 -artifact_prefix="$folder/" -print_final_stats=1 -verbosity=0
