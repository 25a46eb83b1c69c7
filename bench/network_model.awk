# What the exchange would take on a network, from what bench_exchange measured on one machine:
#
#     awk -f bench/network_model.awk build/bench/exchange.tsv
#
# A step of a rank with T tokens, S = T·K slots and R ranks:
#
#     arithmetic   measured with 1 rank; `cores` times faster where a rank has so many
#     exchange     4 all-to-alls (x and y, dy and dx), each with (R - 1)/R of the S rows of D floats
#                  through the rank's own link, and R - 1 messages; 6 small collectives, each
#                  up and down a tree: 4·(S·(R - 1)/R·D·4 bytes / bandwidth + (R - 1)·latency)
#                  + 6·2·log2(R)·latency
#
# Nothing overlaps in it, and links are not shared. The gate's gradients are a column of their own: of a
# flat gate with 8 experts a rank, 2 matrices of D x 8·R, summed on one rank and sent to all in pieces,
# twice their bytes. `H where equal` is the hidden width at which arithmetic and exchange take the same
# time: the one is in proportion to it, the other does not know it.
BEGIN {
  FS = "\t"
  K = 2
  split("1 32", cores, " ")
  split("1.25e9 12.5e9", bandwidths, " ")
  split("20e-6 2e-6", latencies, " ")
  split("10 Gbit/s, 20 us|100 Gbit/s, 2 us", networks, "|")
  split("2 8 64 1024", counts, " ")
}
$1 ~ /^step\/.*ranks:1$/ {
  split($1, parts, "/")
  T = substr(parts[2], 3) + 0
  D = substr(parts[3], 3) + 0
  H = substr(parts[4], 3) + 0
  if (H < 512) next
  if (!heads++) {
    print "| D | H | cores a rank | network | ranks | arithmetic ms | exchange ms | share of exchange | H where equal | gate gradients ms |"
    print "| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
  }
  for (c = 1; c <= 2; ++c) for (n = 1; n <= 2; ++n) for (r = 1; r <= 4; ++r) {
    R = counts[r]
    arithmetic = $2 * 1e-3 / cores[c]
    exchange = 4 * (T * K * (R - 1) / R * D * 4 / bandwidths[n] + (R - 1) * latencies[n]) \
      + 6 * 2 * log(R) / log(2) * latencies[n]
    gate = 2 * (2 * D * 8 * R * 4) / bandwidths[n]
    printf "| %d | %d | %d | %s | %d | %.1f | %.1f | %.2f | %.0f | %.1f |\n", D, H, cores[c], networks[n],
      R, arithmetic * 1e3, exchange * 1e3, exchange / (arithmetic + exchange),
      H * exchange / arithmetic, gate * 1e3
  }
}
