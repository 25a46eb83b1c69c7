# Writes each C++ block of a Markdown document into a file of its own, FOLDER/NAME_N.inc, and prints
# their names:
#
#     awk -v folder=FOLDER -v name=NAME -f extract.awk DOCUMENT.md
/^```cpp$/ {
  block = name "_" ++blocks ".inc"
  print block
  printf "" >(folder "/" block)
  next
}
/^[ \t]+```cpp|^```(c\+\+|C\+\+|cxx|hpp)/ {
  print "extract.awk: line " NR " begins a block that is not looked at" >"/dev/stderr"
  exit 1
}
/^```$/ {
  if (block != "") close(folder "/" block)
  block = ""
  next
}
block != "" { print >(folder "/" block) }
