# Draws the validation perplexity of a training over its updates, from the program's CSV file:
#
#     gnuplot -e "csv='language_model.csv'" .../examples/language_model/curves.gp      (curves.svg)
set datafile separator ","
set border 3 lc rgb "#808080"
set tics nomirror textcolor rgb "#303030"
set grid ytics lc rgb "#e0e0e0" lt 1
set terminal svg size 900,420 font "Sans,14" enhanced background "#ffffff"
set output "curves.svg"
set linetype 1 lc rgb "#7f7f7f" lw 2 pt 7
set linetype 2 lc rgb "#0072b2" lw 2 pt 9
set linetype 3 lc rgb "#d55e00" lw 2 pt 5
set title "Perplexity a character on the validation part, equal operations"
set xlabel "million characters read"
set ylabel "perplexity"
set key top right noenhanced
rows(model) = sprintf("< grep '^validation,%s,' '%s'", model, csv)
there(model) = system(sprintf("grep -c '^validation,%s,' '%s' || true", model, csv)) > 0
models = ""
do for [model in "dense hierarchical sparse"] {
  if (there(model)) { models = models." ".model }
}
plot for [i=1:words(models)] rows(word(models, i)) using ($4/1e6):7 with linespoints lt i title word(models, i)
