# Draws what run.sh measured; run in the folder with machine.gp and the .dat files.
load "machine.gp"
set datafile missing "?"
set encoding utf8
set border 3 lc rgb "#808080"
set tics nomirror textcolor rgb "#303030"
set grid ytics lc rgb "#e0e0e0" lt 1

set linetype 1 lc rgb "#0072b2" lw 2.5 pt 7
set linetype 2 lc rgb "#d55e00" lw 2.5 pt 5
set linetype 3 lc rgb "#009e73" lw 2.5 pt 9
set linetype 4 lc rgb "#cc79a7" lw 2.5 pt 13
set linetype 5 lc rgb "#7f7f7f" lw 2.5 pt 11

# ---- The whole layer over tokens an expert.
set terminal pngcairo size 1200,560 font "Sans,12" enhanced
set output "layer.png"
set multiplot layout 1,2 title "Share of the roofline, whole layer, f32, {/*0.85 ".machine."}" font ",15" offset 0,-0.3 \
  margins 0.07,0.985,0.25,0.84 spacing 0.07
set logscale x 2
set xrange [3:700]
set xtics (4, 8, 32, 128, 512)
set yrange [0:1.05]
set ytics 0.2
set xlabel "tokens an expert, on average"
set ylabel "fraction of the roofline"
set key at screen 0.5,0.03 center bottom horizontal maxrows 1 width 1 samplen 2 noenhanced
set title "forward"
stats "layer_forward.dat" using 0 nooutput
plot for [i=0:STATS_blocks-1] "layer_forward.dat" index i using 1:2 with linespoints lt i+1 title columnheader(1)
unset key
unset ylabel
set title "forward + backward"
plot for [i=0:STATS_blocks-1] "layer_forward_backward.dat" index i using 1:2 with linespoints lt i+1 title columnheader(1)
unset multiplot

# ---- The shrinking batch.
set terminal pngcairo size 900,560 font "Sans,12" enhanced
set output "shrinking_batch.png"
set lmargin 9
set bmargin 6
set title "The shrinking batch, D 512, H 1024, 32 experts, f32\n{/*0.85 ".machine."}" font ",15"
set xrange [0.8:320]
set xtics (1, 2, 4, 8, 16, 32, 64, 128, 256)
set xlabel "tokens an expert"
set ylabel "fraction"
set key at screen 0.5,0.02 center bottom horizontal maxrows 2 width 2
plot "shrinking_batch_forward.dat" using 1:2 with linespoints lt 1 title "forward, of the peak", \
     "shrinking_batch_forward.dat" using 1:3 with linespoints lt 1 dt 2 title "of the roofline", \
     "shrinking_batch_step.dat" using 1:2 with linespoints lt 2 title "step, of the peak", \
     "shrinking_batch_step.dat" using 1:3 with linespoints lt 2 dt 2 title "of the roofline"
unset logscale x
unset lmargin
unset bmargin
unset title

# ---- The peers.
set terminal pngcairo size 1200,800 font "Sans,12" enhanced
set output "peers.png"
set multiplot layout 2,1 title "Share of the roofline, same work by each library, f32, {/*0.85 ".machine."}" font ",15" offset 0,-0.2 \
  margins 0.075,0.985,0.17,0.89 spacing 0.13
set style data histograms
set style histogram clustered gap 1.5
set style fill solid 0.9 noborder
set boxwidth 0.92
set xrange [*:*]
set xtics autofreq scale 0
set yrange [0:1.05]
unset xlabel
set ylabel "fraction of the roofline"
set title "forward" offset 0,-0.6
unset key
columns = int(system("awk 'NR == 1 { print NF }' peers_forward.dat"))
plot for [i=2:columns] "peers_forward.dat" using i:xtic(1) lt i-1 title columnheader(i)
set title "step: gradients cleared, forward, backward" offset 0,-0.6
set xlabel "experts E, and below tokens an expert" offset 0,-0.9
set key at screen 0.5,0.015 center bottom horizontal maxrows 1 width 2 samplen 1.5 noenhanced
plot for [i=2:columns] "peers_step.dat" using i:xtic(1) lt i-1 title columnheader(i)
unset multiplot

# ---- Many experts.
reset
set encoding utf8
set terminal pngcairo size 900,560 font "Sans,12" enhanced
set output "experts.png"
set border 3 lc rgb "#808080"
set tics nomirror textcolor rgb "#303030"
set grid ytics lc rgb "#e0e0e0" lt 1
set lmargin 9
set bmargin 6
set title "Time of a slot, 32 slots an expert, D 256, H 512, f32\n{/*0.85 ".machine."}" font ",15"
set logscale x 2
set xrange [6:6000]
set xtics (8, 64, 512, 4096)
set yrange [0:*]
set xlabel "experts E"
set ylabel "microseconds a slot"
set key at screen 0.5,0.02 center bottom horizontal maxrows 1 width 2
plot "experts_forward.dat" using 1:($2/1000) with linespoints lt 1 lw 2.5 pt 7 lc rgb "#0072b2" title "forward", \
     "experts_forward_backward.dat" using 1:($2/1000) with linespoints lt 2 lw 2.5 pt 5 lc rgb "#d55e00" title "forward + backward"

# ---- As many slots over ever more experts.
set linetype 1 lc rgb "#0072b2" lw 2.5 pt 7
set linetype 2 lc rgb "#d55e00" lw 2.5 pt 5
set linetype 3 lc rgb "#009e73" lw 2.5 pt 9
set linetype 4 lc rgb "#cc79a7" lw 2.5 pt 13
set output "scale.png"
set title "Time of a token, 32,768 slots whatever E, 4 a token, D 64, H 128, f32\n{/*0.85 ".machine."}" font ",15"
set xrange [24:180000]
set xtics ("32" 32, "256" 256, "1k" 1024, "4k" 4096, "16k" 16384, "64k" 65536, "128k" 131072)
set logscale y 10
set yrange [*:*]
set xlabel "experts E (broken lines: without the time that memory takes for the weights in use)" offset 0,0.3
set ylabel "microseconds a token"
set bmargin 7
names = "step_hierarchical step_flat evaluate_hierarchical evaluate_flat"
titles = "'step, hierarchical' 'step, flat' 'evaluate, hierarchical' 'evaluate, flat'"
plot for [i=1:4] "scale_".word(names, i).".dat" using 1:($2/1000) with linespoints lt i title word(titles, i), \
     for [i=1:4] "scale_".word(names, i).".dat" using 1:($3/1000) with lines lt i lw 1.5 dt 2 notitle
