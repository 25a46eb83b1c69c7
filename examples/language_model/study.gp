# Draws what `language_model --study FOLDER` has found out; run it in FOLDER:
#
#     gnuplot .../examples/language_model/study.gp
set encoding utf8
set border 3 lc rgb "#808080"
set tics nomirror textcolor rgb "#303030"
set grid ytics lc rgb "#e0e0e0" lt 1
set terminal svg size 900,520 font "Sans,14" enhanced background "#ffffff"

set linetype 1 lc rgb "#0072b2" lw 2 pt 7
set linetype 2 lc rgb "#d55e00" lw 2 pt 5
set linetype 3 lc rgb "#009e73" lw 2 pt 9
set linetype 4 lc rgb "#cc79a7" lw 2 pt 13
set linetype 5 lc rgb "#7f7f7f" lw 2 pt 11

# The lines of a .dat file: row of the table, label, experts, seed, perplexity, CV(importance),
# CV(load), max/mean.

# Whether a table was made.
made(name) = system(sprintf("test -e %s && echo 1 || echo 0", name)) + 0
# Powers of two, and those without experts, or one.
set logscale x 2
set xtics ("no experts, or one" 1, "4" 4, "16" 16, "64" 64, "256" 256, "1024" 1024, "4096" 4096)
set xlabel "experts"
set ylabel "test perplexity"
set key outside right center vertical noenhanced
set offsets 0, 0, graph 0.05, graph 0.05

# ---- Perplexity over experts: a point for every seed, a line through the means.
if (made("experts.dat")) {
  set output "experts.svg"
  set title "Test perplexity at equal operations, every seed"
  set xrange [0.7:5800]
  stats "experts.dat" using 0 nooutput
  blocks = STATS_blocks
  plot for [i=0:blocks-1] "experts.dat" index i using 3:5 smooth unique with lines lt i+1 lw 1 notitle, \
       for [i=0:blocks-1] "experts.dat" index i using ($3 == 1 ? 0.85 * 1.18**i : $3):5 with points lt i+1 ps 0.8 title columnheader(1)
}

# ---- The same for three lengths of training.
if (made("scaling.dat")) {
  set output "scaling.svg"
  set title "When more experts pay: test perplexity at equal operations"
  set xrange [3.4:1200]
  stats "scaling.dat" using 0 nooutput
  blocks = STATS_blocks
  plot for [i=0:blocks-1] "scaling.dat" index i using 3:5 smooth unique with lines lt i+1 lw 1 notitle, \
       for [i=0:blocks-1] "scaling.dat" index i using 3:5 with points lt i+1 ps 0.8 title columnheader(1)
}
unset logscale x

# ---- Balance and perplexity over the loss weights.
if (made("loss_weights.dat")) {
  set output "loss_weights.svg"
  set title "Balance of 64 experts on the test part, every seed, and perplexity"
  set xrange [-0.5:5.5]
  set xtics autofreq
  set xlabel "w_{importance}, w_{load}"
  set ylabel "coefficient of variation"
  set logscale y
  set offsets 0, 0, 0, 0
  set y2label "test perplexity"
  set y2tics
  set border 11
  plot "loss_weights.dat" using ($1-0.1):6:xtic(2) with points lt 1 ps 0.8 title "CV(importance)", \
       "loss_weights.dat" using 1:7 with points lt 2 ps 0.8 title "CV(load)", \
       "loss_weights.dat" using ($1+0.1):5 axes x1y2 with points lt 5 ps 0.8 title "perplexity (right)"
}
