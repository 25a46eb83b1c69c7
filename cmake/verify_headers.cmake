# Each header is compiled alone, with the developers' settings, as part of every build of the tests: it
# includes what it needs. CMake can do so by itself (VERIFY_INTERFACE_HEADER_SETS), but would parse
# Eigen anew for each of a hundred; here a precompiled header has Eigen. Nothing is instantiated, so
# nothing need be optimised.

# Those of io/ have the header of nlohmann-json from a precompiled one too, since most of them include it.

function(moe_verify_headers name verified)
  set(sources)
  foreach(target IN LISTS verified)
    get_target_property(headers ${target} HEADER_SET)
    foreach(header IN LISTS headers)
      string(REGEX REPLACE "^.*/include/(moe/.*)$" "\\1" header "${header}")
      set(source "${PROJECT_BINARY_DIR}/headers/${header}.cpp")
      file(CONFIGURE OUTPUT "${source}" CONTENT "#include <@header@>\n" @ONLY)
      list(APPEND sources "${source}")
    endforeach()
  endforeach()

  add_library(${name} OBJECT ${sources})
  target_link_libraries(${name} PRIVATE moe_developer ${verified})
  target_precompile_headers(${name} PRIVATE <Eigen/Core> ${ARGN})
  # To who uses them our headers are no SYSTEM includes: what the strictest warn of must not be in them.
  target_compile_options(${name} PRIVATE
    -O0 "$<$<CXX_COMPILER_ID:GNU>:-Wuseless-cast;-Wformat=2>")
endfunction()

set(verified moe)
if(TARGET moe::mpi)
  list(APPEND verified moe_mpi)
endif()
moe_verify_headers(moe_headers "${verified}")
moe_verify_headers(moe_io_headers moe_io <nlohmann/json.hpp>)
