# Each header is compiled alone, with the developers' settings, as part of every build of the tests.
# CMake makes the target for that in moe's folder, and only options of the folder reach it; folders
# that are added after this inherit them.

set_target_properties(moe moe_io PROPERTIES VERIFY_INTERFACE_HEADER_SETS ON)
if(TARGET moe::mpi)
  set_target_properties(moe_mpi PROPERTIES VERIFY_INTERFACE_HEADER_SETS ON)
endif()

# To who uses them our headers are no SYSTEM includes: what the strictest warn of must not be in them.
set(user_warnings "$<$<CXX_COMPILER_ID:GNU>:-Wuseless-cast;-Wformat=2>")
set_directory_properties(PROPERTIES
  COMPILE_OPTIONS "$<TARGET_PROPERTY:moe_developer,INTERFACE_COMPILE_OPTIONS>;${user_warnings}")

add_custom_target(moe_headers ALL DEPENDS moe_verify_interface_header_sets)
