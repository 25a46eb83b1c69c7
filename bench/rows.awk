# Google Benchmark's JSON to lines: name, milliseconds, then key=value, separated by tabs. A row that
# failed has error=<message>.
function value(line) {
  sub(/^[^:]*: */, "", line)
  sub(/,$/, "", line)
  gsub(/^"|"$/, "", line)
  return line
}
/^ *"benchmarks": *\[/ { inside = 1; next }
!inside { next }
/^ *\{/ { name = ""; extra = ""; failed = 0; next }
/^ *"[^"]*": / {
  key = $1
  gsub(/[":]/, "", key)
  if (key == "name") {
    name = value($0)
    sub(/\/iterations:1/, "", name)
    sub(/\/manual_time/, "", name)
    sub(/\/real_time/, "", name)
  } else if (key == "real_time") {
    time = value($0)
  } else if (key == "time_unit") {
    unit = value($0)
    time *= unit == "ns" ? 1e-6 : unit == "us" ? 1e-3 : unit == "s" ? 1e3 : 1
  } else if (key == "error_message") {
    extra = extra "\terror=" value($0)
  } else if (key !~ /^(family_index|per_family_instance_index|run_name|run_type|repetitions|repetition_index|threads|iterations|cpu_time|error_occurred)$/) {
    extra = extra "\t" key "=" value($0)
  }
  next
}
/^ *\}/ { if (name != "") printf "%s\t%s%s\n", name, time, extra; name = "" }
