# The lines of rows.awk to a Markdown table. Of peers.json, one line a cell and a column a peer.
function number(text, precision) { return sprintf("%." precision "f", text) }
function format(key, text) {
  if (text == "") return ""
  if (key ~ /^(GFLOPs|GBs|ns_per|us_per|percent|layer_ms)/) return number(text, 1)
  if (key ~ /MiB$|^used|^float$/) return number(text, 0)
  return number(text, 2)
}
function header(key) {
  if (key == "GFLOPs") return "GFLOP/s"
  if (key == "GBs") return "GB/s"
  gsub(/_/, " ", key)
  return key
}
# "forward/moe/tokens:4/E:8" -> party "moe", cell "forward tokens:4 E:8"
function pivot(    parts, cell, party) {
  split($1, parts, "/")
  party = parts[2]
  cell = parts[1] " | " substr(parts[3], 8) " | " substr(parts[4], 3)
  if (!(cell in cells)) { cells[cell] = 1; cell_order[++cell_count] = cell }
  if (!(party in parties)) { parties[party] = 1; party_order[++party_count] = party }
  if ("error" in field) { ratio[cell, party] = "failed"; return }
  time[cell, party] = $2
  ratio[cell, party] = field["peer_ratio"]
  roofline[cell, party] = field["roofline_fraction"]
}
BEGIN { FS = "\t" }
{
  split("", field)
  for (i = 3; i <= NF; ++i) {
    at = index($i, "=")
    key = substr($i, 1, at - 1)
    field[key] = substr($i, at + 1)
    if (!peers && key != "error" && !(key in known)) { known[key] = 1; keys[++key_count] = key }
  }
  if (peers) { pivot(); next }
  name[NR] = $1
  ms[NR] = $2
  for (key in field) cell_value[NR, key] = field[key]
}
END {
  if (peers) {
    line = "| pass | tokens an expert | E | moe ms | moe roofline |"
    rule = "| --- | ---: | ---: | ---: | ---: |"
    for (p = 2; p <= party_count; ++p) {
      line = line " " party_order[p] " |"
      rule = rule " ---: |"
    }
    print line " fastest peer over moe |\n" rule " ---: |"
    for (c = 1; c <= cell_count; ++c) {
      cell = cell_order[c]
      line = "| " cell " | " number(time[cell, "moe"], 1) " | " number(roofline[cell, "moe"], 2) " |"
      for (p = 2; p <= party_count; ++p) {
        party = party_order[p]
        r = ratio[cell, party]
        line = line " " (r == "failed" ? r \
          : number(r, 2) " x (" number(roofline[cell, party], 2) ")") " |"
      }
      fastest = ratio[cell, "moe"]
      line = line " " number(fastest, 2) " x" (fastest < 1 ? " behind" : "") " |"
      print line
    }
    print "\nOf a peer: its time over moe's, and its share of the roofline."
    exit
  }
  # The roofline first, the rest as they come.
  line = "| row | ms |"
  rule = "| --- | ---: |"
  if ("roofline_fraction" in known) { line = line " roofline |"; rule = rule " ---: |" }
  for (k = 1; k <= key_count; ++k) {
    if (keys[k] == "roofline_fraction") continue
    line = line " " header(keys[k]) " |"
    rule = rule " ---: |"
  }
  print line "\n" rule
  for (r = 1; r <= NR; ++r) {
    row = name[r]
    gsub(/\//, " ", row)
    if ((r, "error") in cell_value) { print "| " row " | " cell_value[r, "error"] " |"; continue }
    line = "| " row " | " number(ms[r], ms[r] < 10 ? 2 : 1) " |"
    if ("roofline_fraction" in known) {
      line = line " " format("roofline_fraction", cell_value[r, "roofline_fraction"]) " |"
    }
    for (k = 1; k <= key_count; ++k) {
      if (keys[k] != "roofline_fraction") line = line " " format(keys[k], cell_value[r, keys[k]]) " |"
    }
    print line
  }
}
