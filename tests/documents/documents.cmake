# The C++ blocks of the README and of docs/, as NAME_N.inc in documents/ of the build tree, which
# documents_test.cpp, mpi/documents_test.cpp and the README's program include. CMake stops at a block that
# none of them includes.

# A block that did not change keeps its file, so that who includes it is not compiled again.
set(folder "${CMAKE_CURRENT_BINARY_DIR}/documents")
set(fresh "${CMAKE_CURRENT_BINARY_DIR}/documents.fresh")
file(REMOVE_RECURSE "${fresh}")
file(MAKE_DIRECTORY "${folder}" "${fresh}")
file(GLOB stale RELATIVE "${folder}" "${folder}/*.inc")
file(GLOB documents CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/README.md" "${PROJECT_SOURCE_DIR}/docs/*.md")
set(users)
foreach(test documents_test.cpp ../mpi/documents_test.cpp)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/${test}")
  file(READ "${CMAKE_CURRENT_LIST_DIR}/${test}" text)
  string(APPEND users "${text}")
endforeach()
foreach(document IN LISTS documents)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${document}")
  cmake_path(GET document STEM name)
  string(TOLOWER "${name}" name)
  execute_process(
    COMMAND awk -v "folder=${fresh}" -v "name=${name}" -f "${CMAKE_CURRENT_LIST_DIR}/extract.awk" "${document}"
    OUTPUT_VARIABLE blocks OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" blocks "${blocks}")
  foreach(block IN LISTS blocks)
    string(FIND "${users}" "\n#include \"${block}\"" place)
    if(place LESS 0 AND NOT block STREQUAL "readme_1.inc")
      message(FATAL_ERROR "No test includes ${block}, a block of ${document}")
    endif()
    file(COPY_FILE "${fresh}/${block}" "${folder}/${block}" ONLY_IF_DIFFERENT)
    list(REMOVE_ITEM stale "${block}")
  endforeach()
endforeach()
foreach(block IN LISTS stale)
  file(REMOVE "${folder}/${block}")
endforeach()
file(REMOVE_RECURSE "${fresh}")

# The first block of the README is a whole program.
file(CONFIGURE OUTPUT "${folder}/readme_program.cpp" CONTENT "#include \"readme_1.inc\"\n")
add_executable(moe_readme_program "${folder}/readme_program.cpp")
target_link_libraries(moe_readme_program PRIVATE moe_developer moe_tests_compiled)
if(MOE_TESTS_RUN_HERE)
  add_test(NAME "documents: the README's program learns" COMMAND moe_readme_program)
  set_tests_properties("documents: the README's program learns" PROPERTIES
    PASS_REGULAR_EXPRESSION "^[0-9]\\.[0-9]+\n[0-9]\\.[0-9]+\n[0-9]\\.[0-9]+\n0\\.[0-4][0-9]+\n$")
endif()
