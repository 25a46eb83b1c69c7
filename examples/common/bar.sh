# shellcheck shell=sh
# A bar for scripts, as ProgressBar of terminal.hpp draws it for programs; to be sourced. Nothing is
# drawn where standard error is no terminal.
#
#     begin_bar [FIRST]            FIRST is what was done before, in no time
#     draw_bar DONE TOTAL TEXT     DONE of TOTAL, with the time that is left once more than FIRST is done
#     clear_bar

begin_bar() {
  bar_first=${1:-0}
  bar_start=$(date +%s)
}

draw_bar() {
  [ -t 2 ] || return 0
  awk -v done="$1" -v total="$2" -v text="$3" -v first="$bar_first" \
    -v seconds=$(($(date +%s) - bar_start)) '
    BEGIN {
      full = int(24 * done / total)
      for (i = 1; i <= 24; ++i) bar = bar (i <= full ? "#" : ".")
      if (done > first) {
        left = int(seconds / (done - first) * (total - done) + 0.5)
        if (left < 3600) left = sprintf("%d:%02d left  ", left / 60, left % 60)
        else left = sprintf("%d:%02d:%02d left  ", left / 3600, left / 60 % 60, left % 60)
      }
      printf "\r[%s] %s%s\033[K", bar, left, text
    }' >&2
}

clear_bar() { [ ! -t 2 ] || printf '\r\033[K' >&2; }
