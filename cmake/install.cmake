include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_folder "${CMAKE_INSTALL_DATADIR}/cmake/moe")

install(TARGETS moe EXPORT moe-targets
        FILE_SET HEADERS
        INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
# moe::io and moe::mpi are made by moe-config.cmake, where what they need is found again.
install(FILES ${io_headers} DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/moe/io")
install(FILES ${mpi_headers} DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/moe/mpi")
install(EXPORT moe-targets NAMESPACE moe:: DESTINATION "${package_folder}")

configure_package_config_file(cmake/moe-config.cmake.in "${PROJECT_BINARY_DIR}/moe-config.cmake"
                              INSTALL_DESTINATION "${package_folder}")
# Before 1.0, a new minor version may change the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/moe-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/moe-config.cmake"
              "${PROJECT_BINARY_DIR}/moe-config-version.cmake"
        DESTINATION "${package_folder}")
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DOCDIR}")
