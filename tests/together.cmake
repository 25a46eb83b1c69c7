# moe_compile_together(VARIABLE SOURCE...): puts tests of up to 8000 lines in all into one generated source file, each
# in a namespace of its own, and the list of these files into the variable. A test that grows may move others into the
# next file. They instantiate the same templates, and g++ does so anew in each file for what the functions of a
# precompiled header call. With -DMOE_TEST_TOGETHER=OFF each is compiled alone, which is faster for who changes one of
# them. A compiler takes half a gigabyte for a thousand lines: where there is less than 6 GB a processor, files have up
# to 4000 lines.

option(MOE_TEST_TOGETHER "Compile several files of tests as one" ON)

function(moe_compile_together variable)
  if(NOT MOE_TEST_TOGETHER)
    set(${variable} ${ARGN} PARENT_SCOPE)
    return()
  endif()

  cmake_host_system_information(RESULT megabytes QUERY TOTAL_PHYSICAL_MEMORY)
  cmake_host_system_information(RESULT processors QUERY NUMBER_OF_LOGICAL_CORES)
  math(EXPR megabytes "${megabytes} / ${processors}")
  if(megabytes LESS 6000)
    set(most_lines 4000)
  else()
    set(most_lines 8000)
  endif()

  # One folder's sources next to each other; in the order of names a folder within is between them.
  set(folders)
  foreach(source IN LISTS ARGN)
    cmake_path(GET source PARENT_PATH folder)
    list(APPEND folders "${folder}|")  # so that an empty name, that of the folder itself, is not lost
    list(APPEND sources_in_${folder}| "${source}")
  endforeach()
  list(REMOVE_DUPLICATES folders)
  set(sources)
  foreach(folder IN LISTS folders)
    list(APPEND sources ${sources_in_${folder}})
  endforeach()

  set(files)
  set(count ${most_lines})
  foreach(source IN LISTS sources)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")
    cmake_path(ABSOLUTE_PATH source)
    cmake_path(GET source PARENT_PATH folder)
    cmake_path(GET source STEM name)
    file(READ "${source}" text)
    string(REGEX MATCHALL "\n" text "${text}")
    list(LENGTH text lines)
    math(EXPR count "${count} + ${lines}")
    if(count GREATER most_lines)
      cmake_path(RELATIVE_PATH folder BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}" OUTPUT_VARIABLE file)
      set(file "${CMAKE_CURRENT_BINARY_DIR}/together/${file}/${name}.cpp")
      list(APPEND files "${file}")
      list(LENGTH files index)
      set(includes_${index})
      set(tests_${index})
      set(count ${lines})
    endif()

    # In a namespace nothing may be included that was not included before it.
    file(STRINGS "${source}" lines REGEX "^#include (<.*>|\".*\\.hpp\")")
    foreach(line IN LISTS lines)
      string(REGEX REPLACE "^#include \"(.*)\"$" "\\1" path "${line}")
      cmake_path(ABSOLUTE_PATH path BASE_DIRECTORY "${folder}" NORMALIZE)
      if(EXISTS "${path}")
        set(line "#include \"${path}\"")
      endif()
      list(APPEND includes_${index} "${line}\n")
    endforeach()
    cmake_path(RELATIVE_PATH source BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}" OUTPUT_VARIABLE space)
    string(MAKE_C_IDENTIFIER "of_${space}" space)
    string(APPEND tests_${index} "\nnamespace ${space} {\n#include \"${source}\"\n}\n")
  endforeach()

  set(index 0)
  foreach(file IN LISTS files)
    math(EXPR index "${index} + 1")
    list(REMOVE_DUPLICATES includes_${index})
    list(JOIN includes_${index} "" includes)
    file(CONFIGURE OUTPUT "${file}" CONTENT "${includes}${tests_${index}}" @ONLY)
  endforeach()
  set(${variable} ${files} PARENT_SCOPE)
endfunction()
