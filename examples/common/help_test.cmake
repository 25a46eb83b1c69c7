# A program's help fits a screen of 24 lines of 100 characters.
#
#     include(help_test.cmake)
#     moe_add_help_test(target [ALL])     adds the test; with ALL, --help-all is checked too
#     moe_add_script_help_test(script [WORD...])     the same of a script; the words come before --help
#     cmake -DPROGRAM="path[;WORD...]" [-DALL=1] -P help_test.cmake     is the test

if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(moe_help_test "${CMAKE_CURRENT_LIST_FILE}")
  function(moe_add_help_test target)
    set(all 0)
    if("ALL" IN_LIST ARGN)
      set(all 1)
    endif()
    add_test(NAME "help: ${target}" COMMAND ${CMAKE_COMMAND} "-DPROGRAM=$<TARGET_FILE:${target}>"
             -DALL=${all} -P "${moe_help_test}")
    # The programs that begin with MPI are to begin as root too, and LeakSanitizer is to say nothing of MPI.
    set_tests_properties("help: ${target}" PROPERTIES ENVIRONMENT
      "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;ASAN_OPTIONS=detect_leaks=0")
  endfunction()
  function(moe_add_script_help_test script)
    cmake_path(RELATIVE_PATH script BASE_DIRECTORY "${PROJECT_SOURCE_DIR}" OUTPUT_VARIABLE name)
    list(JOIN ARGN " " words)
    string(STRIP "help: ${name} ${words}" name)
    add_test(NAME "${name}" COMMAND ${CMAKE_COMMAND} "-DPROGRAM=sh;${script};${ARGN}" -P "${moe_help_test}")
    set_tests_properties("${name}" PROPERTIES TIMEOUT 30)  # a script that does not know it begins its work
  endfunction()
  return()
endif()

cmake_minimum_required(VERSION 3.25)

# What a program prints for an argument, and how many lines.
function(ask argument text_variable lines_variable)
  execute_process(COMMAND ${PROGRAM} ${argument} OUTPUT_VARIABLE text ERROR_VARIABLE errors
                  RESULT_VARIABLE code)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${argument} ends with ${code}: ${errors}")
  endif()
  string(REPEAT "[^\n]" 101 too_long)
  if(text MATCHES "(${too_long})")
    message(FATAL_ERROR "${argument} has a line of more than 100 characters: ${CMAKE_MATCH_1}...")
  endif()
  string(REGEX REPLACE "[^\n]" "" ends "${text}")
  string(LENGTH "${ends}" lines)
  set(${text_variable} "${text}" PARENT_SCOPE)
  set(${lines_variable} ${lines} PARENT_SCOPE)
endfunction()

ask(--help help lines)
message("${lines} lines")
if(lines LESS 3 OR lines GREATER 24)
  message(FATAL_ERROR "--help has ${lines} lines, and a screen 24:\n${help}")
endif()
if(help MATCHES "\n *(-[^ \n]*{[^ \n]*)")
  message(FATAL_ERROR "--help tells of a flag what it sets: ${CMAKE_MATCH_1}")
endif()
if(ALL)
  ask(--help-all all all_lines)
  if(all_lines LESS lines)
    message(FATAL_ERROR "--help-all has ${all_lines} lines, and --help ${lines}")
  endif()
  # Options begin lines; a flag's has no value behind it.
  foreach(kind IN ITEMS help all)
    string(REGEX MATCHALL "\n  [^ ,]*,?--[^ =,\n]+" options_of_${kind} "${${kind}}")
    list(LENGTH options_of_${kind} count_of_${kind})
  endforeach()
  foreach(option IN LISTS options_of_help)
    if(NOT option IN_LIST options_of_all)
      message(FATAL_ERROR "--help has ${option}, and --help-all has not")
    endif()
  endforeach()
  math(EXPR more "${count_of_all} - ${count_of_help}")
  if(more GREATER 0 AND NOT help MATCHES "\n--help-all lists ${more} more\\.\n")
    message(FATAL_ERROR "--help does not say that --help-all lists ${more} more:\n${help}")
  endif()
endif()
