set(VCPKG_BUILD_TYPE release) # header-only

vcpkg_download_distfile(ARCHIVE
    URLS "@archive@"
    FILENAME "moe-${VERSION}.tar.gz"
    SHA512 @sha512@
)
vcpkg_extract_source_archive(SOURCE_PATH
    ARCHIVE "${ARCHIVE}"
)

# OpenMP is looked for again where the package is used, so it is required there only where it is here.
vcpkg_cmake_configure(
    SOURCE_PATH "${SOURCE_PATH}"
    OPTIONS
        -DMOE_MPI=OFF
        -DMOE_BUILD_TESTS=OFF
        -DMOE_BUILD_EXAMPLES=OFF
        -DMOE_BUILD_BENCHMARKS=OFF
)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH share/cmake/moe)
vcpkg_fixup_pkgconfig()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/share/doc")

file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
