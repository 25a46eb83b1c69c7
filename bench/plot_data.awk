# The lines of rows.awk to the columns that plots.gp draws:
# -v what=machine|layer|shrinking_batch|peers|experts|scale.
BEGIN { FS = "\t" }
{
  split("", field)
  for (i = 3; i <= NF; ++i) field[substr($i, 1, index($i, "=") - 1)] = substr($i, index($i, "=") + 1)
  count = split($1, part, "/")
  split("", argument)
  for (i = 2; i <= count; ++i) {
    at = index(part[i], ":")
    if (at > 0) argument[substr(part[i], 1, at - 1)] = substr(part[i], at + 1)
  }
}
"error" in field { next }
what == "machine" && part[1] == "multiply_add_peak<float>" && argument["threads"] == 1 {
  peak = field["GFLOPs"]
}
what == "machine" && part[1] == "read_bandwidth" && argument["threads"] == 1 {
  bandwidth = field["GBs"]
}
what == "layer" && part[1] == pass {
  series = sprintf("D %d, H %d, E %d", argument["D"], argument["H"], argument["E"])
  if (!(series in points)) order[++series_count] = series
  points[series] = points[series] argument["tokens"] " " field["roofline_fraction"] "\n"
}
what == "shrinking_batch" && part[1] == pass {
  print argument["tokens"], field["peak_fraction"], field["roofline_fraction"]
}
what == "peers" && part[1] == pass {
  cell = "\"E " argument["E"] "\\n" argument["tokens"] "\""
  if (!(cell in cells)) { cells[cell] = 1; order[++cell_count] = cell }
  if (!(part[2] in parties)) { parties[part[2]] = 1; party_order[++party_count] = part[2] }
  fraction[cell, part[2]] = field["roofline_fraction"]
}
what == "experts" && part[1] == pass { print argument["E"], field["ns_per_slot"] }
what == "scale" && part[1] "/" part[2] == pass {
  # The time of a token, and what remains of it without the weights' way from memory.
  print argument["E"], field["ns_per_token"], field["ns_per_token"] * (1 - field["traffic_ms"] / $2)
}
END {
  # Blocks with a title each, two empty lines between them, as gnuplot's index wants them.
  if (what == "machine") {
    printf "machine = \"one core: %.0f GFLOP/s f32, %.1f GB/s read from memory\"\n", peak, bandwidth
  }
  for (i = 1; i <= series_count; ++i) {
    printf "%s\"%s\"\n%s", (i > 1 ? "\n\n" : ""), order[i], points[order[i]]
  }
  if (what == "peers") {
    line = "cell"
    for (p = 1; p <= party_count; ++p) line = line " " party_order[p]
    print line
    for (c = 1; c <= cell_count; ++c) {
      line = order[c]
      for (p = 1; p <= party_count; ++p) {
        f = fraction[order[c], party_order[p]]
        line = line " " (f == "" ? "?" : f)
      }
      print line
    }
  }
}
