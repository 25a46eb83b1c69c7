include(CMakePackageConfigHelpers)

# Within another project the folders are that one's, without twenty cache entries more.
if(PROJECT_IS_TOP_LEVEL)
  include(GNUInstallDirs)
endif()
if(NOT CMAKE_INSTALL_INCLUDEDIR)
  set(CMAKE_INSTALL_INCLUDEDIR include)
endif()
if(NOT CMAKE_INSTALL_DATADIR)
  set(CMAKE_INSTALL_DATADIR share)
endif()
set(package_folder "${CMAKE_INSTALL_DATADIR}/cmake/moe")

# An export a component, since moe-config.cmake includes those alone whose dependencies are found.
# The headers of all are installed, whatever was found here. A project around this one may export
# its libraries to its build tree too.
foreach(component "" -io -mpi)
  string(REPLACE - _ target "moe${component}")
  install(TARGETS ${target} EXPORT moe${component}-targets
          FILE_SET HEADERS
          INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
  install(EXPORT moe${component}-targets NAMESPACE moe:: DESTINATION "${package_folder}")
  export(EXPORT moe${component}-targets NAMESPACE moe::
         FILE "${PROJECT_BINARY_DIR}/moe${component}-targets.cmake")
endforeach()

configure_package_config_file(cmake/moe-config.cmake.in "${PROJECT_BINARY_DIR}/moe-config.cmake"
                              INSTALL_DESTINATION "${package_folder}")
# Before 1.0, a new minor version may change the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/moe-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/moe-config.cmake"
              "${PROJECT_BINARY_DIR}/moe-config-version.cmake"
        DESTINATION "${package_folder}")

# For builds without CMake. The prefix is where the file is found, so a prefix may be moved.
set(pkgconfig_folder "${CMAKE_INSTALL_DATADIR}/pkgconfig")
cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX BASE_DIRECTORY "${CMAKE_INSTALL_PREFIX}/${pkgconfig_folder}"
           OUTPUT_VARIABLE moe_pc_to_prefix)
configure_file(cmake/moe.pc.in "${PROJECT_BINARY_DIR}/moe.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/moe.pc" DESTINATION "${pkgconfig_folder}")

install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DATADIR}/doc/moe")
