# Included in a scope: what is added in it is parsed, and its templates are instantiated, so that most warnings of the
# front end are seen (not -Wunused-function and -Wreturn-type, which clang gives), but no code is made and nothing
# linked. An empty file stands for each output.

set(CMAKE_CXX_COMPILE_OBJECT
    "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -fsyntax-only -c <SOURCE>" "${CMAKE_COMMAND} -E touch <OBJECT>")
foreach(rule LINK_EXECUTABLE CREATE_SHARED_LIBRARY CREATE_SHARED_MODULE)
  set(CMAKE_CXX_${rule} "${CMAKE_COMMAND} -E touch <TARGET>")
endforeach()
# There would be none.
set(CMAKE_DISABLE_PRECOMPILE_HEADERS ON)
