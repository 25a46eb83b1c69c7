include(CMakeFindDependencyMacro)
find_dependency(moe 0.2 CONFIG COMPONENTS ${thing_FIND_COMPONENTS})
include("${CMAKE_CURRENT_LIST_DIR}/thing-targets.cmake")
