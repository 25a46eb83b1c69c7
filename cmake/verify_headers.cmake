# Each header is compiled alone, with the developers' settings, as part of every build of the tests: it
# includes what it needs. CMake can do so by itself (VERIFY_INTERFACE_HEADER_SETS), but would parse
# Eigen anew for each of a hundred; here a precompiled header has Eigen. Nothing is instantiated, so
# nothing need be optimised.

set(verified moe moe_io)
if(TARGET moe::mpi)
  list(APPEND verified moe_mpi)
endif()
set(sources)
foreach(target IN LISTS verified)
  get_target_property(headers ${target} HEADER_SET)
  foreach(header IN LISTS headers)
    string(REGEX REPLACE "^.*/include/(moe/.*)$" "\\1" name "${header}")
    set(source "${PROJECT_BINARY_DIR}/headers/${name}.cpp")
    file(CONFIGURE OUTPUT "${source}" CONTENT "#include <@name@>\n" @ONLY)
    list(APPEND sources "${source}")
  endforeach()
endforeach()

add_library(moe_headers OBJECT ${sources})
target_link_libraries(moe_headers PRIVATE moe_developer ${verified})
target_precompile_headers(moe_headers PRIVATE <Eigen/Core>)
# To who uses them our headers are no SYSTEM includes: what the strictest warn of must not be in them.
target_compile_options(moe_headers PRIVATE
  -O0 "$<$<CXX_COMPILER_ID:GNU>:-Wuseless-cast;-Wformat=2>")
